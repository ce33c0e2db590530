"""Devices that stand in for CUDA: the worker and its kernels run on the CPU, the kernels in Triton's interpreter.

Importing this turns the interpreter on, unless there is a GPU: then the kernels are compiled, and what needs the
interpreter is skipped; TRITON_INTERPRET=1 runs it there, too, in a run of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Before triton is imported for the first time: its own functions, too, are made for the interpreter or for a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from triton.runtime import interpreter

from lossgrad_server.engine import cuda_kernel
from lossgrad_server.engine.cuda_device import Lane, Marker

if not torch.cuda.is_available():
    assert isinstance(tl.sum, interpreter.InterpretedFunction), (
        "triton was imported before TRITON_INTERPRET was set; import this module first, or set it for the whole run"
    )

needs_interpreter = pytest.mark.skipif(
    not cuda_kernel.INTERPRETED, reason="the kernels are compiled for the GPU here; set TRITON_INTERPRET=1"
)
needs_gpu = pytest.mark.skipif(
    cuda_kernel.INTERPRETED,
    reason=f"torch {torch.__version__} sees no CUDA device, or TRITON_INTERPRET is set",
)


class SimulatedDevice:
    """A device of the CPU's memory, where everything runs as soon as it is enqueued."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.released_count = 0

    @property
    def name(self) -> str:
        return "cuda:7"

    def open(self) -> None:
        pass

    def empty(self, byte_count: int) -> Tensor:
        self.allocated.append(byte_count)
        # NaN in every type: what is read before it is written shows.
        return torch.full((byte_count,), 0xFF, dtype=torch.uint8)

    def pinned(self, byte_count: int) -> Tensor:
        return torch.full((byte_count,), 0xFF, dtype=torch.uint8)

    def enqueue(self, lane: Lane, work: Callable[[], None]) -> None:
        _run(work)

    def record(self, lane: Lane) -> Marker:
        return _Passed()

    def wait(self, lane: Lane, marker: Marker) -> None:
        assert isinstance(marker, _Passed)

    def available_bytes(self) -> int:
        return 12345

    def release(self) -> None:
        self.released_count += 1


class _Passed:
    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class LateDevice(SimulatedDevice):
    """A device that does nothing before it must: what is enqueued runs when a marker behind it is waited for.

    So whatever is read, or written anew, without waiting for the marker that makes it safe, is wrong here every time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lanes = [_LateLane() for _ in Lane]

    def enqueue(self, lane: Lane, work: Callable[[], None]) -> None:
        self._lanes[lane].waiting.append(lambda: _run(work))

    def record(self, lane: Lane) -> Marker:
        queue = self._lanes[lane]
        return _LateMarker(queue, queue.done + len(queue.waiting))

    def wait(self, lane: Lane, marker: Marker) -> None:
        self._lanes[lane].waiting.append(marker.synchronize)

    @property
    def waiting_count(self) -> int:
        return sum(len(lane.waiting) for lane in self._lanes)


@dataclass
class _LateLane:
    waiting: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0


@dataclass
class _LateMarker:
    lane: _LateLane
    position: int

    def synchronize(self) -> None:
        while self.lane.done < self.position:
            work = self.lane.waiting.pop(0)
            self.lane.done += 1
            work()

    def query(self) -> bool:
        return self.lane.done >= self.position


def _run(work: Callable[[], None]) -> None:
    with compute_on_cpu():
        work()


@contextmanager
def compute_on_cpu() -> Iterator[None]:
    """Make the interpreter silent and faster. It computes with numpy, which warns of what IEEE 754 defines."""
    with np.errstate(all="ignore"), _patched_once():
        yield


@contextmanager
def _patched_once() -> Iterator[None]:
    """Have the interpreter patch triton's language once for each module, not anew for each call in a kernel (2 ms)."""
    module: Any = interpreter
    original = module._patch_lang
    scopes: dict[int, Any] = {}

    def patch(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace not in scopes:
            scopes[namespace] = original(function)
        return _NOTHING

    module._patch_lang = patch
    try:
        yield
    finally:
        module._patch_lang = original
        for scope in reversed(scopes.values()):
            scope.restore()


class _Nothing:
    def restore(self) -> None:
        pass


_NOTHING = _Nothing()
