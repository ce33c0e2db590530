"""A block of elements: from its differences to its losses and gradients, added to the lanes of its sums.

The formula is that of cpu_formulas.py. These are the loops that must be fast. The compiler turns all of them into vector
instructions, and none of them leaves it a choice that could change a bit: no reassociation, no contraction, the lanes of
the sums laid out by hand. `plain` loops do the common work and no more; the `full` ones do all there is: weights, and
losses and gradients as float64, from where they are then stored in any type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float64

from lossgrad_server.engine.cpu_intrinsics import LOOP_SIGNATURE, array_at, call_loop, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    LANES,
    ROWS,
    SCRATCH_WEIGHT,
    SPEC,
    Loop,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_sums import two_sum


@inlined
def clamp(value: Any, limit: Any) -> Any:
    """Return the value, but at most `limit` and at least `-limit`; NaN stays NaN."""
    upper = limit if value > limit else value
    return -limit if upper < -limit else upper


@inlined
def _add_float32(total: Any, j: Any, arrays: Any, spec: Any, factor: Any, is_pair: Any, has_gradient: Any,
                 has_loss: Any, is_full: Any) -> Any:  # fmt: skip
    """Compute one element and return `total` plus its loss. The flags are constants once this is inlined."""
    first, second, weights, scales, gradients, losses = arrays
    d = float64(first[j] - second[j]) if is_pair else float64(first[j])
    p = clamp(d, spec[0])
    if has_gradient:
        gradients[j] = p * factor * scales[j] if is_full else p * factor
    rest = fused_multiply_add(-0.5, p, d)
    if is_full:
        # abs, because the loss of -0.0 would be -0.0
        loss = abs(p * rest) * weights[j]
        losses[j] = loss
        return total + loss
    if has_loss:
        losses[j] = abs(p * rest) * spec[1]
    return fused_multiply_add(p, rest, total)


def _float32_loop(
    name: str, *, is_pair: bool = False, gradient: Any = None, has_loss: bool = False, is_full: bool = False
) -> Any:
    """Make a loop for differences in float32, computed with and summed in float64.

    `is_pair`: it subtracts two float32 arrays itself, and writes losses as they are, in float32; otherwise the first
    array holds the differences, as float64. `gradient` is the type that it writes gradients in, if it does. `is_full`:
    there are weights, and losses are written as float64, times the weight and the spec's divisor.
    """
    has_gradient = gradient is not None
    types = (np.float32 if is_pair else np.float64, gradient or np.float64, np.float32 if is_pair else np.float64)
    source_type, gradient_type, loss_type = types
    source_bytes, gradient_bytes, loss_bytes = (LANES * np.dtype(one).itemsize for one in types)
    weight_bytes = LANES * 8

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
             _lost: int, record: int, factor: float, _edge: float) -> int:  # fmt: skip
        spec = (array_at(record, 1, SPEC)[0].limit, array_at(record, 1, SPEC)[0].inverse_divisor)
        sums = array_at(lanes, LANES, np.float64)
        row = 0
        while row * LANES < count:
            # ROWS rows of LANES at once keep their sum in a register; what is left goes row by row.
            whole = count - row * LANES >= ROWS * LANES
            width = ROWS * LANES if whole else min(LANES, count - row * LANES)
            arrays = (
                array_at(first + row * source_bytes, width, source_type),
                array_at(second + row * source_bytes, width, source_type),
                array_at(weights + row * weight_bytes, width, np.float64),
                array_at(scales + row * weight_bytes, width, np.float64),
                array_at(gradients + row * gradient_bytes, width, gradient_type),
                array_at(losses + row * loss_bytes, width, loss_type),
            )
            if whole:
                for j in range(LANES):
                    total = sums[j]
                    for step in range(ROWS):
                        k = j + step * LANES
                        total = _add_float32(total, k, arrays, spec, factor, is_pair, has_gradient, has_loss, is_full)
                    sums[j] = total
                row += ROWS
            else:
                for j in range(width):
                    sums[j] = _add_float32(sums[j], j, arrays, spec, factor, is_pair, has_gradient, has_loss, is_full)
                row += 1
        return 0

    return loop


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


def _float64_loop(name: str, *, has_gradient: bool = False, is_full: bool = False) -> Any:
    """Make a loop for differences in float64. Its sums are compensated: each lane is a float64 and what it lost."""

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, _second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
             lost: int, record: int, factor: float, edge: float) -> int:  # fmt: skip
        own = array_at(record, 1, SPEC)[0]
        spec = (own.limit, own.scale, own.second_scale, own.half, factor, edge)
        high = array_at(lanes, LANES, np.float64)
        low = array_at(lost, LANES, np.float64)
        row = 0
        while row < count:
            whole = count - row >= ROWS * LANES
            width = ROWS * LANES if whole else min(LANES, count - row)
            arrays = (
                array_at(first + 8 * row, width, np.float64),
                array_at(weights + 8 * row, width, np.float64),
                array_at(scales + 8 * row, width, np.float64),
                array_at(gradients + 8 * row, width, np.float64),
                array_at(losses + 8 * row, width, np.float64),
            )
            for j in range(min(LANES, width)):
                total, error = high[j], low[j]
                if whole:
                    for step in range(ROWS):
                        total, error = _add_float64(total, error, j + step * LANES, arrays, spec, has_gradient, is_full)
                else:
                    total, error = _add_float64(total, error, j, arrays, spec, has_gradient, is_full)
                high[j] = total
                low[j] = error
            row += width
        return 0

    return loop


_LOOP_COUNT = len(Loop)

# By their number in cpu_layout.Loop.
LOOPS = (
    _float32_loop("pair", is_pair=True),
    _float32_loop("pair_gradient", is_pair=True, gradient=np.float32),
    _float32_loop("pair_loss", is_pair=True, has_loss=True),
    _float32_loop("pair_loss_gradient", is_pair=True, gradient=np.float32, has_loss=True),
    _float32_loop("plain"),
    _float32_loop("plain_gradient", gradient=np.float32),
    _float32_loop("plain_wide_gradient", gradient=np.float64),
    _float32_loop("full", gradient=np.float64, is_full=True),
    _float64_loop("float64_plain"),
    _float64_loop("float64_gradient", has_gradient=True),
    _float64_loop("float64_full", has_gradient=True, is_full=True),
)


@inlined
def run_loop(frame: Any, loop: Any, count: Any, first: Any, second: Any, scales: Any, gradients: Any, losses: Any,
             lanes: Any, lost: Any, record: Any, factor: Any, edge: Any) -> None:  # fmt: skip
    """Run one of LOOPS. Everything but `scales`, an offset in scratch memory, and the last two is an address."""
    address = array_at(frame.loops, _LOOP_COUNT, np.int64)[loop]
    weights = frame.scratch + SCRATCH_WEIGHT
    own_scales = frame.scratch + scales
    call_loop(address, count, first, second, weights, own_scales, gradients, losses, lanes, lost, record, factor, edge)
