"""What a client measures of itself, for a registry of prometheus_client's that the caller gives: LossClient(metrics=...).

Nothing here runs where none is given. Clients of one registry share its series. Any thread counts, under one lock, and a
scrape reads under the same; prometheus_client is imported by the first scrape, and by nothing else.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from lossgrad import errors, forking
from lossgrad.errors import LossgradError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry as CollectorRegistry  # noqa: PLC0414 - other modules have it from here
    from prometheus_client.metrics_core import Metric

Labels = tuple[str, ...]

# The server's: from 10 microseconds, because the usual buckets start where every request of ours would be in the first.
SECONDS: Final = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3,
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip

_RPC: Final = ("grpc_type", "grpc_service", "grpc_method")
# Name -> (help, labels). Of the counters without `_total`, as prometheus_client has it.
_COUNTERS: Final = {
    "lossgrad_client_requests": (
        "Requests by outcome: a call of compute, a pair of a stream, a slice of an evaluation.",
        ("method", "outcome"),
    ),
    "lossgrad_client_retries": (
        "Requests sent again by this client, by why the time before failed.",
        ("method", "reason"),
    ),
    "lossgrad_client_reconnects": (
        "Streams opened in the place of one that broke or that its server ended, by why.",
        ("method", "reason"),
    ),
    "lossgrad_client_waiting_seconds": (
        "Time in which callers of streams and evaluations had nothing to do but wait for answers.",
        ("method",),
    ),
    "lossgrad_client_sent_bytes": ("Bytes of messages sent.", ("grpc_method",)),
    "lossgrad_client_received_bytes": ("Bytes of messages received.", ("grpc_method",)),
    "grpc_client_started": ("RPCs started on the client.", _RPC),
    "grpc_client_handled": ("RPCs completed by the client, by code.", (*_RPC, "grpc_code")),
    "grpc_client_msg_sent": ("Messages sent to servers.", _RPC),
    "grpc_client_msg_received": ("Messages received from servers.", _RPC),
}
_HISTOGRAMS: Final = {
    "lossgrad_client_request_duration_seconds": (
        "Time from a request being given to the client until its result is there, all attempts included.",
        ("method",),
    ),
    "grpc_client_handling_seconds": ("Time from an RPC's start to its status.", _RPC),
}

_OUTCOMES: Final[Mapping[type[BaseException], str]] = {
    errors.InvalidRequest: "invalid",
    errors.Overloaded: "overloaded",
    errors.Unavailable: "unavailable",
    errors.TLSError: "unavailable",
    errors.DeadlineExceeded: "deadline",
    errors.Unauthenticated: "unauthenticated",
    errors.RequestTooLarge: "too_large",
    errors.Cancelled: "cancelled",
}
# The server's reasons to try again later. Anything else that a server may say counts by its code: labels are a closed set.
_REASONS: Final = frozenset(
    (
        "QUEUE_FULL",
        "QUEUE_BYTES_FULL",
        "PREDICTED_LATE",
        "DRAINING",
        "WARMING_UP",
        "WORKER_RESTARTING",
        "UNKNOWN_REGION",
        "SHARED_MEMORY_OFF",
    )
)


class Window(Protocol):
    """What gauges read at a scrape: a window of a stream."""

    @property
    def held(self) -> tuple[int, int]:
        """How many requests are in it, and their bytes."""


class _Histogram:
    """One series of a histogram."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


class ClientMetrics:
    """Every series of the clients of one registry, of which it is a collector."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in _COUNTERS}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {name: {} for name in _HISTOGRAMS}
        self._methods: dict[str, MethodMetrics] = {}
        forking.watch(self)

    @staticmethod
    def of(registry: CollectorRegistry) -> ClientMetrics:
        """Return the metrics of a registry, registered in it. Raises TypeError for what is none."""
        if not callable(getattr(registry, "register", None)):
            raise TypeError(
                f"metrics is a {type(registry).__name__}; give a prometheus_client.CollectorRegistry, such as "
                "prometheus_client.REGISTRY (pip install 'lossgrad[metrics]')"
            )
        with _lock:
            metrics = _of_registry.get(registry)
            if metrics is None:
                metrics = ClientMetrics()
                registry.register(metrics)
                _of_registry[registry] = metrics
            return metrics

    def method(self, name: str) -> MethodMetrics:
        """Return the series of one of the SDK's methods: "compute", "stream" or "evaluate"."""
        with self.lock:
            if name not in self._methods:
                self._methods[name] = MethodMetrics(self, name)
            return self._methods[name]

    def add(self, name: str, labels: Labels, amount: float = 1) -> None:
        """Count."""
        with self.lock:
            series = self._counters[name]
            series[labels] = series.get(labels, 0.0) + amount

    def observe(self, name: str, labels: Labels, seconds: float) -> None:
        """Count an observation of a histogram."""
        with self.lock:
            self.histogram(name, labels).observe(seconds)

    def histogram(self, name: str, labels: Labels) -> _Histogram:
        """Return a series of a histogram; to be used under the lock."""
        series = self._histograms[name]
        if labels not in series:
            series[labels] = _Histogram()
        return series[labels]

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock. Called by forking.py."""
        self.lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples: what the registry checks names with."""
        return [family for family, _ in self._families()]

    def collect(self) -> Iterable[Metric]:
        """Return every family with its samples."""
        with self.lock:
            methods = list(self._methods.values())
            counters = {name: dict(series) for name, series in self._counters.items()}
            histograms = {
                name: {labels: (list(one.counts), one.sum) for labels, one in series.items()}
                for name, series in self._histograms.items()
            }
        gauges = {"lossgrad_client_inflight_requests": {}, "lossgrad_client_window_bytes": {}}  # type: dict[str, Any]
        for method in methods:
            requests, byte_count = method.held()
            gauges["lossgrad_client_inflight_requests"][method.name,] = requests
            gauges["lossgrad_client_window_bytes"][method.name,] = byte_count
        for family, name in self._families():
            for labels, (counts, total) in histograms.get(name, {}).items():
                family.add_metric(labels, buckets=_cumulative(counts), sum_value=total)
            for labels, value in {**counters, **gauges}.get(name, {}).items():
                family.add_metric(labels, value)
            yield family

    @staticmethod
    def _families() -> Iterator[tuple[Any, str]]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for name, (documentation, labels) in _COUNTERS.items():
            yield CounterMetricFamily(name, documentation, labels=labels), name
        for name, (documentation, labels) in _HISTOGRAMS.items():
            yield HistogramMetricFamily(name, documentation, labels=labels), name
        for name, documentation in (
            ("lossgrad_client_inflight_requests", "Requests that wait for their answer."),
            ("lossgrad_client_window_bytes", "Bytes of the requests that streams hold: waiting, sent or sent again."),
        ):
            yield GaugeMetricFamily(name, documentation, labels=("method",)), name


