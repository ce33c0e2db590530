"""Exact sums of float64 numbers: the same value, and the same bytes, for any order and any grouping of what was added.

A sum is held as one whole number of the smallest float64 unit, 2^-1074, of which every finite float64 is a multiple. So
adding is adding whole numbers: nothing is rounded before a sum is asked for its value. On the wire it is a few float64
numbers (`ExactSum.partials`), which are a function of the value alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

_UNIT_EXPONENT: Final = 1074  # the smallest float64 above 0 is 2^-1074
_UNITS: Final = 1 << _UNIT_EXPONENT
_LARGEST: Final = int(sys.float_info.max)

# How far beyond float64 a sum is still held exactly, so that large numbers of both signs may come in any order.
_MAX_UNITS: Final = 16 * _LARGEST << _UNIT_EXPONENT

# The most partials of a sum: 16 times the largest float64, and 40 that do not overlap (2098 bits of 53 each).
MAX_PARTIALS: Final = 64


class ExactSum:
    """The exact sum of float64 numbers. Immutable; equal sums are equal values, however they came about.

    A NaN among the numbers makes it NaN, and so do infinities of both signs; one infinity makes it that infinity. A sum
    of more than 16 times the largest float64 counts as infinite.
    """

    __slots__ = ("_special", "_units")

    def __init__(self, values: Iterable[float] = ()) -> None:
        units = 0
        special = 0.0
        for value in values:
            if math.isfinite(value):
                units += _to_units(value)
            else:
                special += value
        self._set(units, special)

    def _set(self, units: int, special: float) -> None:
        if not special and abs(units) > _MAX_UNITS:
            special = math.inf if units > 0 else -math.inf
        self._units = 0 if special else units
        # There is one NaN: which of its many bit patterns arithmetic gives depends on the operands' order.
        self._special = math.nan if math.isnan(special) else special

    def __add__(self, other: ExactSum) -> ExactSum:
        """Return the sum of both."""
        result = ExactSum.__new__(ExactSum)
        result._set(self._units + other._units, self._special + other._special)
        return result

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same value; NaN equals NaN here, as equal states must."""
        if not isinstance(other, ExactSum):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[int, str]:
        return self._units, repr(self._special)

    def __repr__(self) -> str:
        return f"ExactSum({list(self.partials)})"

    @property
    def is_finite(self) -> bool:
        """Whether every number in it is finite, and their sum not absurdly large."""
        return not self._special

    @property
    def rounded(self) -> float:
        """The sum as the nearest float64, ties to even; infinite beyond float64."""
        return self._special or _nearest(self._units)

    @property
    def partials(self) -> tuple[float, ...]:
        """Float64 numbers whose exact sum this is: the nearest one, then the nearest of what is left, until nothing is.

        Beyond float64 the largest float64 stands for the nearest. NaN and infinities stand alone; 0 is no number at all.
        """
        if self._special:
            return (self._special,)
        partials: list[float] = []
        rest = self._units
        while rest:
            partial = _nearest(rest)
            if math.isinf(partial):
                partial = math.copysign(sys.float_info.max, partial)
            partials.append(partial)
            rest -= _to_units(partial)
        return tuple(partials)

    def quotient(self, divisor: float) -> float:
        """Return the sum over a divisor, rounded about once: to the bit what the engine answers with (work.SpecTotal).

        As IEEE 754 has it where the divisor is 0, which Python would refuse.
        """
        high, low, *_ = *self.partials, 0.0, 0.0
        if math.isinf(self.rounded):
            high, low = self.rounded, 0.0
        result = _divide(high, divisor)
        # Not by 1: the sum is the nearest already, and adding the rest again would round a tie the other way.
        if divisor != 1.0 and math.isfinite(result) and not math.isinf(divisor):
            # What the first division left, rounded once, as a fused multiply-add has it; math.fma is new in Python 3.13.
            rest = float(Fraction(high) - Fraction(result) * Fraction(divisor))
            result += _divide(rest + low, divisor)
        return math.nan if math.isnan(result) else result


ZERO: Final = ExactSum()


def _to_units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << _UNIT_EXPONENT + 1 - denominator.bit_length()  # the denominator is a power of 2


def _nearest(units: int) -> float:
    try:
        return units / _UNITS  # of whole numbers: rounded once, ties to even
    except OverflowError:
        return math.inf if units > 0 else -math.inf


def _divide(value: float, divisor: float) -> float:
    if divisor:
        return value / divisor
    return value * math.copysign(math.inf, divisor) if value else math.nan
