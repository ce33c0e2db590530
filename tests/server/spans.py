"""The spans that a test's servers and clients make, as OpenTelemetry's in-memory exporter has them."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind

from tests.server.serving import eventually

STAGES = ["receive", "queue", "compute", "send"]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


class Spans:
    """What was exported."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def finished(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def of_kind(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.finished() if span.kind is kind]

    def servers(self, count: int) -> list[ReadableSpan]:
        """Wait for the spans of so many requests on the server; return them in the order in which they began."""
        eventually(lambda: len(self.of_kind(SpanKind.SERVER)) >= count)
        found = self.of_kind(SpanKind.SERVER)
        assert len(found) == count
        return sorted(found, key=lambda span: span.start_time or 0)

    def children(self, of: ReadableSpan) -> list[ReadableSpan]:
        found = [span for span in self.finished() if span.parent and span.parent.span_id == id_of(of)]
        return sorted(found, key=lambda span: (span.start_time or 0, span.end_time or 0))


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def id_of(span: ReadableSpan) -> int:
    return context_of(span).span_id


def trace_of(span: ReadableSpan) -> int:
    return context_of(span).trace_id


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})
