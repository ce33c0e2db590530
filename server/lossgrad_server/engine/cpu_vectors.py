"""Vectors of eight numbers, for the loops that must be fast, so that it is not left to a compiler to find them.

A float64x8 or float32x8 is one value to the compiler, which makes of it what the CPU has: one register with AVX-512, two
with AVX2, four with SSE2. What is computed, and in which order, is the same on all of them. Only for compiled functions.
"""

# mypy: allow-untyped-calls, no-warn-unused-ignores, disable-error-code=misc
from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import models, register_model
from numba.extending import intrinsic

WIDTH: Final = 8

FLOAT64X8: Final = ir.VectorType(ir.DoubleType(), WIDTH)
FLOAT32X8: Final = ir.VectorType(ir.FloatType(), WIDTH)
INT32X8: Final = ir.VectorType(ir.IntType(32), WIDTH)
# Where streamed vectors must start. Others may lie anywhere.
STREAM_ALIGNMENT: Final = 32


class _Float64x8(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float64x8")


class _Float32x8(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x8")


@register_model(_Float64x8)
class _Float64x8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, FLOAT64X8)


@register_model(_Float32x8)
class _Float32x8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, FLOAT32X8)


float64x8: Final = _Float64x8()
float32x8: Final = _Float32x8()


def load(builder: Any, address: Any, vector: Any) -> Any:
    """Generate a load of a vector type from any address. This and the functions like it are for other intrinsics."""
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


def store(builder: Any, address: Any, value: Any, align: int) -> Any:
    """Generate a store to an address that is a multiple of `align`, and return the instruction."""
    return builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _stream(builder: Any, address: Any, value: Any) -> None:
    store(builder, address, value, align=STREAM_ALIGNMENT).set_metadata(
        "nontemporal", builder.module.add_metadata([ir.IntType(32)(1)])
    )


def nothing() -> Any:
    """Return what an intrinsic without a result returns."""
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@intrinsic  # type: ignore[untyped-decorator]
def load_float32x8(_typing: Any, _address: Any) -> Any:
    """Return the eight float32 at an address."""
    return float32x8(types.int64), lambda _context, builder, _signature, a: load(builder, a[0], FLOAT32X8)


@intrinsic  # type: ignore[untyped-decorator]
def load_float64x8(_typing: Any, _address: Any) -> Any:
    """Return the eight float64 at an address."""
    return float64x8(types.int64), lambda _context, builder, _signature, a: load(builder, a[0], FLOAT64X8)


