"""Reads a Prometheus endpoint's histograms: their difference over a time, and percentiles out of their buckets."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Histogram:
    """What a histogram has counted: `cumulative[i]` observations were at most `bounds[i]`; the last bound is infinite."""

    bounds: tuple[float, ...]
    cumulative: tuple[float, ...]
    total: float

    @property
    def count(self) -> int:
        """How many observations there were."""
        return int(self.cumulative[-1]) if self.cumulative else 0

    @property
    def mean(self) -> float:
        """The mean observation: exact, unlike a percentile."""
        return self.total / self.count if self.count else math.nan

    def __add__(self, other: Histogram) -> Histogram:
        return self._combine(other, 1) if self.bounds else other

    def __sub__(self, other: Histogram) -> Histogram:
        return self._combine(other, -1)

    def _combine(self, other: Histogram, sign: int) -> Histogram:
        if not other.bounds:  # nothing was counted yet
            return self
        cumulative = tuple(a + sign * b for a, b in zip(self.cumulative, other.cumulative, strict=True))
        return Histogram(self.bounds, cumulative, self.total + sign * other.total)

    def quantile(self, q: float) -> float:
        """Return the observation at rank `q`, linear within its bucket, as PromQL's histogram_quantile does."""
        if not self.count:
            return math.nan
        rank = q * self.count
        low, below = 0.0, 0.0
        for bound, cumulative in zip(self.bounds, self.cumulative, strict=True):
            if cumulative >= rank and cumulative > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (cumulative - below)
            low, below = bound, cumulative
        return low


EMPTY = Histogram((), (), 0.0)


@dataclass(frozen=True)
class Scrape:
    """All histograms of an endpoint at one moment, by name and labels."""

    histograms: dict[tuple[str, frozenset[tuple[str, str]]], Histogram]

    def select(self, name: str, **labels: str) -> Histogram:
        """Return the sum of the histograms of this name that have these labels."""
        chosen = (
            histogram
            for (its_name, its_labels), histogram in self.histograms.items()
            if its_name == name and labels.items() <= dict(its_labels).items()
        )
        return sum(chosen, EMPTY)

    def __sub__(self, earlier: Scrape) -> Scrape:
        return Scrape({key: value - earlier.histograms.get(key, EMPTY) for key, value in self.histograms.items()})


def scrape(url: str) -> Scrape:
    """Fetch and parse the endpoint."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - the demo's own server
        return parse(response.read().decode())


def parse(exposition: str) -> Scrape:
    """Parse the text format, histograms only."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], Histogram] = {}
    for family in text_string_to_metric_families(exposition):
        if family.type != "histogram":
            continue
        buckets: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        totals: dict[frozenset[tuple[str, str]], float] = {}
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if name != "le")
            if sample.name.endswith("_bucket"):
                buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_sum"):
                totals[labels] = sample.value
        for labels, pairs in buckets.items():
            bounds, cumulative = _columns(sorted(pairs))
            found[family.name, labels] = Histogram(bounds, cumulative, totals.get(labels, math.nan))
    return Scrape(found)


def _columns(pairs: Iterable[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    bounds, cumulative = zip(*pairs, strict=True)
    return bounds, cumulative
