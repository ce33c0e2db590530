"""One float64 as a tensor's element, rounded once, to nearest with ties to even; what is too large becomes infinite."""

from __future__ import annotations

import math
import struct

from lossgrad_server.jobs import DataType

_FORMS = {DataType.FLOAT16: "<e", DataType.FLOAT32: "<f", DataType.FLOAT64: "<d"}


def pack_number(value: float, data_type: DataType) -> bytes:
    """Return `value` as one element of a floating-point type."""
    if data_type == DataType.BFLOAT16:
        return _bfloat16(value)
    form = _FORMS[data_type]
    try:
        return struct.pack(form, value)
    except OverflowError:  # struct refuses finite numbers that round beyond the largest one
        return struct.pack(form, math.copysign(math.inf, value))


def _bfloat16(value: float) -> bytes:
    """Round to odd into a float32, whose upper half is then rounded: two steps that give what one would."""
    if math.isnan(value):
        return b"\xc0\x7f"
    magnitude = abs(value)
    (bits,) = struct.unpack("<I", pack_number(magnitude, DataType.FLOAT32))
    (near,) = struct.unpack("<f", struct.pack("<I", bits))
    if near > magnitude:
        bits -= 1
    if near != magnitude:
        bits |= 1
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.pack("<H", bits >> 16 | (0x8000 if math.copysign(1.0, value) < 0 else 0))
