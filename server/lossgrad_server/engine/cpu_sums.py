"""Sums in a fixed order: lanes folded in half, and sums that keep what rounding loses."""

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
    """Return the sum over a divisor, and what rounding lost of that."""
    quotient = total / divisor
    if not np.isfinite(quotient) or np.isinf(divisor):
        return quotient, 0.0
    remainder = fused_multiply_add(-quotient, divisor, total) + lost
    return quotient, remainder / divisor


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
