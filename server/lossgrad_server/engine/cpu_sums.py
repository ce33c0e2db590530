"""Sums in a fixed order: lanes folded in half, and sums that keep what rounding loses. Exact ones: cpu_exact.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_intrinsics import array_at, fused_multiply_add
from lossgrad_server.engine.cpu_layout import LANES
from lossgrad_server.engine.cpu_native import inlined, native


@inlined
def two_sum(a: Any, b: Any) -> Any:
    """Return a + b and what rounding lost of it, exactly. Source: Knuth, TAOCP 2, 4.2.2, theorem B."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@inlined
def compensated(total: Any, lost: Any) -> Any:
    """Return a sum with what it lost added. What an infinite sum lost is NaN and is left out."""
    return total + lost if np.isfinite(total) else total


@inlined
def divided(total: Any, lost: Any, divisor: Any) -> Any:
    """Return a sum, with what it lost, over a divisor, rounded about once."""
    quotient = total / divisor
    if not np.isfinite(quotient) or np.isinf(divisor):
        return quotient
    remainder = fused_multiply_add(-quotient, divisor, total) + lost
    return quotient + remainder / divisor


@native("int64(int64, int64, int64)")
def clear(lanes: int, lost: int, count: int) -> int:
    """Set the lanes that `count` elements use to 0."""
    width = min(LANES, count)
    values = array_at(lanes, width, np.float64)
    errors = array_at(lost, width, np.float64)
    for j in range(width):
        values[j] = 0.0
        errors[j] = 0.0
    return 0


@inlined
def _width(count: Any) -> Any:
    """Return the smallest power of two that holds `count` lanes.

    Lanes beyond `count` would add 0, so leaving them out changes nothing.
    """
    width = LANES
    while width >= 2 * count and width > 1:
        width >>= 1
    return width


@native("float64(int64, int64)")
def fold(lanes: int, count: int) -> float:
    """Sum the lanes that `count` elements used, adding the upper half to the lower until one is left. Overwrites them."""
    used = min(LANES, count)
    width = _width(used)
    values = array_at(lanes, LANES, np.float64)
    for j in range(used, width):
        values[j] = 0.0
    while width > 1:
        width >>= 1
        lower = array_at(lanes, width, np.float64)
        upper = array_at(lanes + 8 * width, width, np.float64)
        for j in range(width):
            lower[j] += upper[j]
    return values[0]


@native("float64(int64, int64, int64)")
def fold_compensated(lanes: int, lost: int, count: int) -> float:
    """Sum lanes and what they lost in the same order as `fold`, rounded once at the end. Overwrites them."""
    used = min(LANES, count)
    width = _width(used)
    values = array_at(lanes, LANES, np.float64)
    errors = array_at(lost, LANES, np.float64)
    for j in range(used, width):
        values[j] = 0.0
        errors[j] = 0.0
    while width > 1:
        width >>= 1
        for j in range(width):
            total, error = two_sum(values[j], values[j + width])
            values[j] = total
            errors[j] = (errors[j] + errors[j + width]) + error
    return compensated(values[0], errors[0])


@native("int64(int64, int64, int64, int64)")
def add_compensated(values: int, count: int, lanes: int, lost: int) -> int:
    """Add float64 values to the lanes and keep what that loses. `values`, `lanes` and `lost` are addresses."""
    high = array_at(lanes, LANES, np.float64)
    low = array_at(lost, LANES, np.float64)
    for row in range(0, count, LANES):
        width = min(LANES, count - row)
        own = array_at(values + 8 * row, width, np.float64)
        for j in range(width):
            total, error = two_sum(high[j], own[j])
            high[j] = total
            low[j] += error
    return 0


@native("int64(int64, int64, int64, int64)")
def fold_rows(sums: int, lost: int, rows: int, width: int) -> int:
    """Sum `rows` rows of `width` lanes and what they lost: the upper half of the rows to the lower, until one is left."""
    half = 1
    while 2 * half < rows:
        half *= 2
    while rows > 1:
        count = (rows - half) * width
        lower = array_at(sums, count, np.float64)
        upper = array_at(sums + 8 * half * width, count, np.float64)
        lower_error = array_at(lost, count, np.float64)
        upper_error = array_at(lost + 8 * half * width, count, np.float64)
        for index in range(count):
            total, error = two_sum(lower[index], upper[index])
            lower[index] = total
            lower_error[index] = (lower_error[index] + upper_error[index]) + error
        rows = half
        half //= 2
    return 0


@native("int64(int64, int64, int64, int64, int64)")
def fold_runs(values: int, run_count: int, length: int, sums: int, lost: int) -> int:
    """Sum runs of `length` values that lie one behind the other, each by adding its upper half to its lower.

    Leaves `run_count` sums and what they lost at `sums` and `lost`, where there is room for all the values.
    """
    source = array_at(values, run_count * length, np.float64)
    error = array_at(lost, run_count * length, np.float64)
    # First the runs' first values, then their second: so one addition adds the same lanes of all runs.
    for k in range(length):
        lane = array_at(sums + 8 * k * run_count, run_count, np.float64)
        for run in range(run_count):
            lane[run] = source[run * length + k]
    for index in range(run_count * length):
        error[index] = 0.0
    fold_rows(sums, lost, length, run_count)
    return 0


@native("int64(int64, int64, int64, int64, int64)")
def add_sums(sums: int, lost: int, more: int, more_lost: int, count: int) -> int:
    """Add sums with what they lost to others. An infinite sum loses nothing."""
    total = array_at(sums, count, np.float64)
    error = array_at(lost, count, np.float64)
    other = array_at(more, count, np.float64)
    other_error = array_at(more_lost, count, np.float64)
    for index in range(count):
        total[index], own = two_sum(total[index], other[index])
        error[index] += other_error[index] + own
    return 0


@native("int64(int64, int64, int64, int64)")
def add_each(sums: int, lost: int, values: int, count: int) -> int:
    """Add values to as many sums, and keep what that loses."""
    total = array_at(sums, count, np.float64)
    error = array_at(lost, count, np.float64)
    own = array_at(values, count, np.float64)
    for index in range(count):
        total[index], lost_now = two_sum(total[index], own[index])
        error[index] += lost_now
    return 0


@native("int64(int64, int64, int64)")
def clear_all(sums: int, lost: int, count: int) -> int:
    """Set sums, and what they lost, to 0."""
    total = array_at(sums, count, np.float64)
    error = array_at(lost, count, np.float64)
    for index in range(count):
        total[index] = 0.0
        error[index] = 0.0
    return 0
