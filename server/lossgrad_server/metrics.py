"""Every Prometheus series of the server, in one object. Names, labels and buckets are explained in docs/operations.md.

Label values come from closed sets only. Children are bound once, because looking one up costs more than observing it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from lossgrad_server.batching.forming import Batch, ClosedBy
from lossgrad_server.batching.job import Computed
from lossgrad_server.counters import Counter
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.gauges import DeviceMemoryCollector, Limits, QueueCollector, QueueState, SharedMemoryCollector
from lossgrad_server.histograms import Histogram
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.jobs import DataType, JobPlan, LossKind
from lossgrad_server.work import BatchResult, Retry

# From 10 microseconds: the usual buckets start at 5 ms, where every request of ours would be in the first.
SECONDS: Final = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3,
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
BYTES: Final = (0, 1024, 2048, 4096, *(4**power for power in range(7, 17)))  # gRFC A66's sizes
ELEMENTS: Final = tuple(4**power for power in range(16))
FILL: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
REQUESTS: Final = tuple(2**power for power in range(11))

STAGES: Final = ("decode", "queue", "pack", "compute", "unpack", "encode")
MIXED: Final = "mixed"  # the loss label of a request with several specs of different losses
UNKNOWN: Final = "unknown"  # the loss label of a request that was refused before its loss was known

_OUTCOMES: Final = {
    Code.INVALID_ARGUMENT: "invalid",
    Code.NOT_FOUND: "invalid",
    Code.ALREADY_EXISTS: "invalid",
    Code.DEADLINE_EXCEEDED: "deadline",
    Code.CANCELLED: "cancelled",
    Code.UNAVAILABLE: "overloaded",
    Code.RESOURCE_EXHAUSTED: "too_large",
    Code.UNIMPLEMENTED: "invalid",
    Code.UNAUTHENTICATED: "unauthenticated",
    Code.INTERNAL: "internal",
}
_OUTCOMES_BY_REASON: Final = {
    Reason.OUT_OF_DEVICE_MEMORY: "oom",
    Reason.DEVICE_FAILED: "device",
    Reason.WORKER_RESTARTING: "device",
    Reason.UNKNOWN_REGION: "shm",
    Reason.REGION_EXISTS: "shm",
    Reason.BAD_REGION: "shm",
    Reason.REGIONS_FULL: "shm",
    Reason.SHARED_MEMORY_OFF: "shm",
}
_REJECTIONS: Final = {
    Reason.QUEUE_FULL: "queue_full",
    Reason.QUEUE_BYTES_FULL: "bytes_full",
    Reason.PREDICTED_LATE: "predicted_late",
    Reason.DRAINING: "draining",
    Reason.WARMING_UP: "warming_up",
    Reason.RESULT_TOO_LARGE: "too_large",
    Reason.MESSAGE_TOO_LARGE: "too_large",
    Reason.DEADLINE_PASSED: "deadline",
    Reason.WORKER_RESTARTING: "restarting",
}
_UTILIZATION_WINDOW_SECONDS: Final = 10.0


class SliceOutcome(StrEnum):
    """What became of a slice of an accumulation."""

    COUNTED = "counted"
    REPEATED = "repeated"  # the state that the stream went on from held it
    FAILED = "failed"


class NonFinite(StrEnum):
    """What a request's losses hold that is not finite."""

    NAN = "nan"
    INFINITE = "inf"  # infinities, and no NaN


class CertificateState(Protocol):
    """What the gauge of the certificate reads."""

    @property
    def expires(self) -> datetime:
        """When the certificate in use expires."""


class RequestMetrics:
    """The bound series of one combination of loss, mode, data type and api: what a request touches."""

    __slots__ = ("_duration", "_elements", "_nonfinite", "_ok")

    def __init__(self, metrics: Metrics, loss: str, mode: str, dtype: str, api: str) -> None:
        self._ok = metrics.requests.labels(loss, mode, api, "ok")
        self._duration = metrics.request_duration.labels(loss, mode, api)
        self._elements = metrics.elements.labels(loss, mode, dtype, metrics.device)
        self._nonfinite = {kind: metrics.nonfinite_results.labels(loss, kind) for kind in NonFinite}

    def exemplar(self, seconds: float, trace_id: str) -> None:
        """Show a trace as an example of requests that take this long."""
        self._duration.exemplar(seconds, trace_id)

    def done(self, seconds: float, element_count: int, times: int) -> None:
        """Count requests that were answered with numbers, `seconds` after they came: `times` of `element_count` each."""
        self._ok.inc(times)
        self._duration.observe(seconds, times)
        self._elements.inc(element_count * times)

    def nonfinite(self, kind: NonFinite) -> None:
        """Count a request with such among its elements' losses."""
        self._nonfinite[kind].inc()


