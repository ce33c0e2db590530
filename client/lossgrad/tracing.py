"""OpenTelemetry's traces, as far as a client takes part: a span for each call and each pair of a stream, passed on.

Only in a process that uses OpenTelemetry itself, that is, has a tracer provider or a current span: without that there is no
trace to take part in, and nothing here is done. Servers are told the W3C trace context, by metadata or, for requests that
share a stream, beside each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lossgrad.errors import LossgradError
from lossgrad_api.codec import encode_trace

Metadata = tuple[tuple[str, str], ...]

_tracers: dict[int, tuple[Any, Any]] = {}  # the provider of this process, by its id, and the tracer that it gave


def is_on() -> bool:
    """Whether this process uses OpenTelemetry: many libraries import it, and few programs then provide a tracer."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return False
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider) or (
        trace.get_current_span() is not trace.INVALID_SPAN
    )


@contextmanager
def call_span(name: str) -> Iterator[None]:
    """Make what runs inside a span, which is the current one meanwhile."""
    trace = sys.modules["opentelemetry.trace"]
    with _tracer(trace).start_as_current_span(name, kind=trace.SpanKind.CLIENT) as span:
        try:
            yield
        except LossgradError as error:
            _tell_error(span, error)
            raise


def pair_span() -> Any:
    """Begin the span of a pair of a stream, under the current one. `end_span` ends it."""
    trace = sys.modules["opentelemetry.trace"]
    return _tracer(trace).start_span("lossgrad.stream", kind=trace.SpanKind.CLIENT)


def end_span(span: Any, outcome: object) -> None:
    """End a span of `pair_span` with what became of the pair."""
    if isinstance(outcome, LossgradError):
        _tell_error(span, outcome)
        trace = sys.modules["opentelemetry.trace"]
        span.set_status(trace.Status(trace.StatusCode.ERROR, outcome.message))
    span.end()


def fields_of(span: Any) -> bytes:
    """Return what a request of a stream says of a span that it belongs to; nothing where there is no trace."""
    context = span.get_span_context()
    return encode_trace(_traceparent(context), context.trace_state.to_header()) if context.is_valid else b""


def current_fields() -> bytes:
    """Return what a request of a stream says of the current span."""
    return fields_of(sys.modules["opentelemetry.trace"].get_current_span())


def traced(metadata: Metadata) -> Metadata:
    """Return a call's metadata with the current trace context, if there is one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return metadata
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return metadata
    state = context.trace_state.to_header()
    own = (("traceparent", _traceparent(context)), *((("tracestate", state),) if state else ()))
    return (*metadata, *own)


def _traceparent(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _tell_error(span: Any, error: LossgradError) -> None:
    span.set_attribute("rpc.grpc.status_code", error.code.value[0])
    if error.reason:
        span.set_attribute("error.type", error.reason)
    if error.request_id:
        span.set_attribute("lossgrad.request_id", error.request_id)


def _tracer(trace: Any) -> Any:
    provider = trace.get_tracer_provider()
    known = _tracers.get(id(provider))
    if known is None or known[0] is not provider:
        _tracers.clear()  # there is but one at a time
        known = _tracers[id(provider)] = (provider, provider.get_tracer("lossgrad"))
    return known[1]
