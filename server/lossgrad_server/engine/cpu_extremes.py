"""The least and the greatest of a spec's losses, times their weights; only for jobs that want totals.

Masked elements and NaN are left out. As in the sums, each lane has its own, and a chunk with NaN or infinity is done again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_blocks import clamp
from lossgrad_server.engine.cpu_intrinsics import array_at, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    LANES,
    MASK,
    SCRATCH_DIFFERENCE,
    SCRATCH_EXTREMES,
    SCRATCH_LOSS,
    SCRATCH_MASK,
    SCRATCH_WEIGHT,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_tables import frame_at, job_of, spec_of, state_of


@inlined
def _lanes_of(frame: Any, index: Any) -> Any:
    """Return the lanes of the least losses and, behind them, those of the greatest."""
    first = frame.scratch + SCRATCH_EXTREMES + index * 16 * LANES
    return array_at(first, LANES, np.float64), array_at(first + 8 * LANES, LANES, np.float64)


@native("int64(int64, int64)")
def clear_extremes(address: int, index: int) -> int:
    """Begin with a chunk."""
    least, greatest = _lanes_of(frame_at(address), index)
    for j in range(LANES):
        least[j] = np.inf
        greatest[j] = -np.inf
    return 0


@inlined
def _loss(spec: Any, d: Any) -> Any:
    """Return a finite difference's loss times the spec's divisor."""
    p = clamp(d * spec.scale * spec.second_scale, spec.limit)
    return abs(p * fused_multiply_add(-spec.half, p, d))


@inlined
def _take(least: Any, greatest: Any, j: Any, term: Any, is_taken: Any) -> None:
    least[j] = term if is_taken and term < least[j] else least[j]
    greatest[j] = term if is_taken and term > greatest[j] else greatest[j]


@native("int64(int64, int64, int64)")
def add_extremes(address: int, index: int, count: int) -> int:
    """Take in a block, from its differences, weights and mask in scratch memory: all of them finite.

    Without weights, a loss is the least or the greatest where the difference is: one look at those is enough for all
    specs, and is taken for the first.
    """
    frame = frame_at(address)
    job = job_of(frame)
    spec = spec_of(frame, index)
    least, greatest = _lanes_of(frame, index)
    has_mask, is_weighted = job.types[MASK] != 0, job.is_weighted != 0
    if index > 0 and not is_weighted:
        return 0
    for row in range(0, count, LANES):
        width = min(LANES, count - row)
        differences = array_at(frame.scratch + SCRATCH_DIFFERENCE + 8 * row, width, np.float64)
        weights = array_at(frame.scratch + SCRATCH_WEIGHT + 8 * row, width, np.float64)
        mask = array_at(frame.scratch + SCRATCH_MASK + row, width, np.uint8)
        if is_weighted and has_mask:
            for j in range(width):
                _take(least, greatest, j, _loss(spec, differences[j]) * weights[j], mask[j] != 0)
        elif is_weighted:
            for j in range(width):
                _take(least, greatest, j, _loss(spec, differences[j]) * weights[j], True)
        elif has_mask:
            for j in range(width):
                _take(least, greatest, j, abs(differences[j]), mask[j] != 0)
        else:
            for j in range(width):
                _take(least, greatest, j, abs(differences[j]), True)
    return 0


@native("int64(int64, int64, int64, int64, int64)")
def store_extremes(address: int, index: int, is_special: int, least_at: int, greatest_at: int) -> int:
    """Put a chunk's extremes in the state: none yet where it `is_special`, and to be done again."""
    frame = frame_at(address)
    spec = spec_of(frame, index)
    is_weighted = job_of(frame).is_weighted != 0
    least, greatest = _lanes_of(frame, index if is_weighted else 0)
    low, high = np.inf, -np.inf
    if not is_special:
        for j in range(LANES):
            low = min(low, least[j])
            high = max(high, greatest[j])
    if low <= high:  # there is an element
        if not is_weighted:
            low, high = _loss(spec, low), _loss(spec, high)
        # Dividing by a positive number keeps their order.
        low, high = low / spec.divisor, high / spec.divisor
    # A weight may be negative, and -0.0 and 0.0 are one number.
    state_of(frame, least_at, 1)[0] = low + 0.0
    state_of(frame, greatest_at, 1)[0] = high + 0.0
    return 0


@native("int64(int64, int64, int64, int64, int64)")
def add_special_extremes(address: int, index: int, count: int, least_at: int, greatest_at: int) -> int:
    """Take in a block of which anything may be NaN or infinite, from its losses in scratch memory, to the state."""
    frame = frame_at(address)
    divisor = spec_of(frame, index).divisor
    has_mask = job_of(frame).types[MASK] != 0
    losses = array_at(frame.scratch + SCRATCH_LOSS, count, np.float64)
    mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
    least, greatest = state_of(frame, least_at, 1), state_of(frame, greatest_at, 1)
    for j in range(count):
        term = losses[j] / divisor + 0.0
        if not has_mask or mask[j] != 0:
            least[0] = term if term < least[0] else least[0]
            greatest[0] = term if term > greatest[0] else greatest[0]
    return 0
