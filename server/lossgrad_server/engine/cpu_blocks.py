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
def _add(total: Any, j: Any, arrays: Any, limit: Any, factor: Any, is_pair: Any, has_gradient: Any, writes_loss: Any,
         is_full: Any) -> Any:  # fmt: skip
    """Compute one element and return `total` plus its loss. The flags are constants once this is inlined."""
    first, second, weights, scales, gradients, losses = arrays
    d = float64(first[j] - second[j]) if is_pair else float64(first[j])
    p = clamp(d, limit)
    if has_gradient:
        gradients[j] = p * factor * scales[j] if is_full else p * factor
    rest = fused_multiply_add(-0.5, p, d)
    if not writes_loss:
        return fused_multiply_add(p, rest, total)
    # abs, because the loss of -0.0 would be -0.0
    loss = abs(p * rest) * weights[j] if is_full else abs(p * rest)
    losses[j] = loss
    return total + loss


def _float32_loop(
    name: str, *, is_pair: bool = False, gradient: Any = None, writes_loss: bool = False, is_full: bool = False
) -> Any:
    """Make a loop for differences in float32, computed with and summed in float64.

    `is_pair`: it subtracts two float32 arrays itself; otherwise the first holds the differences, as float64. `gradient`
    is the type that it writes gradients in, if it does.
    """
    # numba's cache tells these loops apart by what they refer to here, which must be plain values for that.
    has_gradient = gradient is not None
    gradient_type = gradient or np.float64
    source_type = np.float32 if is_pair else np.float64
    source_bytes = LANES * np.dtype(source_type).itemsize
    gradient_bytes = LANES * np.dtype(gradient_type).itemsize
    float64_bytes = LANES * 8

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
             _lost: int, record: int, factor: float, _edge: float) -> int:  # fmt: skip
        limit = array_at(record, 1, SPEC)[0].limit
        sums = array_at(lanes, LANES, np.float64)
        row = 0
        while row * LANES < count:
            # ROWS rows of LANES at once keep their sum in a register; what is left goes row by row.
            whole = count - row * LANES >= ROWS * LANES
            width = ROWS * LANES if whole else min(LANES, count - row * LANES)
            arrays = (
                array_at(first + row * source_bytes, width, source_type),
                array_at(second + row * source_bytes, width, source_type),
                array_at(weights + row * float64_bytes, width, np.float64),
                array_at(scales + row * float64_bytes, width, np.float64),
                array_at(gradients + row * gradient_bytes, width, gradient_type),
                array_at(losses + row * float64_bytes, width, np.float64),
            )
            if whole:
                for j in range(LANES):
                    total = _add(sums[j], j, arrays, limit, factor, is_pair, has_gradient, writes_loss, is_full)
                    for row_of_four in range(1, ROWS):
                        k = j + row_of_four * LANES
                        total = _add(total, k, arrays, limit, factor, is_pair, has_gradient, writes_loss, is_full)
                    sums[j] = total
                row += ROWS
            else:
                for j in range(width):
                    sums[j] = _add(sums[j], j, arrays, limit, factor, is_pair, has_gradient, writes_loss, is_full)
                row += 1
        return 0

    return loop


def _float64_loop(name: str, has_gradient: bool, is_full: bool) -> Any:
    """Make a loop for differences in float64. Its sums are compensated: each lane is a float64 and what it lost."""

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, _second: int, weights: int, scales: int, gradients: int, losses: int, lanes: int,
             lost: int, record: int, factor: float, edge: float) -> int:  # fmt: skip
        spec = array_at(record, 1, SPEC)[0]
        limit, scale, second_scale, half = spec.limit, spec.scale, spec.second_scale, spec.half
        high = array_at(lanes, LANES, np.float64)
        low = array_at(lost, LANES, np.float64)
        for row in range(0, count, LANES):
            width = min(LANES, count - row)
            d = array_at(first + 8 * row, width, np.float64)
            w = array_at(weights + 8 * row, width, np.float64)
            s = array_at(scales + 8 * row, width, np.float64)
            g = array_at(gradients + 8 * row, width, np.float64)
            out = array_at(losses + 8 * row, width, np.float64)
            for j in range(width):
                p = clamp(d[j] * scale * second_scale, limit)
                if has_gradient:
                    # At the limit the gradient is `edge` itself, not what rounding makes of limit * factor.
                    value = p * factor if abs(p) < limit else (edge if p > 0 else -edge)
                    g[j] = value * s[j] if is_full else value
                loss = abs(p * fused_multiply_add(-half, p, d[j]))
                if is_full:
                    loss = loss * w[j]
                    out[j] = loss
                total, error = two_sum(high[j], loss)
                high[j] = total
                low[j] += error
        return 0

    return loop


_LOOP_COUNT = len(Loop)

# By their number in cpu_layout.Loop.
LOOPS = (
    _float32_loop("pair", is_pair=True),
    _float32_loop("pair_gradient", is_pair=True, gradient=np.float32),
    _float32_loop("pair_loss", is_pair=True, writes_loss=True),
    _float32_loop("pair_loss_gradient", is_pair=True, gradient=np.float32, writes_loss=True),
    _float32_loop("plain"),
    _float32_loop("plain_gradient", gradient=np.float32),
    _float32_loop("plain_wide_gradient", gradient=np.float64),
    _float32_loop("full", gradient=np.float64, writes_loss=True, is_full=True),
    _float64_loop("float64_plain", False, False),
    _float64_loop("float64_gradient", True, False),
    _float64_loop("float64_full", True, True),
)


@inlined
def run_loop(frame: Any, loop: Any, count: Any, first: Any, second: Any, scales: Any, gradients: Any, losses: Any,
             lanes: Any, lost: Any, record: Any, factor: Any, edge: Any) -> None:  # fmt: skip
    """Run one of LOOPS. Everything but `scales`, an offset in scratch memory, and the last two is an address."""
    address = array_at(frame.loops, _LOOP_COUNT, np.int64)[loop]
    weights = frame.scratch + SCRATCH_WEIGHT
    own_scales = frame.scratch + scales
    call_loop(address, count, first, second, weights, own_scales, gradients, losses, lanes, lost, record, factor, edge)
