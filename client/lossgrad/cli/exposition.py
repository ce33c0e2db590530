"""Prometheus' text format, read: the samples of a scrape, and what two scrapes say of the time between them."""

from __future__ import annotations

import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Final

_SAMPLE: Final = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = frozenset[tuple[str, str]]


class Scrape:
    """The samples of one or several servers' metrics; those of the same name and labels are added up."""

    def __init__(self, texts: Mapping[str, str], seconds: float) -> None:
        """Read `texts`, one for each server, scraped at `seconds` on any steady clock. Raises ValueError."""
        self.seconds = seconds
        self.servers = len(texts)
        self._samples: dict[str, dict[Labels, float]] = {}
        for text in texts.values():
            for line in text.splitlines():
                if line and not line.startswith("#"):
                    self._add(line)

    def _add(self, line: str) -> None:
        found = _SAMPLE.match(line)
        if found is None:
            raise ValueError(f"{line[:80]!r} is no line of Prometheus' text format")
        name, labels, value = found.groups()
        key = frozenset(_LABEL.findall(labels or ""))
        series = self._samples.setdefault(name, {})
        series[key] = series.get(key, 0.0) + float(value)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a name that carry these labels."""
        wanted = labels.items()
        return sum(value for own, value in self._samples.get(name, {}).items() if wanted <= set(own))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of a name's samples by the values of a label."""
        sums: dict[str, float] = {}
        for own, value in self._samples.get(name, {}).items():
            key = dict(own).get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def label_values(self, name: str, label: str) -> list[str]:
        """Return the values that a label has in a name's samples, in order."""
        return sorted({dict(own)[label] for own in self._samples.get(name, {}) if label in dict(own)})


class Interval:
    """What happened between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self._before = before
        self._after = after
        self.seconds = max(after.seconds - before.seconds, 1e-9)

    def increase(self, name: str, **labels: str) -> float:
        """Return by how much a counter grew. Never below 0: a server that was restarted counts from 0 again."""
        return max(0.0, self._after.total(name, **labels) - self._before.total(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """Return by how much a counter grew each second."""
        return self.increase(name, **labels) / self.seconds

    def mean(self, histogram: str, **labels: str) -> float:
        """Return the mean of what a histogram observed; NaN where it observed nothing."""
        count = self.increase(f"{histogram}_count", **labels)
        return self.increase(f"{histogram}_sum", **labels) / count if count else math.nan

    def quantile(self, share: float, histogram: str, **labels: str) -> float:
        """Return a quantile of what a histogram observed, between its buckets' bounds as Prometheus does; NaN: nothing."""
        name = f"{histogram}_bucket"
        bounds = sorted({float(text) for text in self._after.label_values(name, "le")})
        texts = {float(text): text for text in self._after.label_values(name, "le")}
        counts = [self.increase(name, le=texts[bound], **labels) for bound in bounds]
        if not counts or counts[-1] == 0:
            return math.nan
        rank = share * counts[-1]
        below, lower = 0.0, 0.0
        for bound, count in zip(bounds, counts, strict=True):
            if count >= rank:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
            below, lower = count, bound
        return lower

    def rates_by(self, name: str, label: str) -> dict[str, float]:
        """Return the rates of a counter by the values of a label, the largest first, without those that are 0."""
        before, after = self._before.by(name, label), self._after.by(name, label)
        rates = {key: (value - before.get(key, 0.0)) / self.seconds for key, value in after.items()}
        return dict(sorted(((key, rate) for key, rate in rates.items() if rate > 0), key=lambda one: -one[1]))


def scrape(
    addresses: list[str], *, timeout: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> tuple[Scrape, dict[str, str]]:
    """Return the metrics of servers, and for each that could not be read, why."""
    texts: dict[str, str] = {}
    failures: dict[str, str] = {}
    for address in addresses:
        try:
            with urllib.request.urlopen(address, timeout=timeout) as response:  # noqa: S310 - http, the caller checks it
                texts[address] = response.read().decode()
        except (OSError, urllib.error.URLError, ValueError) as error:
            reason = getattr(error, "reason", error)
            failures[address] = str(getattr(reason, "strerror", None) or reason)
    return Scrape(texts, clock()), failures
