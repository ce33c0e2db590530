"""Spans over OTLP, as --tracing sends them: to a collector of the test's own, which speaks the real protocol over gRPC."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from lossgrad_server import tracing
from tests.server import calling
from tests.server.calling import Connect
from tests.server.open_inference.asking import infer_request, pair, stub_on
from tests.server.requests import request
from tests.server.serving import PATIENCE_SECONDS, RunningServer, eventually
from tests.server.spans import PARENT, STAGES, UNSAMPLED

_, TRACE, SPAN, _ = PARENT.split("-")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what is exported; or takes it and never says so, until it is let go."""

    def __init__(self) -> None:
        self.exports: list[Any] = []
        self.has_begun = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.exports.append(request)
        self.has_begun.set()
        assert self.may_answer.wait(PATIENCE_SECONDS)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        """Return every span that came."""
        return [
            span
            for export in self.exports
            for of_resource in export.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    def stop(self) -> None:
        self.may_answer.set()
        self._server.stop(None).wait()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Give a collector; servers that start meanwhile send their spans there."""
    collector = Collector()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "losses")
    yield collector
    collector.stop()


def test_spans_of_both_protocols_arrive_at_a_collector(
    collector: Collector, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
    sampled = (("traceparent", PARENT),)
    with RunningServer(tracing=True, metrics_port=-1) as server:
        channel = connect(server.address)
        native, other = calling.stub_on(channel), stub_on(channel)
        native.ComputeLoss(request([1.0, 2.0], [0.0, 0.0], idempotency_key="native"), metadata=sampled)
        other.ModelInfer(infer_request("mse", pair(2, 5), id="other"), metadata=sampled)
        native.ComputeLoss(request([1.0], [0.0]), metadata=(("traceparent", UNSAMPLED),))
        eventually(lambda: len(collector.spans()) >= 10)  # while it serves: not only at its end
    spans = collector.spans()
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert sorted(span.name for span in spans) == sorted(
        [*STAGES, *STAGES, "lossgrad_api.v1.LossService/ComputeLoss", "inference.GRPCInferenceService/ModelInfer"]
    )
    requests = [span for span in spans if span.kind == span.SPAN_KIND_SERVER]
    assert {span.parent_span_id.hex() for span in requests} == {SPAN}
    told = [{one.key: one.value.string_value for one in span.attributes} for span in requests]
    assert {one["lossgrad.request_id"]: one["lossgrad.api"] for one in told} == {
        "native": "native",
        "other": "open_inference",
    }
    for span in requests:
        stages = [one for one in spans if one.parent_span_id == span.span_id]
        assert [one.name for one in sorted(stages, key=lambda one: one.end_time_unix_nano)] == STAGES
        total = sum(one.end_time_unix_nano - one.start_time_unix_nano for one in stages)
        assert total == span.end_time_unix_nano - span.start_time_unix_nano > 0
    resources = [of_resource.resource for export in collector.exports for of_resource in export.resource_spans]
    names = {
        one.value.string_value for resource in resources for one in resource.attributes if one.key == "service.name"
    }
    assert names == {"losses"}


def test_what_is_left_is_exported_when_the_server_stops(
    collector: Collector, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    with RunningServer(tracing=True, metrics_port=-1) as server:
        calling.stub_on(connect(server.address)).ComputeLoss(request([1.0], [0.0]))
        assert not collector.exports
    assert len(collector.spans()) == 1 + len(STAGES)


def test_a_collector_that_does_not_answer_holds_up_neither_calls_nor_the_end(
    collector: Collector, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "LAST_EXPORT_SECONDS", 0.1)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector.may_answer.clear()
    with caplog.at_level(logging.WARNING, "lossgrad_server"), RunningServer(tracing=True, metrics_port=-1) as server:
        stub = calling.stub_on(connect(server.address))
        stub.ComputeLoss(request([1.0], [0.0]))
        assert collector.has_begun.wait(PATIENCE_SECONDS)
        for _ in range(3):
            assert stub.ComputeLoss(request([1.0], [0.0]), timeout=PATIENCE_SECONDS).results
    assert not collector.may_answer.is_set()  # and still the server has stopped
    said = [record.getMessage() for record in caplog.records if record.name == tracing.__name__]
    assert said == ["The last spans were not taken within 0.1 s; leaving them"]
