"""What the CPU kernels need of the machine and numba does not offer: memory by address, a fused multiply-add, raw bits.

All of it is usable only inside functions that numba compiles.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import get_itemsize, make_array, populate_array


@intrinsic  # type: ignore[untyped-decorator]
def array_at(_typing: Any, address: Any, count: Any, dtype: Any) -> Any:
    """Return the memory at an address as a one-dimensional array, at any alignment. Nothing is checked."""
    array_type = types.Array(dtype.dtype, 1, "C", aligned=False)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        item_type = context.get_data_type(array_type.dtype)
        item_size = context.get_constant(types.intp, get_itemsize(context, array_type))
        array = make_array(array_type)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(arguments[0], item_type.as_pointer()),
            shape=[arguments[1]],
            strides=[item_size],
            itemsize=item_size,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(types.intp, types.intp, dtype), generate


@intrinsic  # type: ignore[untyped-decorator]
def fused_multiply_add(_typing: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return a * b + c for float64, rounded once on every machine: exact in software where the CPU has no such unit."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


def _reinterpretation(source: Any, target: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def reinterpret(_typing: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return reinterpret


bits_of_float32 = _reinterpretation(types.float32, types.uint32)
float32_of_bits = _reinterpretation(types.uint32, types.float32)
bits_of_float64 = _reinterpretation(types.float64, types.uint64)
float64_of_bits = _reinterpretation(types.uint64, types.float64)


# What the loops of cpu_blocks.py take: ten numbers and addresses, two factors.
LOOP_SIGNATURE = types.int64(*[types.int64] * 10, types.float64, types.float64)


@intrinsic  # type: ignore[untyped-decorator]
def call_loop(_typing: Any, _address: Any, *_arguments: Any) -> Any:
    """Call the function with LOOP_SIGNATURE that is at an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, packed = arguments
        types_of_arguments = [context.get_value_type(one) for one in LOOP_SIGNATURE.args]
        function_type = ir.FunctionType(context.get_value_type(LOOP_SIGNATURE.return_type), types_of_arguments)
        function = builder.inttoptr(address, function_type.as_pointer())
        return builder.call(function, cgutils.unpack_tuple(builder, packed, len(types_of_arguments)))

    return LOOP_SIGNATURE.return_type(types.int64, types.Tuple(LOOP_SIGNATURE.args)), generate
