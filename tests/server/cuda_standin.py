"""A CUDA driver that is none, and memory of its devices: cuda_standin.c, compiled, found instead of the real one."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from lossgrad_server.shared_memory.cuda_driver import LIBRARY

COPY_FAILS, COPY_HANGS, COPY_CRASHES, OPEN_CRASHES, OPEN_HANGS = range(1, 6)
HANGING = 0xEE  # the first byte of memory whose copy hangs


def build(folder: Path) -> Path:
    """Compile the stand-in into a folder; skip where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this system")
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", folder / LIBRARY, source], check=True
    )
    return folder


class DeviceMemory:
    """An allocation on the stand-in's device."""

    def __init__(self, byte_count: int, fault: int = 0) -> None:
        name = f"lg{uuid.uuid4().hex[:24]}"
        self.path = Path("/dev/shm", name)
        self.handle = name.encode().ljust(32, b"\0") + bytes((fault,)).ljust(32, b"\0")
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(descriptor, byte_count)
        self.memory = mmap.mmap(descriptor, byte_count)
        os.close(descriptor)

    def __enter__(self) -> DeviceMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.path.unlink()

    def array(self, dtype: Any = np.uint8, shape: tuple[int, ...] = (-1,), offset: int = 0) -> np.ndarray[Any, Any]:
        count = int(np.prod(shape)) if -1 not in shape else -1
        return np.frombuffer(self.memory, dtype, count, offset).reshape(shape)

    @property
    def is_being_copied(self) -> bool:
        """Whether a copy of it hangs."""
        return self.memory[0] == HANGING
