"""Latencies: exact percentiles, a histogram of them, and both as text and as JSON."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Any, Final

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
_BUCKETS_PER_DECADE: Final = 5
_BAR: Final = 40


class Latencies:
    """Durations in seconds. All are kept, 8 bytes each, so that percentiles are exact."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self._seconds = array("d", seconds)
        self._is_sorted = False

    def add(self, seconds: float) -> None:
        """Add one."""
        self._seconds.append(seconds)
        self._is_sorted = False

    def __len__(self) -> int:
        return len(self._seconds)

    @property
    def max(self) -> float:
        """The longest; NaN where there is none."""
        return self.percentile(100.0)

    @property
    def mean(self) -> float:
        """The mean; NaN where there is none."""
        return math.fsum(self._seconds) / len(self) if self._seconds else math.nan

    def percentile(self, percent: float) -> float:
        """Return the shortest duration that at least this share is no longer than (nearest rank); NaN if there is none."""
        if not self._is_sorted:
            self._seconds = array("d", sorted(self._seconds))
            self._is_sorted = True
        return self._seconds[max(0, math.ceil(len(self) * percent / 100) - 1)] if self._seconds else math.nan

    def buckets(self) -> list[tuple[float, int]]:
        """Return how many lie in each bucket, with its upper bound; five to a decade, from the first to the last used."""
        counts: dict[int, int] = {}
        for seconds in self._seconds:
            # Rounded, so that a bound belongs to its own bucket in spite of the logarithm's last bit.
            position = math.ceil(round(math.log10(max(seconds, 1e-9)) * _BUCKETS_PER_DECADE, 9))
            counts[position] = counts.get(position, 0) + 1
        if not counts:
            return []
        every = range(min(counts), max(counts) + 1)
        return [(10 ** (position / _BUCKETS_PER_DECADE), counts.get(position, 0)) for position in every]

    def histogram(self) -> list[str]:
        """Return the buckets as lines with bars."""
        buckets = self.buckets()
        most = max((count for _, count in buckets), default=0)
        return [
            f"{duration(bound):>9}  {count:>9,}  {'#' * math.ceil(_BAR * count / most)}".rstrip()
            for bound, count in buckets
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON has of it, in seconds."""
        percentiles = {f"p{percent:g}": self.percentile(percent) for percent in PERCENTILES}
        buckets = [{"le": bound, "count": count} for bound, count in self.buckets()]
        numbers = {"mean": self.mean, **percentiles, "max": self.max}
        return {
            "count": len(self),
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "histogram": buckets,
        }


def duration(seconds: float) -> str:
    """Return a duration for people, with three digits and its unit."""
    if math.isnan(seconds):
        return "-"
    unit, name = (1.0, "s") if seconds >= 0.9995 else (1e-3, "ms") if seconds >= 0.9995e-3 else (1e-6, "us")
    number = seconds / unit
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {name}"