_lock: Final = threading.Lock()
_of_registry: Final[weakref.WeakKeyDictionary[Any, ClientMetrics]] = weakref.WeakKeyDictionary()


class MethodMetrics:
    """The series of the requests of one method."""

    def __init__(self, metrics: ClientMetrics, name: str) -> None:
        self.name = name
        self._metrics = metrics
        self._windows: weakref.WeakSet[Window] = weakref.WeakSet()
        self._calls = 0  # under way, and in no window
        self._duration = metrics.histogram("lossgrad_client_request_duration_seconds", (name,))
        # There from the start: a rate of what never was is no number.
        metrics._counters["lossgrad_client_requests"][name, "ok"] = 0.0

    def watch(self, window: Window) -> None:
        """Let the gauges read a window, as long as there is one."""
        with self._metrics.lock:
            self._windows.add(window)

    def held(self) -> tuple[int, int]:
        """Return how many requests are under way, and the bytes of those in windows."""
        with self._metrics.lock:
            held = [window.held for window in self._windows]
        return self._calls + sum(requests for requests, _ in held), sum(byte_count for _, byte_count in held)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count what runs inside as one request."""
        start = time.perf_counter()
        with self._metrics.lock:
            self._calls += 1
        outcome: BaseException | None = None
        try:
            yield
        except BaseException as error:
            outcome = error
            raise
        finally:
            with self._metrics.lock:
                self._calls -= 1
            self.finished(outcome, time.perf_counter() - start)

    def follow(self, call: asyncio.Future[Any]) -> None:
        """Count a call that is under way as one request."""
        with self._metrics.lock:
            self._calls += 1
        call.add_done_callback(partial(self._followed, time.perf_counter()))

    def _followed(self, start: float, call: asyncio.Future[Any]) -> None:
        with self._metrics.lock:
            self._calls -= 1
        outcome = asyncio.CancelledError() if call.cancelled() else call.exception()
        self.finished(outcome, time.perf_counter() - start)

    def finished(self, outcome: object, seconds: float) -> None:
        """Count a request that came to an end; `outcome` is its error, or anything else."""
        name = outcome_of(outcome) if isinstance(outcome, BaseException) else "ok"
        with self._metrics.lock:
            series = self._metrics._counters["lossgrad_client_requests"]
            key = (self.name, name)
            series[key] = series.get(key, 0.0) + 1
            self._duration.observe(seconds)

    def retried(self, error: LossgradError, times: int = 1) -> None:
        """Count requests that are sent again because of an error."""
        self._metrics.add("lossgrad_client_retries", (self.name, reason_of(error)), times)

    def reconnected(self, error: LossgradError) -> None:
        """Count a stream that is opened because another one ended with an error."""
        self._metrics.add("lossgrad_client_reconnects", (self.name, reason_of(error)))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that what runs inside takes as time spent waiting for answers."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._metrics.add("lossgrad_client_waiting_seconds", (self.name,), time.perf_counter() - start)


def outcome_of(error: BaseException) -> str:
    """Return the label `outcome` of a request that ended with an error."""
    if isinstance(error, LossgradError):
        return _OUTCOMES.get(type(error), "internal")
    # Not ours: a wrong argument (TypeError, ValueError), or whatever ended the caller's task or thread.
    return "invalid" if isinstance(error, Exception) else "cancelled"


def reason_of(error: LossgradError) -> str:
    """Return the label `reason`: the server's word where it is a known one, otherwise the status code."""
    return (error.reason if error.reason in _REASONS else error.code.name).lower()


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    from prometheus_client.utils import floatToGoString

    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*SECONDS, float("inf")), counts, strict=True):
        total += count
        buckets.append((floatToGoString(bound), total))  # type: ignore[no-untyped-call]
    return buckets
