"""Triton's nv_inference_* series, for dashboards that were made for it: with --triton-metrics only.

They are the counts and times that ModelStatistics has, of requests of the Open Inference Protocol by model, read at every
scrape: so they cost a request nothing. Names, labels and units are Triton's, and not those that Prometheus recommends. What
is a counter there says nothing of its type here, because counters would have to end in _total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from lossgrad_server.transport.open_inference.models import VERSION
from lossgrad_server.transport.open_inference.statistics import ModelCounts, Statistics

_COUNTERS: Final[tuple[tuple[str, str, Callable[[ModelCounts], float]], ...]] = (
    ("nv_inference_request_success", "Requests that were answered.", lambda one: one.success_count),
    ("nv_inference_count", "Rows computed.", lambda one: one.inference_count),
    ("nv_inference_exec_count", "Batches that the model had requests in.", lambda one: one.execution_count),
    ("nv_inference_request_duration_us", "Time of answered requests.", lambda one: one.success_ns // 1000),
    ("nv_inference_queue_duration_us", "Time in the queue.", lambda one: one.queue_ns // 1000),
    ("nv_inference_compute_input_duration_us", "Time in packing.", lambda one: one.input_ns // 1000),
    ("nv_inference_compute_infer_duration_us", "Time in computing.", lambda one: one.infer_ns // 1000),
    ("nv_inference_compute_output_duration_us", "Time in unpacking.", lambda one: one.output_ns // 1000),
)
_LABELS: Final = ("model", "version")


class TritonCollector(Collector):
    """The series of every model."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are nobody else's."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Read them."""
        models = self._statistics.counts()
        for name, documentation, value_of in _COUNTERS:
            family = UnknownMetricFamily(name, documentation, labels=_LABELS)
            for one in models:
                family.add_metric((one.model, VERSION), value_of(one))
            yield family
        failures = UnknownMetricFamily(
            "nv_inference_request_failure", "Requests that failed, by why.", labels=(*_LABELS, "reason")
        )
        pending = GaugeMetricFamily(
            "nv_inference_pending_request_count",
            "Requests inside: waiting, running, or on their way back.",
            labels=_LABELS,
        )
        for one in models:
            for reason, count in one.failures.items():
                failures.add_metric((one.model, VERSION, reason), count)
            pending.add_metric((one.model, VERSION), one.pending_count)
        yield failures
        yield pending
