"""Numbers in and out of memory, a block at a time: every data type to float32 or float64, and float64 to every float.

float16 and bfloat16 are taken apart and put together from their bits with integer arithmetic, which vectorises on every
CPU and gives the same bits on all of them. Rounding is to nearest even, once, from float64. Every NaN is written as the
same one, because which of two NaNs survives an operation depends on how the compiler ordered its operands.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import float32, int32, uint16, uint32, uint64

from lossgrad_server.engine.cpu_intrinsics import (
    array_at,
    bits_of_float32,
    bits_of_float64,
    float32_of_bits,
    float64_of_bits,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.jobs import DataType

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = (int(data_type) for data_type in list(DataType)[:4])
INT64, INT32, INT16, INT8, UINT8, BOOL = (int(data_type) for data_type in list(DataType)[4:])

_TWO_TO_112: Final = np.float32(2.0**112)
# The bits of 2^42 * 2^-14 and of 2^45 * 2^-126, for `_rounded`.
_FLOAT16_SMALLEST: Final = np.uint64((1023 + 42 - 14) << 52)
_BFLOAT16_SMALLEST: Final = np.uint64((1023 + 45 - 126) << 52)


@inlined
def float16_value(bits: Any) -> Any:
    """Return a float16's value as float32, which holds it exactly."""
    wide = uint32(bits)
    # Exponent and significand moved to their places give the value times 2^-112, subnormal ones included.
    magnitude = bits_of_float32(float32_of_bits(uint32((wide & uint32(0x7FFF)) << uint32(13))) * _TWO_TO_112)
    if magnitude >= uint32(0x47800000):  # 2^16: infinity and NaN
        magnitude = uint32(magnitude | uint32(0x7F800000))
    return float32_of_bits(uint32(magnitude | ((wide & uint32(0x8000)) << uint32(16))))


@inlined
def bfloat16_value(bits: Any) -> Any:
    """Return a bfloat16's value as float32, of which it is the upper half."""
    return float32_of_bits(uint32(uint32(bits) << uint32(16)))


@inlined
def _rounded(magnitude: Any, lost_bits: Any, smallest: Any) -> Any:
    """Return a float64 of at least 0 rounded to nearest even, without its last `lost_bits` bits.

    `smallest` is the bits of the float64 2^lost_bits times the smallest normal number of the type to be rounded to: below
    that, as many bits are lost as its subnormal numbers lack.
    """
    # Adding 2^lost_bits times the number's power of two pushes the bits out, and rounds them as IEEE 754 rounds.
    power = uint64((bits_of_float64(magnitude) & uint64(0x7FF0000000000000)) + (uint64(lost_bits) << uint64(52)))
    pusher = float64_of_bits(max(power, smallest))
    return (magnitude + pusher) - pusher


@inlined
def bfloat16_bits(value: Any) -> Any:
    """Return the bfloat16 nearest to a float64."""
    magnitude = min(abs(value), 2.0**128)  # infinity, once rounded
    # The result is exact, so what remains is to leave out zeros.
    narrow = bits_of_float32(float32(_rounded(magnitude, 45, _BFLOAT16_SMALLEST)))
    bits = uint32((narrow >> uint32(16)) | _sign_bit(value))
    return uint16(uint32(0x7FC0) if value != value else bits)  # noqa: PLR0124


@inlined
def float16_bits(value: Any) -> Any:
    """Return the float16 nearest to a float64."""
    magnitude = min(abs(value), 65536.0)  # infinity, once rounded
    narrow = float32(_rounded(magnitude, 42, _FLOAT16_SMALLEST))
    normal = uint32((bits_of_float32(narrow) >> uint32(13)) - uint32(112 << 10))
    subnormal = uint32(int32(narrow * np.float32(2.0**24)))
    bits = uint32((normal if narrow >= np.float32(2.0**-14) else subnormal) | _sign_bit(value))
    return uint16(uint32(0x7E00) if value != value else bits)  # noqa: PLR0124


@inlined
def _sign_bit(value: Any) -> Any:
    """Return a float64's sign where a half type has it."""
    return uint32((bits_of_float64(value) >> uint64(48)) & uint64(0x8000))


@inlined
def _convert(address: Any, stride: Any, count: Any, source_type: Any, out: Any) -> None:
    source = array_at(address, count, source_type)
    if stride == 0:
        first = source[0]
        for index in range(count):
            out[index] = first
    else:
        for index in range(count):
            out[index] = source[index]


def _loader(name: str, dtype: Any) -> Any:
    """Make the function that reads elements of any type as float32 or as float64."""

    @native("int64(int64, int64, int64, int64, int64)", name)
    def load(data_type: int, address: int, stride: int, count: int, destination: int) -> int:
        out = array_at(destination, count, dtype)
        if data_type == FLOAT32:
            _convert(address, stride, count, np.float32, out)
        elif data_type == FLOAT64:
            _convert(address, stride, count, np.float64, out)
        elif data_type == FLOAT16:
            halves = array_at(address, count, np.uint16)
            for index in range(count):
                out[index] = float16_value(halves[index * stride])
        elif data_type == BFLOAT16:
            halves = array_at(address, count, np.uint16)
            for index in range(count):
                out[index] = bfloat16_value(halves[index * stride])
        elif data_type == INT64:
            _convert(address, stride, count, np.int64, out)
        elif data_type == INT32:
            _convert(address, stride, count, np.int32, out)
        elif data_type == INT16:
            _convert(address, stride, count, np.int16, out)
        elif data_type == INT8:
            _convert(address, stride, count, np.int8, out)
        elif data_type == UINT8:
            _convert(address, stride, count, np.uint8, out)
        else:
            truths = array_at(address, count, np.uint8)
            for index in range(count):
                out[index] = 1.0 if truths[index * stride] != 0 else 0.0
        return 0

    return load


# Read `count` elements that lie one behind the other, or one of them `count` times where the stride is 0. Arguments:
# data type, address, stride, count, and the address to write to. Integers are rounded.
load_float32 = _loader("load_float32", np.float32)
load_float64 = _loader("load_float64", np.float64)


@native("int64(int64, int64, int64, int64, float64, int64)")
def store_run(data_type: int, address: int, start: int, count: int, sign: float, source: int) -> int:
    """Write `sign` times the float64 values at `source` as the elements from `start` on of the tensor at an address."""
    values = array_at(source, count, np.float64)
    if data_type == FLOAT32:
        singles = array_at(address + 4 * start, count, np.float32)
        for index in range(count):
            singles[index] = float32(sign * values[index])
    elif data_type == FLOAT64:
        doubles = array_at(address + 8 * start, count, np.float64)
        for index in range(count):
            doubles[index] = sign * values[index]
    elif data_type == FLOAT16:
        halves = array_at(address + 2 * start, count, np.uint16)
        for index in range(count):
            halves[index] = float16_bits(sign * values[index])
    else:
        halves = array_at(address + 2 * start, count, np.uint16)
        for index in range(count):
            halves[index] = bfloat16_bits(sign * values[index])
    return 0
