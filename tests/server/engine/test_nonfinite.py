"""NaN is found in the bytes of every floating-point type, wherever it is, and infinity is not taken for it."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from lossgrad_server.engine.nonfinite import has_nan
from lossgrad_server.jobs import DataType

TYPES = {
    DataType.FLOAT16: np.dtype(np.float16),
    DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    DataType.FLOAT32: np.dtype(np.float32),
    DataType.FLOAT64: np.dtype(np.float64),
}
COUNT = 100_003  # several pieces, and a part of one


@pytest.mark.parametrize("data_type", TYPES)
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("place", [0, 40_000, COUNT - 1])
def test_a_nan_is_found_wherever_it_is(data_type: DataType, nan: float, place: int) -> None:
    values = np.ones(COUNT, TYPES[data_type])
    values[::7] = -math.inf
    assert not has_nan(values.tobytes(), data_type)
    values[place] = nan
    assert has_nan(values.tobytes(), data_type)
    assert has_nan(memoryview(values.tobytes()), data_type)


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16])
def test_every_number_of_16_bits_is_told_apart(data_type: DataType) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(TYPES[data_type])
    found = [has_nan(value.tobytes(), data_type) for value in values]
    assert found == [math.isnan(value) for value in values.tolist()]


@pytest.mark.parametrize(
    ("data_type", "bits"),
    [(DataType.FLOAT32, 0x7F800001), (DataType.FLOAT64, 0x7FF0000000000001), (DataType.FLOAT32, 0xFFFFFFFF)],
)
def test_a_nan_of_any_bits_is_one(data_type: DataType, bits: int) -> None:
    assert has_nan(bits.to_bytes(data_type.itemsize, "little"), data_type)


def test_nothing_holds_no_nan() -> None:
    assert not has_nan(b"", DataType.FLOAT32)
