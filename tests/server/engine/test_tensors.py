"""Bytes to tensors and back, and rounding to the halves once."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from lossgrad_server.engine.tensors import TORCH_TYPES, byte_tensor, read_only_bytes, round_into
from lossgrad_server.jobs import DataType
from tests import reference


def awkward_values(data_type: DataType) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return all the type's numbers, the ties between neighbours, and float64's next numbers on either side of those."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(TORCH_TYPES[data_type]).to(torch.float64)
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    largest = float(numbers[-1])
    beyond = largest + (largest - float(numbers[-2])) / 2
    values = torch.cat((numbers, ties, torch.tensor([beyond, -beyond], dtype=torch.float64))).numpy()
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, -1e-300, 5e-324])
    return np.concatenate((values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf), special))


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16])
def test_halves_are_rounded_once_to_nearest_even(data_type: DataType) -> None:
    values = awkward_values(data_type)
    output = torch.empty(len(values), dtype=TORCH_TYPES[data_type])
    round_into(output, torch.from_numpy(values.copy()))
    got = output.to(torch.float64).numpy()
    np.testing.assert_array_equal(got, reference.rounded(values, data_type))
    zero = (got == 0) & (values != 0)
    assert zero.any()
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(values[zero]))
    if data_type == DataType.FLOAT16:
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got, values.astype(np.float16))  # numpy rounds once too


def test_torch_s_own_conversion_rounds_twice() -> None:
    value = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert value.to(torch.float16).item() == 1.0, "if this fails, round_into may be simplified"


@pytest.mark.parametrize("byte_count", [0, 1, 1000, 64 * 1024, 1_000_001])
@pytest.mark.parametrize("make", [bytes, bytearray, lambda data: memoryview(b"x" + data + b"y")[1:-1]])
def test_bytes_become_a_tensor_without_a_warning_and_stay_alive(make: type[bytes], byte_count: int) -> None:
    pattern = (bytes(range(251)) * (byte_count // 251 + 1))[:byte_count]
    tensor = byte_tensor(make(pattern))
    gc.collect()
    junk = [bytes([index]) * byte_count for index in range(4)]
    assert tensor.numpy().tobytes() == pattern
    assert len(junk) == 4


def test_large_buffers_are_not_copied() -> None:
    data = bytes(1 << 20)
    address, _ = np.frombuffer(data, np.uint8).__array_interface__["data"]
    assert byte_tensor(data).data_ptr() == address


def test_a_tensor_s_bytes_are_read_only_and_not_copied() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.ones(3, dtype=dtype)
        data = read_only_bytes(tensor)
        assert data.readonly
        assert data.nbytes == 3 * tensor.itemsize
        tensor[0] = 0
        assert bytes(data[: tensor.itemsize]) == bytes(tensor.itemsize)
    assert bytes(read_only_bytes(torch.empty(0))) == b""