class Metrics:
    """Every series of one server, in a registry of its own."""

    def __init__(self, *, device: str, build_info: dict[str, str], limits: Limits | None = None) -> None:
        """`limits` are what bounds the queue and the batches; without any, nothing does."""
        self.device = device
        self._limits = limits or Limits()
        self.registry = CollectorRegistry()
        registry = self.registry
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = Counter("grpc_server_started", "RPCs started on the server.", rpc, registry=registry)
        self.grpc_handled = Counter(
            "grpc_server_handled",
            "RPCs completed on the server, by code.",
            (*rpc, "grpc_code"),
            registry=registry,
        )
        self.grpc_handling_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from start to status.",
            rpc,
            SECONDS,
        )
        self.grpc_received = Counter(
            "grpc_server_msg_received", "Messages received from callers.", rpc, registry=registry
        )
        self.grpc_sent = Counter("grpc_server_msg_sent", "Messages sent to callers.", rpc, registry=registry)
        self.requests = Counter(
            "lossgrad_requests",
            "Loss requests by outcome; one message of a stream holds many.",
            ("loss", "mode", "api", "outcome"),
            registry=registry,
        )
        self.request_duration = Histogram(
            "lossgrad_request_duration_seconds",
            "Time from a request's bytes being there to its answer's bytes being ready.",
            ("loss", "mode", "api"),
            SECONDS,
        )
        self.stage_duration = Histogram(
            "lossgrad_stage_duration_seconds",
            "Time that requests spent in each stage: decode, queue, pack, compute, unpack, encode.",
            ("stage", "device"),
            SECONDS,
        )
        self.request_bytes = Histogram("lossgrad_request_bytes", "Size of request messages.", ("api",), BYTES)
        self.response_bytes = Histogram("lossgrad_response_bytes", "Size of response messages.", ("api",), BYTES)
        self.elements = Counter(
            "lossgrad_elements",
            "Elements computed, by loss and by the input's data type.",
            ("loss", "mode", "dtype", "device"),
            registry=registry,
        )
        self.batches = Counter(
            "lossgrad_batches",
            "Batches run, by why they took no more requests.",
            ("device", "closed_by"),
            registry=registry,
        )
        self.batch_requests = Histogram("lossgrad_batch_requests", "Requests in a batch.", ("device",), REQUESTS)
        self.batch_elements = Histogram("lossgrad_batch_elements", "Elements in a batch.", ("device",), ELEMENTS)
        self.batch_fill = Histogram(
            "lossgrad_batch_fill_ratio",
            "How full a batch was, by the cap that it came nearest to: of requests, elements or bytes.",
            ("device",),
            FILL,
        )
        retries = Counter(
            "lossgrad_batch_retries",
            "Times that a batch, or a part of one, was computed once more, by why.",
            ("device", "reason"),
            registry=registry,
        )
        self.batch_retries = {retry: retries.labels(device, retry) for retry in Retry}
        self.rejected = Counter(
            "lossgrad_rejected",
            "Requests refused for what the server is at, not for what they are.",
            ("reason",),
            registry=registry,
        )
        self.nonfinite_results = Counter(
            "lossgrad_nonfinite_results",
            "Requests with a NaN or an infinity among their elements' losses.",
            ("loss", "kind"),
            registry=registry,
        )
        self.accumulations = Gauge("lossgrad_accumulations", "AccumulateLoss streams that are open.", registry=registry)
        slices = Counter(
            "lossgrad_accumulation_slices", "Slices of accumulations by outcome.", ("outcome",), registry=registry
        )
        self.slices = {outcome: slices.labels(outcome) for outcome in SliceOutcome}
        self.worker_up = Gauge(
            "lossgrad_worker_up",
            "1 while there is a worker that computes, otherwise 0.",
            ("device",),
            registry=registry,
        ).labels(device)
        lost = Counter(
            "lossgrad_worker_lost",
            "Times that the device's process was lost, by what ended it.",
            ("device", "cause"),
            registry=registry,
        )
        self.worker_lost = {loss: lost.labels(device, loss) for loss in Loss}
        self.worker_restarts = Counter(
            "lossgrad_worker_restarts", "Times that the device got another process.", ("device",), registry=registry
        ).labels(device)
        self.worker_crashes = Counter(
            "lossgrad_worker_crashing_requests",
            "Requests refused because the device's process died of them.",
            ("device",),
            registry=registry,
        ).labels(device)
        # process_start_time_seconds, process_resident_memory_bytes ... under the names that everybody knows.
        ProcessCollector(registry=registry)
        self.ready = Gauge("lossgrad_ready", "1 while requests are served, otherwise 0.", registry=registry)
        Gauge("lossgrad_build_info", "What runs here; always 1.", tuple(build_info), registry=registry).labels(
            **build_info
        ).set(1)
        for histogram in (
            self.grpc_handling_seconds,
            self.request_duration,
            self.stage_duration,
            self.request_bytes,
            self.response_bytes,
            self.batch_requests,
            self.batch_elements,
            self.batch_fill,
        ):
            registry.register(histogram)
        self._stages = {stage: self.stage_duration.labels(stage, device) for stage in STAGES}
        self._batch_requests = self.batch_requests.labels(device)
        self._batch_elements = self.batch_elements.labels(device)
        self._batch_fill = self.batch_fill.labels(device)
        self._utilization = Utilization()
        # Series that are there from the start: a rate of what never was is no number, and an alert on it never fires.
        for reason in sorted(set(_REJECTIONS.values())):
            self.rejected.labels(reason)
        self._batches = {closed_by: self.batches.labels(device, closed_by) for closed_by in ClosedBy}
        self._request_metrics: dict[tuple[LossKind | None, bool, DataType, str], RequestMetrics] = {}

    def watch(self, queue: QueueState) -> None:
        """Export the queue's state, read anew at every scrape."""
        self.registry.register(QueueCollector(queue, self._utilization.ratio, self._limits, self.device))

    def watch_device_memory(self, memory: Callable[[], Mapping[str, int]]) -> None:
        """Export the device's memory, read anew at every scrape: bytes by kind."""
        self.registry.register(DeviceMemoryCollector(memory, self.device))

    def watch_memory(self, state: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Export what is shared with callers, read anew at every scrape: (kind, regions, bytes) of each kind."""
        self.registry.register(SharedMemoryCollector(state))

    def watch_certificates(self, certificates: CertificateState) -> None:
        """Export until when the certificate is valid, read anew at every scrape."""
        gauge = Gauge(
            "lossgrad_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use expires, in seconds since 1970.",
            registry=self.registry,
        )
        gauge.set_function(lambda: certificates.expires.timestamp())  # noqa: PLW0108 - another date after a reload

    def of_request(self, plan: JobPlan, api: str) -> RequestMetrics:
        """Return the series that a request with this plan touches."""
        dtype = plan.input.data_type
        key = (plan.kind, plan.includes_gradient, dtype, api)
        bound = self._request_metrics.get(key)
        if bound is None:
            bound = self._request_metrics[key] = RequestMetrics(self, *labels(plan), dtype.name.lower(), api)
        return bound

    def stage(self, stage: str, nanoseconds: float, times: int = 1) -> None:
        """Note the time that each of some requests spent in a stage of the event loop's thread: decode, queue, encode."""
        self._stages[stage].observe(nanoseconds * 1e-9, times)

    def traced(self, plan: JobPlan, api: str, seconds: float, computed: Computed, trace_id: str) -> None:
        """Show the trace of a request that took `seconds` as an example of its durations."""
        self.of_request(plan, api).exemplar(seconds, trace_id)
        self._stages["queue"].exemplar(computed.queue_ns * 1e-9, trace_id)
        self._stages["compute"].exemplar(computed.batch.compute_ns * 1e-9, trace_id)

    def failed(self, plan: JobPlan | None, api: str, error: RequestError) -> None:
        """Count a request that was answered with an error."""
        loss, mode = labels(plan)
        outcome = _OUTCOMES_BY_REASON.get(error.reason) or _OUTCOMES[error.code]
        self.requests.labels(loss, mode, api, outcome).inc()
        if (rejection := _REJECTIONS.get(error.reason)) is not None:
            self.rejected.labels(rejection).inc()

    def batch_done(self, batch: Batch, result: BatchResult, busy_ns: int) -> None:
        """Note a batch that ran. Called by one thread at a time, and nobody else observes these series."""
        size = len(batch.jobs)
        self._stages["pack"].observe(result.pack_ns * 1e-9, size)
        self._stages["compute"].observe(result.compute_ns * 1e-9, size)
        self._stages["unpack"].observe(result.unpack_ns * 1e-9, size)
        self._batches[batch.closed_by].inc()
        self._batch_requests.observe(size)
        self._batch_elements.observe(batch.element_count)
        self._batch_fill.observe(self._limits.fill_of(batch))
        self._utilization.busy(busy_ns * 1e-9)
        for retry in result.retries:
            self.batch_retries[retry].inc()


def labels(plan: JobPlan | None) -> tuple[str, str]:
    """Return the labels `loss` and `mode` of a request; of one that was refused before it had a plan, "unknown"."""
    if plan is None:
        return UNKNOWN, UNKNOWN
    loss = MIXED if plan.kind is None else plan.kind.name.lower()
    return loss, "loss_grad" if plan.includes_gradient else "loss"


class Utilization:
    """The share of the last ten seconds that the device was busy, from the worker's own clock. Works on any device."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._spans: deque[tuple[float, float]] = deque()  # (end, length), oldest first

    def busy(self, seconds: float) -> None:
        """Note that the device was busy for the last `seconds`."""
        now = self._clock()
        with self._lock:
            last = self._spans[-1] if self._spans else (-math.inf, 0.0)
            # Short spans within a tenth of a second become one, so that what is kept is bounded at any rate of batches.
            if now - last[0] < 0.1 and last[1] < 0.1:
                self._spans[-1] = (last[0], last[1] + seconds)
            else:
                self._spans.append((now, seconds))
            while self._spans and self._spans[0][0] < now - _UTILIZATION_WINDOW_SECONDS:
                self._spans.popleft()

    def ratio(self) -> float:
        """Return the share, 0 to 1."""
        now = self._clock()
        window = min(_UTILIZATION_WINDOW_SECONDS, max(now - self._started, 1e-9))
        with self._lock:
            busy = sum(min(length, end - (now - window)) for end, length in self._spans if end > now - window)
        return min(1.0, busy / window)
