"""Exact sums of float64 numbers, in Python: whatever the order of the terms, and however they are grouped, the same bits.

A sum is written as work.SpecTotal has it: the float64 nearest to it, the one nearest to what that leaves, and so on. What
the kernels do with machine code (cpu_exact.py) is held against this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction


def exact_sum(terms: Iterable[float]) -> tuple[float, ...]:
    """Return the sum of the terms: no numbers for 0, one infinity beyond float64, one NaN where that is the sum."""
    terms = list(terms)
    if not math.isfinite(sum(terms)):
        special = [term for term in terms if not math.isfinite(term)]
        if special:
            infinity = sum(special)
            return (math.nan if math.isnan(infinity) else infinity,)
    partials: list[float] = []
    try:
        while total := math.fsum(terms):
            partials.append(total)
            terms.append(-total)
    except OverflowError:
        return _by_fractions(terms[: len(terms) - len(partials)])
    return tuple(partials)


def rounded(partials: tuple[float, ...]) -> float:
    """Return the float64 nearest to an exact sum."""
    return partials[0] if partials else 0.0


def quotient(partials: tuple[float, ...], divisor: float) -> float:
    """Return an exact sum over a divisor, rounded about once: the same bits as cpu_exact.quotient."""
    high, low, *_ = *partials, 0.0, 0.0
    result = _divided(high, divisor)
    # Not by 1: the sum is the nearest already, and adding the rest again would round a tie the other way.
    if divisor != 1.0 and math.isfinite(result) and not math.isinf(divisor):
        # What the first division left, rounded once, as a fused multiply-add has it.
        rest = float(Fraction(high) - Fraction(result) * Fraction(divisor))
        result += _divided(rest + low, divisor)
    return math.nan if math.isnan(result) else result


def _divided(dividend: float, divisor: float) -> float:
    """Return a quotient as IEEE 754 has it; Python raises where the divisor is 0."""
    if divisor:
        return dividend / divisor
    return dividend * math.copysign(math.inf, divisor) if dividend else math.nan


def _by_fractions(terms: list[float]) -> tuple[float, ...]:
    """Return the sum of finite terms some of which add up to more than a float64 holds."""
    left = sum(map(Fraction, terms), Fraction())
    partials: list[float] = []
    while left:
        try:
            partials.append(float(left))
        except OverflowError:
            return (math.inf if left > 0 else -math.inf,)
        left -= Fraction(partials[-1])
    return tuple(partials)