@intrinsic  # type: ignore[untyped-decorator]
def store_float64x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        store(builder, *arguments, align=1)
        return nothing()

    return types.void(types.int64, float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_float32x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        store(builder, *arguments, align=1)
        return nothing()

    return types.void(types.int64, float32x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream_float64x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector past the caches, to a multiple of STREAM_ALIGNMENT. `fence` must follow."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _stream(builder, *arguments)
        return nothing()

    return types.void(types.int64, float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream_float32x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector past the caches, to a multiple of STREAM_ALIGNMENT. `fence` must follow."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _stream(builder, *arguments)
        return nothing()

    return types.void(types.int64, float32x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def fence(_typing: Any) -> Any:
    """Let all threads see what this one has streamed."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return nothing()

    return types.void(), generate


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INT32X8, [0] * WIDTH))


@intrinsic  # type: ignore[untyped-decorator]
def splat(_typing: Any, _value: Any) -> Any:
    """Return a vector of one float64, eight times."""
    return float64x8(types.float64), lambda _context, builder, _signature, a: _splat(builder, a[0])


@intrinsic  # type: ignore[untyped-decorator]
def splat_float32(_typing: Any, _value: Any) -> Any:
    """Return a vector of one float32, eight times."""
    return float32x8(types.float32), lambda _context, builder, _signature, a: _splat(builder, a[0])


@intrinsic  # type: ignore[untyped-decorator]
def subtract_float32x8(_typing: Any, _a: Any, _b: Any) -> Any:
    """Subtract two float32x8."""
    return float32x8(float32x8, float32x8), lambda _context, builder, _signature, a: builder.fsub(*a)


@intrinsic  # type: ignore[untyped-decorator]
def as_float64x8(_typing: Any, _value: Any) -> Any:
    """Return a float32x8 as float64x8, exactly."""
    return float64x8(float32x8), lambda _context, builder, _signature, a: builder.fpext(a[0], FLOAT64X8)


@intrinsic  # type: ignore[untyped-decorator]
def as_float32x8(_typing: Any, _value: Any) -> Any:
    """Return a float64x8 rounded to float32."""
    return float32x8(float64x8), lambda _context, builder, _signature, a: builder.fptrunc(a[0], FLOAT32X8)


@intrinsic  # type: ignore[untyped-decorator]
def add(_typing: Any, _a: Any, _b: Any) -> Any:
    """Add two float64x8."""
    return float64x8(float64x8, float64x8), lambda _context, builder, _signature, a: builder.fadd(*a)


@intrinsic  # type: ignore[untyped-decorator]
def subtract(_typing: Any, _a: Any, _b: Any) -> Any:
    """Subtract two float64x8."""
    return float64x8(float64x8, float64x8), lambda _context, builder, _signature, a: builder.fsub(*a)


@intrinsic  # type: ignore[untyped-decorator]
def multiply(_typing: Any, _a: Any, _b: Any) -> Any:
    """Multiply two float64x8."""
    return float64x8(float64x8, float64x8), lambda _context, builder, _signature, a: builder.fmul(*a)


def fuse(builder: Any, *arguments: Any) -> Any:
    """Generate a * b + c, rounded once."""
    vector = arguments[0].type
    name = f"llvm.fma.v{WIDTH}{'f32' if vector == FLOAT32X8 else 'f64'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
    return builder.call(function, arguments)


def take_absolute(builder: Any, value: Any) -> Any:
    """Generate a vector without its signs."""
    name = f"llvm.fabs.v{WIDTH}{'f32' if value.type == FLOAT32X8 else 'f64'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(value.type, [value.type]), name)
    return builder.call(function, [value])


def _least(builder: Any, value: Any, limit: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", value, limit), limit, value)


def words(value: int) -> Any:
    """Return a vector of one 32-bit integer, eight times."""
    return ir.Constant(INT32X8, [value] * WIDTH)


def with_signs(builder: Any, bits: Any, signed: Any) -> Any:
    """Generate the bits of float32 magnitudes with the signs of a float32x8."""
    return builder.or_(bits, builder.and_(builder.bitcast(signed, INT32X8), words(-(1 << 31))))


@intrinsic  # type: ignore[untyped-decorator]
def fused(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return float64x8(*[float64x8] * 3), lambda _context, builder, _signature, a: fuse(builder, *a)


@intrinsic  # type: ignore[untyped-decorator]
def least(_typing: Any, _value: Any, _limit: Any) -> Any:
    """Return the vector, but at most `limit`; NaN stays NaN."""
    return float64x8(*[float64x8] * 2), lambda _context, builder, _signature, a: _least(builder, *a)


@intrinsic  # type: ignore[untyped-decorator]
def clamped(_typing: Any, _value: Any, _limit: Any, _minus_limit: Any) -> Any:
    """Return the vector, but at most `limit` and at least `minus_limit`; NaN stays NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, limit, minus_limit = arguments
        upper = builder.select(builder.fcmp_ordered(">", value, limit), limit, value)
        return builder.select(builder.fcmp_ordered("<", upper, minus_limit), minus_limit, upper)

    return float64x8(float64x8, float64x8, float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def absolute(_typing: Any, _value: Any) -> Any:
    """Return the vector without its signs."""
    return float64x8(float64x8), lambda _context, builder, _signature, a: take_absolute(builder, a[0])


@intrinsic  # type: ignore[untyped-decorator]
def absolute_float32x8(_typing: Any, _value: Any) -> Any:
    """Return the vector without its signs."""
    return float32x8(float32x8), lambda _context, builder, _signature, a: take_absolute(builder, a[0])


@intrinsic  # type: ignore[untyped-decorator]
def inside_or_edge(_typing: Any, _p: Any, _limit: Any, _inside: Any, _edge: Any, _minus_edge: Any) -> Any:
    """Return `inside` where |p| is below `limit`, elsewhere `edge` where p is above 0 and `minus_edge` where it is not."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        p, limit, inside, edge, minus_edge = arguments
        zero = ir.Constant(FLOAT64X8, [0.0] * WIDTH)
        outside = builder.select(builder.fcmp_ordered(">", p, zero), edge, minus_edge)
        return builder.select(builder.fcmp_ordered("<", take_absolute(builder, p), limit), inside, outside)

    return float64x8(*[float64x8] * 5), generate


@intrinsic  # type: ignore[untyped-decorator]
def scaled_float32x8(_typing: Any, _d: Any, _magnitude: Any, _high: Any, _low: Any, _edge: Any) -> Any:
    """Return `magnitude` times `high + low`, at most `edge`, with d's signs; all of them at least 0 but d.

    Rounded once but for 2^-24 of an ulp, and of numbers below 2^-100 half an ulp of the smallest number.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        d, magnitude, high, low, edge = arguments
        value = _least(builder, fuse(builder, magnitude, high, builder.fmul(magnitude, low)), edge)
        return builder.bitcast(with_signs(builder, builder.bitcast(value, INT32X8), d), FLOAT32X8)

    return float32x8(*[float32x8] * 5), generate
