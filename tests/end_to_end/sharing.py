"""What the tests of shared memory look at: which memory an array lies in, and whether two results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.server.serving import RunningServer

LARGE = 200_000  # elements: well above the size from which tensors are shared


def segments(running: RunningServer) -> int:
    memory = running.server._core.shared_memory
    assert memory is not None
    return memory.segments.count


def pool_of(client: Any) -> Any:
    assert client._memory._pool is not None
    return client._memory._pool


def is_shared(array: Any) -> bool:
    """Whether an array or tensor lies in memory that the server handed out."""
    address = array.data_ptr() if isinstance(array, torch.Tensor) else array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return "memfd:lossgrad" in line
    return False


def pair(count: int = LARGE, seed: int = 0, dtype: Any = np.float32) -> tuple[Any, Any]:
    x, y = np.random.default_rng(seed).normal(size=(2, count))
    return x.astype(dtype), y.astype(dtype)


def bits(array: Any) -> bytes | None:
    if array is None:
        return None
    if isinstance(array, torch.Tensor):
        array = array.view(torch.int16) if array.dtype is torch.bfloat16 else array
        return bytes(array.numpy().tobytes())
    return np.asarray(array).tobytes()


def same(one: Any, other: Any) -> None:
    if isinstance(one, tuple):
        for first, second in zip(one, other, strict=True):
            same(first, second)
        return
    for name in ("loss", "gradient", "target_gradient"):
        left, right = getattr(one, name), getattr(other, name)
        assert type(left) is type(right)
        assert bits(left) == bits(right)
        if left is not None:
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert repr(one.value) == repr(other.value)  # NaN too
    assert (one.element_count, one.weight_sum) == (other.element_count, other.weight_sum)
