"""One float64 rounded to an element: held against the nearest of all numbers that the type has."""

from __future__ import annotations

import bisect
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_server.jobs import DataType
from lossgrad_server.transport.open_inference.numbers import pack_number


def bfloat16(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return value


LARGEST = 0x7F7F
VALUES = [bfloat16(bits) for bits in range(LARGEST + 1)]  # every finite one from 0 up, in order: the index is its bits


def nearest_bfloat16(value: float) -> int:
    """Return the bits of the nearest bfloat16, of two equally near ones the even one."""
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    magnitude = abs(value)
    # Beyond the middle between the largest and the next that there would be: infinite.
    if magnitude >= Fraction(VALUES[LARGEST]) + (Fraction(VALUES[LARGEST]) - Fraction(VALUES[LARGEST - 1])) / 2:
        return sign | 0x7F80
    above = bisect.bisect_left(VALUES, magnitude)
    if above > LARGEST:
        return sign | LARGEST
    if above == 0 or VALUES[above] == magnitude:
        return sign | above
    low, high = (abs(Fraction(VALUES[one]) - Fraction(magnitude)) for one in (above - 1, above))
    if low == high:
        return sign | (above if above % 2 == 0 else above - 1)
    return sign | (above - 1 if low < high else above)


def bits_of(value: float) -> int:
    (bits,) = struct.unpack("<H", pack_number(value, DataType.BFLOAT16))
    return int(bits)


AWKWARD = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1e-41,
    5e-324,
    3.3895313892515355e38,
    3.4e38,
    1e300,
]


@pytest.mark.parametrize("value", [number for number in AWKWARD if math.isfinite(number)])
def test_awkward_numbers_round_to_the_nearest_bfloat16(value: float) -> None:
    assert bits_of(value) == nearest_bfloat16(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1e3, 1e3))
def test_any_number_rounds_to_the_nearest_bfloat16(value: float) -> None:
    assert bits_of(value) == nearest_bfloat16(value)


@given(st.integers(0, LARGEST - 1), st.sampled_from([-1, 0, 1]))
def test_a_number_at_the_middle_of_two_goes_to_the_even_one_and_beside_it_to_the_nearer(bits: int, side: int) -> None:
    """Where rounding to float32 first, and only then to bfloat16, goes wrong."""
    middle = (VALUES[bits] + VALUES[bits + 1]) / 2  # exact: float64 has room for it
    value = math.nextafter(middle, math.inf * side) if side else middle
    assert bits_of(value) == nearest_bfloat16(value)
    assert bits_of(-value) == nearest_bfloat16(-value)


def test_infinities_and_nan_stay() -> None:
    assert bits_of(math.inf) == 0x7F80
    assert bits_of(-math.inf) == 0xFF80
    assert bits_of(math.nan) & 0x7FFF > 0x7F80


@pytest.mark.parametrize(
    ("data_type", "dtype"), [(DataType.FLOAT16, "<f2"), (DataType.FLOAT32, "<f4"), (DataType.FLOAT64, "<f8")]
)
@given(value=st.floats() | st.sampled_from([*AWKWARD, 65519.99, 65520.0, -65520.0, 3.4028235677973366e38]))
def test_the_other_types_round_as_numpy_does(data_type: DataType, dtype: str, value: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        expected = np.float64(value).astype(dtype)
    actual = np.frombuffer(pack_number(value, data_type), dtype)[0]
    assert actual.tobytes() == expected.tobytes() or (np.isnan(actual) and np.isnan(expected))
