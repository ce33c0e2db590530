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

_FLOAT64X8: Final = ir.VectorType(ir.DoubleType(), WIDTH)
_FLOAT32X8: Final = ir.VectorType(ir.FloatType(), WIDTH)
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
        super().__init__(manager, type_, _FLOAT64X8)


@register_model(_Float32x8)
class _Float32x8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _FLOAT32X8)


_float64x8: Final = _Float64x8()
_float32x8: Final = _Float32x8()


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


def _store(builder: Any, address: Any, value: Any, align: int) -> Any:
    return builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _stream(builder: Any, address: Any, value: Any) -> None:
    store = _store(builder, address, value, align=STREAM_ALIGNMENT)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _nothing() -> Any:
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@intrinsic  # type: ignore[untyped-decorator]
def load_float32x8(_typing: Any, _address: Any) -> Any:
    """Return the eight float32 at an address."""
    return _float32x8(types.int64), lambda _context, builder, _signature, a: _load(builder, a[0], _FLOAT32X8)


@intrinsic  # type: ignore[untyped-decorator]
def load_float64x8(_typing: Any, _address: Any) -> Any:
    """Return the eight float64 at an address."""
    return _float64x8(types.int64), lambda _context, builder, _signature, a: _load(builder, a[0], _FLOAT64X8)


@intrinsic  # type: ignore[untyped-decorator]
def store_float64x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _store(builder, *arguments, align=1)
        return _nothing()

    return types.void(types.int64, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_as_float32x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Round a vector to float32 and write it to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, value = arguments
        _store(builder, address, builder.fptrunc(value, _FLOAT32X8), align=1)
        return _nothing()

    return types.void(types.int64, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream_float64x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Write a vector past the caches, to a multiple of STREAM_ALIGNMENT. `fence` must follow."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _stream(builder, *arguments)
        return _nothing()

    return types.void(types.int64, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream_as_float32x8(_typing: Any, _address: Any, _value: Any) -> Any:
    """Round a vector to float32 and write it past the caches, to a multiple of STREAM_ALIGNMENT. `fence` must follow."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, value = arguments
        _stream(builder, address, builder.fptrunc(value, _FLOAT32X8))
        return _nothing()

    return types.void(types.int64, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def fence(_typing: Any) -> Any:
    """Let all threads see what this one has streamed."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return _nothing()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def splat(_typing: Any, _value: Any) -> Any:
    """Return a vector of one float64, eight times."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        undefined = ir.Constant(_FLOAT64X8, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], ir.IntType(32)(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))

    return _float64x8(types.float64), generate


@intrinsic  # type: ignore[untyped-decorator]
def difference_float64x8(_typing: Any, _a: Any, _b: Any) -> Any:
    """Subtract two float32x8 and return the result, which is rounded to float32, as float64x8."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.fsub(*arguments), _FLOAT64X8)

    return _float64x8(_float32x8, _float32x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(_typing: Any, _a: Any, _b: Any) -> Any:
    """Add two float64x8."""
    return _float64x8(_float64x8, _float64x8), lambda _context, builder, _signature, a: builder.fadd(*a)


@intrinsic  # type: ignore[untyped-decorator]
def subtract(_typing: Any, _a: Any, _b: Any) -> Any:
    """Subtract two float64x8."""
    return _float64x8(_float64x8, _float64x8), lambda _context, builder, _signature, a: builder.fsub(*a)


@intrinsic  # type: ignore[untyped-decorator]
def multiply(_typing: Any, _a: Any, _b: Any) -> Any:
    """Multiply two float64x8."""
    return _float64x8(_float64x8, _float64x8), lambda _context, builder, _signature, a: builder.fmul(*a)


@intrinsic  # type: ignore[untyped-decorator]
def fused(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return a * b + c, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        signature = ir.FunctionType(_FLOAT64X8, [_FLOAT64X8] * 3)
        function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{WIDTH}f64")
        return builder.call(function, arguments)

    return _float64x8(_float64x8, _float64x8, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def clamped(_typing: Any, _value: Any, _limit: Any, _minus_limit: Any) -> Any:
    """Return the vector, but at most `limit` and at least `minus_limit`; NaN stays NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, limit, minus_limit = arguments
        upper = builder.select(builder.fcmp_ordered(">", value, limit), limit, value)
        return builder.select(builder.fcmp_ordered("<", upper, minus_limit), minus_limit, upper)

    return _float64x8(_float64x8, _float64x8, _float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def absolute(_typing: Any, _value: Any) -> Any:
    """Return the vector without its signs."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        signature = ir.FunctionType(_FLOAT64X8, [_FLOAT64X8])
        function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fabs.v{WIDTH}f64")
        return builder.call(function, arguments)

    return _float64x8(_float64x8), generate


@intrinsic  # type: ignore[untyped-decorator]
def inside_or_edge(_typing: Any, _p: Any, _limit: Any, _inside: Any, _edge: Any, _minus_edge: Any) -> Any:
    """Return `inside` where |p| is below `limit`, elsewhere `edge` where p is above 0 and `minus_edge` where it is not."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        p, limit, inside, edge, minus_edge = arguments
        zero = ir.Constant(_FLOAT64X8, [0.0] * WIDTH)
        outside = builder.select(builder.fcmp_ordered(">", p, zero), edge, minus_edge)
        signature = ir.FunctionType(_FLOAT64X8, [_FLOAT64X8])
        magnitude = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fabs.v{WIDTH}f64")
        return builder.select(builder.fcmp_ordered("<", builder.call(magnitude, [p]), limit), inside, outside)

    return _float64x8(*[_float64x8] * 5), generate
