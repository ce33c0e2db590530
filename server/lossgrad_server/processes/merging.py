"""The metrics of several processes as those of one server, so that whoever reads them need not know how many there are.

Counters and histograms are added up. So are the gauges that say how much there is; of others the one is taken that says the
same of the whole server, and what is a process's own (its memory, its start) keeps apart, by the label `process`. A sum
never falls: what a process had counted when it was last asked stays counted after its end.
"""

from __future__ import annotations

import json
import logging
import operator
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

logger = logging.getLogger(__name__)

# The label that tells processes apart, and its value for the parent.
PROCESS: Final = "process"
PARENT: Final = "parent"

_CUMULATIVE: Final = frozenset(("counter", "histogram"))
_SUMMED: Final = frozenset(
    (
        "lossgrad_accumulations",
        "lossgrad_inflight_bytes",
        "lossgrad_inflight_requests",
        "lossgrad_queue_bytes",
        "lossgrad_queue_limit_bytes",
        "lossgrad_queue_limit_requests",
        "lossgrad_queue_requests",
    )
)
_READY: Final = "lossgrad_ready"
# Served as long as one process serves; waited as long as in the worst of them; and what is the same of all.
_LARGEST: Final = frozenset((_READY, "lossgrad_queue_oldest_seconds", "lossgrad_build_info"))
_LEAST: Final = frozenset(("lossgrad_tls_certificate_expiry_timestamp_seconds",))
# Each process has the same share of the cores.
_MEAN: Final = frozenset(("lossgrad_device_utilization_ratio",))

# How long processes may take, all together. A scrape of Prometheus' waits for 10 s.
_ANSWER_SECONDS: Final = 2.0

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Place(Protocol):
    """One of the processes, or what is there between one's end and the next one's start."""

    name: str

    @property
    def is_serving(self) -> bool:
        """Whether it serves."""

    @property
    def restarts(self) -> int:
        """How often there was another process."""

    def ask_for_metrics(self) -> tuple[int, socket.socket | None]:
        """Ask; return which of the place's processes it is, counted from 0, and where its metrics come if they do."""


def told(registry: CollectorRegistry) -> bytes:
    """Return all that a registry holds, for `read`."""
    return json.dumps(
        [
            (
                metric.name,
                metric.documentation,
                metric.type,
                metric.unit,
                [(one.name, one.labels, one.value, one.exemplar) for one in metric.samples],
            )
            for metric in registry.collect()
        ]
    ).encode()


def read(text: bytes) -> list[Metric]:
    """Return what `told` was given. Raises ValueError where that is not all of it."""
    metrics: list[Metric] = []
    for name, documentation, kind, unit, samples in json.loads(text):
        metric = Metric(name, documentation, kind, unit)
        for sample, labels, value, exemplar in samples:
            metric.add_sample(sample, labels, value, exemplar=None if exemplar is None else Exemplar(*exemplar))
        metrics.append(metric)
    return metrics


@dataclass(slots=True)
class _Sum:
    """One series of several processes."""

    value: float
    exemplar: Exemplar | None
    times: int = 1


@dataclass(slots=True)
class _Family:
    """One name's series."""

    like: Metric
    series: dict[_Key, _Sum] = field(default_factory=dict)


