"""Spans of requests, for OpenTelemetry: what a request did here, under its caller's trace. Only with --tracing.

A request has a span of its own (kind SERVER), and under it four that add up to it: `receive` (its bytes come in and are
checked), `queue`, `compute` (the whole batch's packing, computing and unpacking), `send` (its answer is encoded and handed
over). They are made when all is known, with the times that metrics have too, so nothing is measured twice and a request
whose caller does not sample its trace costs a microsecond. Where they go is set by OpenTelemetry's own OTEL_* variables.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from lossgrad_server import __version__
from lossgrad_server.batching.job import Computed, Outcome
from lossgrad_server.errors import Code, RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.metrics import labels
from lossgrad_server.transport.call import Call

logger = logging.getLogger(__name__)

# A server that stops has its grace period to keep, and its spans are worth less than that.
LAST_EXPORT_SECONDS: Final = 3.0

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
# W3C Trace Context: version, trace, parent, flags. Later versions may have more behind that, which is to be ignored.
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# The label `api` of requests that are calls of their own: they begin with the call, others when their bytes are there.
_UNARY: Final = frozenset(("native", "open_inference"))
# Whose fault a failure is not: these are answers to what the caller sent, and errors in the caller's span alone.
_CALLERS: Final = frozenset(
    (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.CANCELLED, Code.UNAUTHENTICATED)
)


class TracedRequest(Protocol):
    """What a span says of a request."""

    api: str
    plan: JobPlan
    queued_ns: int

    @property
    def own_id(self) -> str:
        """The caller's name for it, "" without."""

    @property
    def started_ns(self) -> int:
        """When its bytes were there, on perf_counter_ns's clock."""


class RequestSpan:
    """The spans of a request whose answer is made. `sent` ends them; until then nothing is exported."""

    __slots__ = ("_end", "trace_id")

    def __init__(self, trace_id: str, end: Callable[[int], None]) -> None:
        self.trace_id = trace_id
        self._end = end

    def sent(self) -> None:
        """Take note that the answer was handed over."""
        self._end(time.perf_counter_ns())


class Tracer:
    """Makes the spans of one server."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lossgrad_server", __version__)

    def answered(
        self,
        request: TracedRequest,
        outcome: Outcome,
        call: Call,
        own: tuple[str, str] | None,
        encoded_from_ns: int,
    ) -> RequestSpan | None:
        """Return the spans of a request that came to an end; None where its trace is not sampled.

        Its parent is `own`, the trace context that the request itself carries, or that of the call. `encoded_from_ns` is
        when its answer began to be made.
        """
        begun_ns = call.begun_ns if request.api in _UNARY else request.started_ns
        offset_ns = _offset_ns()
        span = self._begin(call, own, begun_ns + offset_ns)
        if span is None:
            return None
        loss, mode = labels(request.plan)
        span.set_attributes(
            {
                "lossgrad.api": request.api,
                "lossgrad.loss": loss,
                "lossgrad.mode": mode,
                "lossgrad.element_count": request.plan.element_count,
                "lossgrad.byte_count": request.plan.byte_count,
            }
        )
        _tell_outcome(span, outcome, request.own_id)
        queued_ns = request.queued_ns or encoded_from_ns

        def stage(name: str, start_ns: int, end_ns: int, attributes: Mapping[str, int] | None = None) -> None:
            context = trace.set_span_in_context(span, Context())
            child = self._tracer.start_span(name, context, start_time=start_ns + offset_ns, attributes=attributes)
            child.end(end_ns + offset_ns)

        def end(now_ns: int) -> None:
            stage("receive", begun_ns, queued_ns)
            done_ns = encoded_from_ns
            if isinstance(outcome, Computed):
                picked_ns = queued_ns + outcome.queue_ns
                batch = outcome.batch
                done_ns = min(done_ns, batch.done_ns)
                stage("queue", queued_ns, picked_ns)
                stage(
                    "compute",
                    picked_ns,
                    done_ns,
                    {
                        "lossgrad.batch.number": batch.number,
                        "lossgrad.batch.request_count": batch.request_count,
                        "lossgrad.batch.element_count": batch.element_count,
                        "lossgrad.batch.pack_ns": batch.pack_ns,
                        "lossgrad.batch.compute_ns": batch.compute_ns,
                        "lossgrad.batch.unpack_ns": batch.unpack_ns,
                    },
                )
            elif request.queued_ns:
                stage("queue", queued_ns, done_ns)
            stage("send", done_ns, now_ns)
            span.end(now_ns + offset_ns)

        return RequestSpan(f"{span.get_span_context().trace_id:032x}", end)

    def refused(self, error: RequestError, call: Call, own: tuple[str, str] | None, started_ns: int) -> None:
        """Make the span of a request that was refused before it had a plan. `started_ns` is when its bytes were there."""
        span = self._begin(call, own, started_ns + _offset_ns())
        if span is not None:
            _tell_outcome(span, error, error.request_id)
            span.end()

    def close(self) -> None:
        """Export what is left, and stop, if the provider is our own. A collector that does not answer is not waited for."""
        if isinstance(self._provider, TracerProvider) and getattr(self._provider, "is_of_lossgrad", False):
            closing = threading.Thread(target=self._provider.shutdown, name="lossgrad-spans", daemon=True)
            closing.start()
            closing.join(LAST_EXPORT_SECONDS)
            if closing.is_alive():
                logger.warning("The last spans were not taken within %s s; leaving them", LAST_EXPORT_SECONDS)

    def _begin(self, call: Call, own: tuple[str, str] | None, begun_ns: int) -> trace.Span | None:
        parent = _parent(*(own or (call.metadata.get(TRACEPARENT), call.metadata.get(TRACESTATE))))
        _, service, name = call.method.split("/")
        span = self._tracer.start_span(
            call.method[1:],
            context=parent,
            kind=SpanKind.SERVER,
            start_time=begun_ns,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        return span if span.is_recording() else None


def create_tracer() -> Tracer:
    """Return a tracer: of this process's OpenTelemetry where that is set up, otherwise one that OTEL_* variables set up.

    Raises ModuleNotFoundError where the extra otel is not installed.
    """
    current = trace.get_tracer_provider()
    if isinstance(current, TracerProvider):
        return Tracer(current)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    os.environ.setdefault("OTEL_SERVICE_NAME", "lossgrad-server")
    # What is left at the end, `close` exports.
    provider = TracerProvider(resource=Resource.create(), shutdown_on_exit=False)
    provider.is_of_lossgrad = True  # type: ignore[attr-defined]
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


def _parent(traceparent: Any, tracestate: Any) -> Context:
    """Return the context that a caller gave; an empty one where it gave none that can be read."""
    found = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
    if found is None:
        return Context()
    context = SpanContext(
        trace_id=int(found[1], 16),
        span_id=int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16)),
        trace_state=TraceState.from_header([tracestate]) if isinstance(tracestate, str) and tracestate else None,
    )
    if not context.is_valid:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())


def _tell_outcome(span: trace.Span, outcome: object, request_id: str) -> None:
    if request_id:
        span.set_attribute("lossgrad.request_id", request_id)
    if not isinstance(outcome, RequestError):
        span.set_attribute("rpc.grpc.status_code", 0)
        return
    span.set_attributes({"rpc.grpc.status_code": int(outcome.code), "error.type": str(outcome.reason)})
    if outcome.code not in _CALLERS:
        span.set_status(Status(StatusCode.ERROR, outcome.message))


def _offset_ns() -> int:
    """Return what to add to a time on perf_counter_ns's clock for nanoseconds since 1970."""
    return time.time_ns() - time.perf_counter_ns()
