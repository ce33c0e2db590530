"""Stubs for the service's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.calling import Connect, stub_on
from tests.server.serving import RunningServer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from tests.server.spans import Spans


@pytest.fixture
def stub(server: RunningServer, connect: Connect) -> LossServiceStub:
    """Return a stub to the server that all tests share."""
    return stub_on(connect(server.address))


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """Return the OpenTelemetry of this process, for as long as a test runs."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return provider


@pytest.fixture
def spans(provider: TracerProvider) -> Spans:
    """Return what that exports."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from tests.server.spans import Spans

    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(exporter)


@pytest.fixture
def traced(spans: Spans) -> Iterator[RunningServer]:
    """Give a server that makes such spans."""
    with RunningServer(tracing=True, metrics_port=-1) as server:
        yield server