class Merge:
    """Metrics of several processes, put together one after the other."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, metrics: Iterable[Metric], process: str, *, only_counted: bool = False) -> None:
        """Add what a process tells; with `only_counted`, what it has counted and not what it is at."""
        for metric in metrics:
            if only_counted and not is_counted(metric):
                continue
            combine, is_apart = _rule(metric)
            family = self._families.get(metric.name)
            if family is None:
                family = self._families[metric.name] = _Family(metric)
            for sample in metric.samples:
                labels = tuple(sample.labels.items())
                if is_apart:
                    labels += ((PROCESS, process),)
                one = family.series.get((sample.name, labels))
                if one is None:
                    family.series[sample.name, labels] = _Sum(sample.value, sample.exemplar)
                    continue
                one.value = combine(one.value, sample.value)
                one.times += 1
                one.exemplar = max(one.exemplar, sample.exemplar, key=_when)

    def metrics(self) -> Iterator[Metric]:
        """Return all, in the order in which they came."""
        for name, family in self._families.items():
            like = family.like
            metric = Metric(like.name, like.documentation, like.type, like.unit)
            for (sample, labels), one in family.series.items():
                value = one.value / one.times if name in _MEAN else one.value
                metric.add_sample(sample, dict(labels), value, exemplar=one.exemplar)
            yield metric


def is_counted(metric: Metric) -> bool:
    """Return whether a metric only grows, and is the server's and not a process's own."""
    return metric.type in _CUMULATIVE and not metric.name.startswith("process_")


def _rule(metric: Metric) -> tuple[Callable[[float, float], float], bool]:
    """Return how to combine two processes' values, and whether to keep them apart instead."""
    if is_counted(metric) or metric.name in _SUMMED or metric.name in _MEAN:
        return operator.add, False
    if metric.name in _LARGEST:
        return max, False
    if metric.name in _LEAST:
        return min, False
    return max, True


def _when(exemplar: Exemplar | None) -> float:
    return -1.0 if exemplar is None else float(exemplar.timestamp or 0.0)


class _Told:
    """What a place has told so far."""

    def __init__(self) -> None:
        self.life = 0
        self.metrics: list[Metric] = []
        self.is_fresh = False


class MergedMetrics(Collector):
    """Asks the processes at every scrape, and exports what they tell as one server's."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._told = [_Told() for _ in places]
        self._ended = Merge()  # what processes had counted that are no more
        self._lock = threading.Lock()
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)

    def describe(self) -> list[Metric]:
        """Return nothing: the names are those of the processes, which have yet to start."""
        return []

    def collect(self) -> list[Metric]:
        """Ask, and put together. A process that does not answer in time counts with what it last told."""
        with self._lock:
            self._ask()
            merge = Merge()
            merge.add(self._ended.metrics(), PARENT)
            for place, told_of in zip(self._places, self._told, strict=True):
                merge.add(told_of.metrics, place.name, only_counted=not told_of.is_fresh)
            merge.add(self._own.collect(), PARENT)
            merged = list(merge.metrics())
        if not any(metric.name == _READY for metric in merged):
            merged.append(GaugeMetricFamily(_READY, "1 while requests are served, otherwise 0.", value=0))
        return [*merged, *self._of_places()]

    def _ask(self) -> None:
        asked = [place.ask_for_metrics() for place in self._places]
        due = time.monotonic() + _ANSWER_SECONDS
        for place, told_of, (life, pipe) in zip(self._places, self._told, asked, strict=True):
            if life != told_of.life:
                self._ended.add(told_of.metrics, PARENT, only_counted=True)
                told_of.life, told_of.metrics = life, []
            told_of.is_fresh = False
            if pipe is None:
                continue
            with pipe:
                try:
                    told_of.metrics = read(_all_of(pipe, due))
                    told_of.is_fresh = True
                except (OSError, ValueError):
                    logger.warning("Process %s has not told its metrics in time", place.name)

    def _of_places(self) -> list[Metric]:
        up = GaugeMetricFamily("lossgrad_process_up", "1 while this process serves, otherwise 0.", labels=(PROCESS,))
        restarts = CounterMetricFamily(
            "lossgrad_process_restarts", "Times that there was another process in one's place.", labels=(PROCESS,)
        )
        for place in self._places:
            up.add_metric((place.name,), place.is_serving)
            restarts.add_metric((place.name,), place.restarts)
        return [up, restarts]


def _all_of(pipe: socket.socket, due: float) -> bytes:
    """Return what comes up to the end. Raises OSError where that is not there when it is due."""
    parts: list[bytes] = []
    while True:
        pipe.settimeout(max(due - time.monotonic(), 1e-3))
        part = pipe.recv(1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
