"""The levels of processors that kernels are compiled for: which one is taken, and that what was compiled for it is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lossgrad_server.engine.cpu_target import LEVELS, choose, environment, host_features, level


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        (LEVELS["x86-64-v4"], "x86-64-v4"),
        (LEVELS["x86-64-v3"], "x86-64-v3"),
        ([*LEVELS["x86-64-v3"], "avx512f"], "x86-64-v3"),
        (["avx"], None),
        ([], None),
    ],
)
def test_the_best_level_whose_features_are_all_there_is_taken(has: list[str], expected: str | None) -> None:
    features = {feature: feature in has for feature in LEVELS["x86-64-v4"]}
    assert level(features) == expected


def test_what_the_environment_says_stays() -> None:
    environ = {"NUMBA_CPU_NAME": "generic"}
    choose(environ)
    assert environ == {"NUMBA_CPU_NAME": "generic"}


def test_this_processors_level_is_put_into_the_environment() -> None:
    best = level(host_features())
    environ: dict[str, str] = {}
    choose(environ)
    assert environ == ({} if best is None else environment(best))


_LOAD = """
from lossgrad_server.engine import cpu_native
from lossgrad_server.engine.cpu_kernel import load_kernel
compiled = []
compile = cpu_native.CFunc._compile_uncached
cpu_native.CFunc._compile_uncached = lambda self: compiled.append(self) or compile(self)
load_kernel()
print(len(compiled))
"""


@pytest.mark.slow
def test_kernels_compiled_for_a_level_are_found_in_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    best = level(host_features())
    if best is None:
        pytest.skip("this processor has none of the levels")
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def compiled(extra: dict[str, str]) -> int:
        result = subprocess.run(
            [sys.executable, "-c", _LOAD], env={**environ, **extra}, capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    assert compiled(environment(best)) > 20
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert compiled(environment(best)) == 0
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o755)
