"""Vectors of float16 and bfloat16, in and out of memory. As cpu_vectors.py, of which they become float32x8 and float64x8.

Nothing but float16's conversions is left to instructions that not every CPU has; without them it is done with integers,
and the results are the same.
"""

# mypy: allow-untyped-calls, no-warn-unused-ignores, disable-error-code=misc
from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lossgrad_server.engine.cpu_vectors import (
    FLOAT32X8,
    FLOAT64X8,
    INT32X8,
    WIDTH,
    float32x8,
    float64x8,
    fuse,
    load,
    nothing,
    store,
    take_absolute,
    with_signs,
    words,
)

_INT16X8: Final = ir.VectorType(ir.IntType(16), WIDTH)
_FLOAT16X8: Final = ir.VectorType(ir.HalfType(), WIDTH)


def _converts_float16(context: Any) -> bool:
    """Return whether the CPU that is compiled for converts float16 itself."""
    return "+f16c" in context.codegen().magic_tuple()[2].split(",")


@intrinsic  # type: ignore[untyped-decorator]
def load_bfloat16x8(_typing: Any, _address: Any) -> Any:
    """Return the eight bfloat16 at an address as float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.zext(load(builder, arguments[0], _INT16X8), INT32X8)
        return builder.bitcast(builder.shl(wide, words(16)), FLOAT32X8)

    return float32x8(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_float16x8(_typing: Any, _address: Any) -> Any:
    """Return the eight float16 at an address as float32. As cpu_floats.float16_value."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if _converts_float16(context):
            return builder.fpext(load(builder, arguments[0], _FLOAT16X8), FLOAT32X8)
        wide = builder.zext(load(builder, arguments[0], _INT16X8), INT32X8)
        moved = builder.shl(builder.and_(wide, words(0x7FFF)), words(13))
        scale = ir.Constant(FLOAT32X8, [2.0**112] * WIDTH)
        magnitude = builder.bitcast(builder.fmul(builder.bitcast(moved, FLOAT32X8), scale), INT32X8)
        is_special = builder.icmp_signed(">=", magnitude, words(0x47800000))
        magnitude = builder.select(is_special, builder.or_(magnitude, words(0x7F800000)), magnitude)
        signs = builder.shl(builder.and_(wide, words(0x8000)), words(16))
        return builder.bitcast(builder.or_(magnitude, signs), FLOAT32X8)

    return float32x8(types.int64), generate


# Numbers are rounded to odd first, from float64 to float32: the last bit is set wherever that is not exact. Rounding such
# a number again, to a type with fewer bits, gives what rounding once would have given. Source: Boldo and Melquiond, "When
# double rounding is odd", 2005.


def _to_odd(builder: Any, bits: Any, is_above: Any, is_inexact: Any) -> Any:
    """Return the bits of magnitudes rounded to odd from those rounded to nearest: -1 where they are above, 1 if inexact."""
    return builder.or_(builder.add(bits, is_above), is_inexact)


def _rounded_to_odd(builder: Any, value: Any) -> Any:
    """Return the bits of a float64x8's magnitude, rounded to odd, and it rounded to nearest."""
    nearest = builder.fptrunc(value, FLOAT32X8)
    magnitude, back = take_absolute(builder, value), take_absolute(builder, builder.fpext(nearest, FLOAT64X8))
    is_above = builder.sext(builder.fcmp_ordered("<", magnitude, back), INT32X8)
    is_inexact = builder.zext(builder.fcmp_unordered("!=", magnitude, back), INT32X8)
    bits = builder.and_(builder.bitcast(nearest, INT32X8), words(0x7FFFFFFF))
    return _to_odd(builder, bits, is_above, is_inexact), nearest


def _scaled_to_odd(builder: Any, magnitude: Any, high: Any, low: Any, edge: Any) -> Any:
    """Return the bits of `magnitude * (high + low)`, rounded to odd, at most those of `edge`."""
    small = builder.fmul(magnitude, low)
    nearest = fuse(builder, magnitude, high, small)
    lost = builder.fadd(fuse(builder, magnitude, high, builder.fneg(nearest)), small)
    # What was lost is never -0.0.
    lost = builder.bitcast(lost, INT32X8)
    is_inexact = builder.select(builder.icmp_unsigned("<", lost, words(1)), lost, words(1))
    odd = _to_odd(builder, builder.bitcast(nearest, INT32X8), builder.ashr(lost, words(31)), is_inexact)
    most = builder.bitcast(edge, INT32X8)
    return builder.select(builder.icmp_unsigned("<", odd, most), odd, most)


def _to_nearest_even(builder: Any, bits: Any, lost_bits: int) -> Any:
    """Return integers of at least 0 without their last bits, rounded."""
    last = builder.and_(builder.lshr(bits, words(lost_bits)), words(1))
    half = builder.add(words((1 << (lost_bits - 1)) - 1), last)
    return builder.lshr(builder.add(bits, half), words(lost_bits))


def _half_signs(builder: Any, signed: Any) -> Any:
    return builder.and_(builder.lshr(builder.bitcast(signed, INT32X8), words(16)), words(0x8000))


def _store_bfloat16(_context: Any, builder: Any, address: Any, odd: Any, signed: Any) -> None:
    bits = builder.or_(_to_nearest_even(builder, odd, 16), _half_signs(builder, signed))
    store(builder, address, builder.trunc(bits, _INT16X8), align=1)


def _store_float16(context: Any, builder: Any, address: Any, odd: Any, signed: Any) -> None:
    if _converts_float16(context):
        value = builder.bitcast(with_signs(builder, odd, signed), FLOAT32X8)
        store(builder, address, builder.fptrunc(value, _FLOAT16X8), align=1)
        return
    infinite = words(0x47800000)  # 2^16
    odd = builder.select(builder.icmp_signed(">", odd, infinite), infinite, odd)
    normal = builder.sub(_to_nearest_even(builder, odd, 13), words(112 << 10))
    # Adding 1/2 to a number below 2^-14 leaves in the last bits how many times float16's 2^-24 it is, rounded.
    pushed = builder.fadd(builder.bitcast(odd, FLOAT32X8), ir.Constant(FLOAT32X8, [0.5] * WIDTH))
    subnormal = builder.sub(builder.bitcast(pushed, INT32X8), words(0x3F000000))
    magnitude = builder.select(builder.icmp_signed("<", odd, words(0x38800000)), subnormal, normal)
    bits = builder.or_(magnitude, _half_signs(builder, signed))
    store(builder, address, builder.trunc(bits, _INT16X8), align=1)


def _storing(store_odd: Any) -> tuple[Any, Any]:
    """Make the functions that round to a type and write that: a float64x8, and what `scaled_float32x8` computes."""

    @intrinsic  # type: ignore[untyped-decorator]
    def store_rounded(_typing: Any, _address: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            address, value = arguments
            store_odd(context, builder, address, *_rounded_to_odd(builder, value))
            return nothing()

        return types.void(types.int64, float64x8), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def store_scaled(_typing: Any, _address: Any, _d: Any, _magnitude: Any, _high: Any, _low: Any, _edge: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            address, d, *factors = arguments
            store_odd(context, builder, address, _scaled_to_odd(builder, *factors), d)
            return nothing()

        return types.void(types.int64, *[float32x8] * 5), generate

    return store_rounded, store_scaled


# Write to an address a float64x8, rounded once; or a float32x8 as `scaled_float32x8` has it, with an edge rounded to odd.
store_as_float16x8, store_scaled_float16x8 = _storing(_store_float16)
store_as_bfloat16x8, store_scaled_bfloat16x8 = _storing(_store_bfloat16)
