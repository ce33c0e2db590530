"""Spans of requests, from the caller's to the server's stages, with OpenTelemetry's in-memory exporter."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import lossgrad
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.config import ConfigError
from tests.server.accumulate_calls import SUM, config, slice_of
from tests.server.calling import stub_on
from tests.server.requests import request
from tests.server.serving import HeldWorker, RunningServer
from tests.server.spans import PARENT, STAGES, UNSAMPLED, Spans, attributes_of, context_of, id_of, parent_of, trace_of

ONES = np.ones(3, np.float32)


def test_a_calls_span_has_the_callers_parent_and_stages_that_add_up(traced: RunningServer, spans: Spans) -> None:
    with lossgrad.LossClient(traced.address) as client, trace.get_tracer("test").start_as_current_span("work") as work:
        client.smooth_l1(ONES, ONES, gradient=True, idempotency_key="mine")
    (server,) = spans.servers(1)
    (caller,) = spans.of_kind(SpanKind.CLIENT)
    assert caller.name == "lossgrad.compute"
    assert parent_of(caller) == work.get_span_context().span_id
    assert (trace_of(server), parent_of(server)) == (trace_of(caller), id_of(caller))
    assert server.name == "lossgrad_api.v1.LossService/ComputeLoss"
    expected = {
        "rpc.system": "grpc",
        "rpc.service": "lossgrad_api.v1.LossService",
        "rpc.method": "ComputeLoss",
        "rpc.grpc.status_code": 0,
        "lossgrad.api": "native",
        "lossgrad.loss": "smooth_l1",
        "lossgrad.mode": "loss_grad",
        "lossgrad.element_count": 3,
        "lossgrad.request_id": "mine",
    }
    assert expected.items() <= attributes_of(server).items()
    stages = spans.children(server)
    assert [stage.name for stage in stages] == STAGES
    assert stages[0].start_time == server.start_time
    assert stages[-1].end_time == server.end_time
    for before, after in itertools.pairwise(stages):
        assert before.end_time == after.start_time
    assert attributes_of(stages[2])["lossgrad.batch.request_count"] == 1
    assert (caller.start_time or 0) <= (server.start_time or 0) <= (server.end_time or 0)


def test_pairs_that_travel_in_one_message_have_traces_of_their_own(traced: RunningServer, spans: Spans) -> None:
    def pairs() -> Iterator[tuple[Any, Any]]:
        for number in range(3):
            with trace.get_tracer("test").start_as_current_span(f"pair {number}"):
                yield ONES, ONES * number

    with lossgrad.LossClient(traced.address) as client:
        list(client.stream(pairs(), lossgrad.L1()))
    servers = spans.servers(3)
    callers = spans.of_kind(SpanKind.CLIENT)
    assert {span.name for span in callers} == {"lossgrad.stream"}
    assert {(trace_of(span), parent_of(span)) for span in servers} == {
        (trace_of(span), id_of(span)) for span in callers
    }
    assert len({trace_of(span) for span in servers}) == 3
    assert all([stage.name for stage in spans.children(server)] == STAGES for server in servers)


async def test_calls_that_share_a_stream_stay_in_their_own_traces(traced: RunningServer, spans: Spans) -> None:
    async def call(number: int) -> None:
        with trace.get_tracer("test").start_as_current_span(f"task {number}"):
            await client.l1(ONES, ONES)

    async with lossgrad.AsyncLossClient(traced.address) as client:
        await client.l1(ONES, ONES)  # of no trace but its own; the stream is not opened in a later one
        await asyncio.gather(*(call(number) for number in range(4)))
        servers = await asyncio.to_thread(spans.servers, 5)
    callers = spans.of_kind(SpanKind.CLIENT)
    assert {(trace_of(span), parent_of(span)) for span in servers} == {
        (trace_of(span), id_of(span)) for span in callers
    }
    assert len({trace_of(span) for span in servers}) == 5
    assert {attributes_of(span)["lossgrad.api"] for span in servers} == {"stream"}


def test_an_evaluations_slices_belong_to_the_span_around_it(traced: RunningServer, spans: Spans) -> None:
    with lossgrad.LossClient(traced.address) as client, trace.get_tracer("test").start_as_current_span("work") as work:
        client.evaluate([(ONES, ONES)] * 3, lossgrad.L1())
    context = work.get_span_context()
    assert {(trace_of(span), parent_of(span)) for span in spans.servers(3)} == {(context.trace_id, context.span_id)}


def test_what_is_refused_says_why_and_a_callers_mistake_is_no_error_of_the_server(
    traced: RunningServer, spans: Spans
) -> None:
    with lossgrad.LossClient(traced.address) as client:
        with pytest.raises(lossgrad.InvalidRequest) as unary:
            client.l1(ONES, ONES[:2])
        (streamed,) = client.compute_many([(ONES, ONES[:2])], lossgrad.L1(), on_error="return")
    assert isinstance(streamed, lossgrad.InvalidRequest)
    for span, error in zip(spans.servers(2), (unary.value, streamed), strict=True):
        attributes = attributes_of(span)
        assert attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert attributes["error.type"] == "SHAPE_MISMATCH"
        assert span.status.status_code is StatusCode.UNSET
        assert error.request_id
    for span in spans.of_kind(SpanKind.CLIENT):
        assert span.status.status_code is StatusCode.ERROR
        assert attributes_of(span)["error.type"] == "SHAPE_MISMATCH"


def test_what_fails_here_is_found_in_the_log_by_its_request_and_its_trace(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    worker = HeldWorker()
    with (
        RunningServer(worker=worker, tracing=True, metrics_port=-1) as server,
        lossgrad.LossClient(server.address, retries=0) as client,
    ):
        worker.failure = ValueError("a bug")
        with pytest.raises(lossgrad.ServerError) as unary, caplog.at_level(logging.ERROR):
            client.l1(ONES, ONES, idempotency_key="mine")
        (streamed,) = client.compute_many([(ONES, ONES)], lossgrad.L1(), on_error="return")
    first, second = spans.servers(2)
    assert first.status.status_code is StatusCode.ERROR
    logged = {vars(record)["request_id"]: vars(record) for record in caplog.records if "request_id" in vars(record)}
    assert unary.value.request_id == "mine"
    assert logged["mine"]["trace_id"] == f"{trace_of(first):032x}"
    assert logged[streamed.request_id]["trace_id"] == f"{trace_of(second):032x}"
    assert streamed.request_id in logged[streamed.request_id]["message"]


def call(server: RunningServer, *metadata: tuple[str, str]) -> None:
    """Make a call as a client without this SDK does."""
    with grpc.insecure_channel(server.address) as channel:
        stub_on(channel).ComputeLoss(request(ONES, ONES), metadata=metadata, timeout=30)


def test_the_callers_context_is_taken_over_state_and_all(traced: RunningServer, spans: Spans) -> None:
    call(traced, ("traceparent", PARENT), ("tracestate", "vendor=1"))
    (span,) = spans.servers(1)
    assert f"{trace_of(span):032x}" == PARENT.split("-")[1]
    assert f"{parent_of(span):016x}" == PARENT.split("-")[2]
    assert context_of(span).trace_state.to_header() == "vendor=1"


@pytest.mark.parametrize("context", ["", "nonsense", "ff" + PARENT[2:], "00-" + "0" * 32 + PARENT[35:], PARENT.upper()])
def test_a_context_that_cannot_be_read_begins_a_trace(traced: RunningServer, spans: Spans, context: str) -> None:
    call(traced, ("traceparent", context))
    (span,) = spans.servers(1)
    assert span.parent is None
    assert trace_of(span) != 0


def test_who_does_not_sample_gets_no_spans_and_none_are_made_here(
    provider: TracerProvider, traced: RunningServer, spans: Spans
) -> None:
    call(traced, ("traceparent", UNSAMPLED))
    call(traced, ("traceparent", PARENT))
    (span,) = spans.servers(1)
    assert f"{trace_of(span):032x}" == PARENT.split("-")[1]


def test_a_requests_own_context_wins_over_its_streams(traced: RunningServer, spans: Spans) -> None:
    own = PARENT.replace("b7ad6b7169203331", "1111111111111111")
    one = request(ONES, ONES)
    message = pb.StreamComputeLossRequest(
        requests=[pb.TaggedRequest(tag=1, request=one, traceparent=own), pb.TaggedRequest(tag=2, request=one)]
    )
    with grpc.insecure_channel(traced.address) as channel:
        answers = stub_on(channel).StreamComputeLoss(iter([message]), metadata=[("traceparent", PARENT)], timeout=30)
        assert sum(len(answer.responses) for answer in answers) == 2
    assert {f"{parent_of(span):016x}" for span in spans.servers(2)} == {"1111111111111111", "b7ad6b7169203331"}


def test_a_slice_of_an_accumulation_is_a_request_too(traced: RunningServer, spans: Spans) -> None:
    messages = iter([config(SUM), slice_of(1, ONES, ONES)])
    with grpc.insecure_channel(traced.address) as channel:
        list(stub_on(channel).AccumulateLoss(messages, metadata=[("traceparent", PARENT)], timeout=30))
    (span,) = spans.servers(1)
    assert span.name == "lossgrad_api.v1.LossService/AccumulateLoss"
    assert f"{trace_of(span):032x}" == PARENT.split("-")[1]
    assert [stage.name for stage in spans.children(span)] == STAGES


def test_durations_show_traces_as_exemplars_in_openmetrics(traced: RunningServer, spans: Spans) -> None:
    call(traced, ("traceparent", PARENT))
    call(traced, ("traceparent", UNSAMPLED[:3] + "1" * 32 + UNSAMPLED[35:]))
    spans.servers(1)
    text = generate_latest(traced.metrics.registry).decode()  # type: ignore[no-untyped-call]
    found = {
        (sample.name, sample.labels.get("stage")): sample.exemplar
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.exemplar is not None
    }
    stage = "lossgrad_stage_duration_seconds_bucket"
    assert set(found) == {
        ("lossgrad_request_duration_seconds_bucket", None),
        (stage, "queue"),
        (stage, "compute"),
    }
    assert {exemplar.labels["trace_id"] for exemplar in found.values()} == {PARENT.split("-")[1]}


def test_without_the_setting_nothing_is_traced_and_opentelemetry_is_not_needed(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "lossgrad_server.tracing" or name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    with (
        mock.patch.dict(sys.modules, {"opentelemetry": None}),
        RunningServer(metrics_port=-1) as server,
    ):
        call(server, ("traceparent", PARENT))
        with pytest.raises(ConfigError, match=r"--tracing needs opentelemetry.*pip install 'lossgrad\[otel\]'"):
            RunningServer(tracing=True, metrics_port=-1).start()
    assert not spans.finished()


def test_the_standard_variables_say_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from lossgrad_server.tracing import create_tracer

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    tracer = create_tracer()
    provider: Any = tracer._provider
    assert provider.resource.attributes["service.name"] == "ours"
    assert isinstance(provider.sampler, ParentBased)
    assert isinstance(provider.sampler._root, TraceIdRatioBased)
    assert provider.sampler._root.rate == 0.25
    tracer.close()
