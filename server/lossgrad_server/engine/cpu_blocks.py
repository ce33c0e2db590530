"""A block of differences: the loops for weights and for float64. And all loops by their numbers, and how they are called.

The formula is that of cpu_formulas.py; cpu_singles.py has the loops for float32 without weights. None of them leaves the
compiler a choice that could change a bit: no reassociation, no contraction, the lanes of the sums laid out by hand. The
`full` loops do all there is: weights, and losses and gradients as float64, from where they are then stored in any type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_intrinsics import LOOP_SIGNATURE, array_at, call_loop, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    LANES,
    SCRATCH_WEIGHT,
    SPEC,
    Loop,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_singles import SINGLES
from lossgrad_server.engine.cpu_sums import two_sum
from lossgrad_server.engine.cpu_vectors import (
    STREAM_ALIGNMENT,
    WIDTH,
    absolute,
    add,
    clamped,
    fused,
    inside_or_edge,
    load_float64x8,
    multiply,
    splat,
    store_float64x8,
    stream_float64x8,
    subtract,
)

_VECTOR = 8 * WIDTH  # bytes


@inlined
def clamp(value: Any, limit: Any) -> Any:
    """Return the value, but at most `limit` and at least `-limit`; NaN stays NaN."""
    upper = limit if value > limit else value
    return -limit if upper < -limit else upper


@inlined
def _add_full(total: Any, place: Any, addresses: Any, vectors: Any) -> Any:
    """Do all there is for eight elements, and return `total` plus their losses, times their weights."""
    first, weights, scales, gradients, losses = addresses
    limit, minus_limit, minus_half, factor = vectors
    d = load_float64x8(first + 8 * place)
    p = clamped(d, limit, minus_limit)
    store_float64x8(gradients + 8 * place, multiply(multiply(p, factor), load_float64x8(scales + 8 * place)))
    # The absolute value, because the loss of -0.0 would be -0.0.
    loss = multiply(absolute(multiply(p, fused(minus_half, p, d))), load_float64x8(weights + 8 * place))
    store_float64x8(losses + 8 * place, loss)
    return add(total, loss)


@native(LOOP_SIGNATURE, "full")
def _full_loop(count: int, first: int, _second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
               _lost: int, record: int, factor: float, _edge: float) -> int:  # fmt: skip
    """Do all there is for differences in float32: weights, and losses and gradients as float64.

    Losses are written times their weights and the spec's divisor. All that is read and written is scratch memory, with
    room for a whole row: what lies behind the last element becomes 0 first.
    """
    limit = array_at(record, 1, SPEC)[0].limit
    rows = (count + LANES - 1) // LANES
    for address in (first, weights, scales):
        rest = array_at(address + 8 * count, rows * LANES - count, np.float64)
        for j in range(rows * LANES - count):
            rest[j] = 0.0
    addresses = (first, weights, scales, gradients, losses)
    vectors = (splat(limit), splat(-limit), splat(-0.5), splat(factor))
    sum0, sum1 = load_float64x8(lanes), load_float64x8(lanes + _VECTOR)
    sum2, sum3 = load_float64x8(lanes + 2 * _VECTOR), load_float64x8(lanes + 3 * _VECTOR)
    for i in range(0, rows * LANES, LANES):
        sum0 = _add_full(sum0, i, addresses, vectors)
        sum1 = _add_full(sum1, i + WIDTH, addresses, vectors)
        sum2 = _add_full(sum2, i + 2 * WIDTH, addresses, vectors)
        sum3 = _add_full(sum3, i + 3 * WIDTH, addresses, vectors)
    store_float64x8(lanes, sum0)
    store_float64x8(lanes + _VECTOR, sum1)
    store_float64x8(lanes + 2 * _VECTOR, sum2)
    store_float64x8(lanes + 3 * _VECTOR, sum3)
    return 0


@inlined
def _add_float64(total: Any, lost: Any, j: Any, arrays: Any, spec: Any, has_gradient: Any, is_full: Any) -> Any:
    """Compute one element and return `total` plus its loss, and `lost` plus what that lost."""
    differences, weights, scales, gradients, losses = arrays
    limit, scale, second_scale, half, factor, edge = spec
    d = differences[j]
    p = clamp(d * scale * second_scale, limit)
    if has_gradient:
        # At the limit the gradient is `edge` itself, not what rounding makes of limit * factor.
        value = p * factor if abs(p) < limit else (edge if p > 0 else -edge)
        gradients[j] = value * scales[j] if is_full else value
    loss = abs(p * fused_multiply_add(-half, p, d))
    if is_full:
        loss = loss * weights[j]
        losses[j] = loss
    total, error = two_sum(total, loss)
    return total, lost + error


@inlined
def _add_float64x8(total: Any, lost: Any, place: Any, addresses: Any, vectors: Any, flags: Any) -> Any:
    """Do what `_add_float64` does, for the eight elements from `place` on."""
    has_gradient, is_full, streams = flags
    first, weights, scales, gradients, losses = addresses
    limit, minus_limit, scale, second_scale, minus_half, factor, edge, minus_edge = vectors
    d = load_float64x8(first + 8 * place)
    p = clamped(multiply(multiply(d, scale), second_scale), limit, minus_limit)
    if has_gradient:
        value = inside_or_edge(p, limit, multiply(p, factor), edge, minus_edge)
        if is_full:
            value = multiply(value, load_float64x8(scales + 8 * place))
        if streams:
            stream_float64x8(gradients + 8 * place, value)
        else:
            store_float64x8(gradients + 8 * place, value)
    loss = absolute(multiply(p, fused(minus_half, p, d)))
    if is_full:
        loss = multiply(loss, load_float64x8(weights + 8 * place))
        store_float64x8(losses + 8 * place, loss)
    # two_sum
    result = add(total, loss)
    part = subtract(result, total)
    error = add(subtract(total, subtract(result, part)), subtract(loss, part))
    return result, add(lost, error)


def _float64_loop(name: str, *, has_gradient: bool = False, is_full: bool = False, streams: bool = False) -> Any:
    """Make a loop for differences in float64. Its sums are compensated: each lane is a float64 and what it lost."""

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, _second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
             lost: int, record: int, factor: float, edge: float) -> int:  # fmt: skip
        own = array_at(record, 1, SPEC)[0]
        spec = (own.limit, own.scale, own.second_scale, own.half, factor, edge)
        vectors = (
            splat(own.limit), splat(-own.limit), splat(own.scale), splat(own.second_scale), splat(-own.half),
            splat(factor), splat(edge), splat(-edge),
        )  # fmt: skip
        addresses = (first, weights, scales, gradients, losses)
        whole = count // LANES * LANES
        is_streaming = streams and gradients % STREAM_ALIGNMENT == 0
        high0, high1 = load_float64x8(lanes), load_float64x8(lanes + _VECTOR)
        high2, high3 = load_float64x8(lanes + 2 * _VECTOR), load_float64x8(lanes + 3 * _VECTOR)
        low0, low1 = load_float64x8(lost), load_float64x8(lost + _VECTOR)
        low2, low3 = load_float64x8(lost + 2 * _VECTOR), load_float64x8(lost + 3 * _VECTOR)
        flags = (has_gradient, is_full, is_streaming)
        for i in range(0, whole, LANES):
            high0, low0 = _add_float64x8(high0, low0, i, addresses, vectors, flags)
            high1, low1 = _add_float64x8(high1, low1, i + WIDTH, addresses, vectors, flags)
            high2, low2 = _add_float64x8(high2, low2, i + 2 * WIDTH, addresses, vectors, flags)
            high3, low3 = _add_float64x8(high3, low3, i + 3 * WIDTH, addresses, vectors, flags)
        store_float64x8(lanes, high0)
        store_float64x8(lanes + _VECTOR, high1)
        store_float64x8(lanes + 2 * _VECTOR, high2)
        store_float64x8(lanes + 3 * _VECTOR, high3)
        store_float64x8(lost, low0)
        store_float64x8(lost + _VECTOR, low1)
        store_float64x8(lost + 2 * _VECTOR, low2)
        store_float64x8(lost + 3 * _VECTOR, low3)
        arrays = (
            array_at(first, count, np.float64),
            array_at(weights, count, np.float64),
            array_at(scales, count, np.float64),
            array_at(gradients, count, np.float64),
            array_at(losses, count, np.float64),
        )
        totals = array_at(lanes, LANES, np.float64)
        errors = array_at(lost, LANES, np.float64)
        for i in range(whole, count):
            totals[i - whole], errors[i - whole] = _add_float64(
                totals[i - whole], errors[i - whole], i, arrays, spec, has_gradient, is_full
            )
        return 0

    return loop


_LOOP_COUNT = len(Loop)
_LOOPS = SINGLES | {
    Loop.FULL: _full_loop,
    Loop.FLOAT64_PLAIN: _float64_loop("float64_plain"),
    Loop.FLOAT64_GRADIENT: _float64_loop("float64_gradient", has_gradient=True),
    Loop.FLOAT64_STREAMED_GRADIENT: _float64_loop("float64_streamed_gradient", has_gradient=True, streams=True),
    Loop.FLOAT64_FULL: _float64_loop("float64_full", has_gradient=True, is_full=True),
}
# By their number in cpu_layout.Loop.
LOOPS = tuple(_LOOPS[loop] for loop in Loop)


@inlined
def run_loop(frame: Any, loop: Any, count: Any, first: Any, second: Any, scales: Any, gradients: Any, losses: Any,
             lanes: Any, lost: Any, record: Any, factor: Any, edge: Any) -> None:  # fmt: skip
    """Run one of LOOPS. Everything but `scales`, an offset in scratch memory, and the last two is an address."""
    address = array_at(frame.loops, _LOOP_COUNT, np.int64)[loop]
    weights = frame.scratch + SCRATCH_WEIGHT
    own_scales = frame.scratch + scales
    call_loop(address, count, first, second, weights, own_scales, gradients, losses, lanes, lost, record, factor, edge)
