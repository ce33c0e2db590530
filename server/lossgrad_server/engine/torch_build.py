"""Which torch is installed, found out without importing it: that takes seconds, and memory for as long as a server lives."""

from __future__ import annotations

import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def version() -> str:
    """Return torch's version with its build: "2.13.0+cpu". Raises ModuleNotFoundError where there is no torch."""
    return str(_facts()["__version__"])


def cuda_version() -> str:
    """Return the CUDA that torch is built for: "13.0", "" for none. Raises ModuleNotFoundError where there is no torch."""
    return str(_facts().get("cuda") or "")


def is_for_cuda() -> bool:
    """Whether this torch could use a CUDA device, if there is one. Raises ModuleNotFoundError where there is no torch."""
    return cuda_version() != ""


@cache
def _facts() -> dict[str, Any]:
    """Return what torch/version.py says, which is written when torch is built and imports nothing of it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))
