"""Requests of the Open Inference Protocol have spans as native ones have: under the caller's trace, with the same stages."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tritonclient.grpc
from opentelemetry.trace import StatusCode

from tests.server.calling import Connect
from tests.server.open_inference.asking import infer_request, pair, refusal, stub_on
from tests.server.serving import RunningServer
from tests.server.spans import PARENT, STAGES, UNSAMPLED, Spans, attributes_of, id_of, parent_of, trace_of

triton: Any = tritonclient.grpc  # it has no types

_, TRACE, SPAN, _ = PARENT.split("-")
SERVICE = "inference.GRPCInferenceService"


def assert_stages_add_up(spans: Spans, server: Any) -> dict[str, Any]:
    """Return the attributes of the stage `compute`."""
    stages = spans.children(server)
    assert [stage.name for stage in stages] == STAGES
    assert (stages[0].start_time, stages[-1].end_time) == (server.start_time, server.end_time)
    for before, after in itertools.pairwise(stages):
        assert before.end_time == after.start_time
    return attributes_of(stages[2])


def test_tritonclients_call_is_a_span_under_its_callers(traced: RunningServer, spans: Spans) -> None:
    values = np.ones((2, 5), np.float32)
    inputs = [triton.InferInput(name, values.shape, "FP32") for name in ("INPUT", "TARGET")]
    for one in inputs:
        one.set_data_from_numpy(values)
    with triton.InferenceServerClient(traced.address) as client:
        client.infer("huber_grad", inputs, request_id="mine", headers={"traceparent": PARENT})
    (server,) = spans.servers(1)
    assert (trace_of(server), parent_of(server)) == (int(TRACE, 16), int(SPAN, 16))
    assert server.name == f"{SERVICE}/ModelInfer"
    expected = {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "lossgrad.api": "open_inference",
        "lossgrad.loss": "huber",
        "lossgrad.mode": "loss_grad",
        "lossgrad.element_count": 10,
        "lossgrad.request_id": "mine",
    }
    assert expected.items() <= attributes_of(server).items()
    computed = assert_stages_add_up(spans, server)
    assert (computed["lossgrad.batch.request_count"], computed["lossgrad.batch.element_count"]) == (1, 10)


def test_each_request_of_a_stream_is_a_span_of_its_own(traced: RunningServer, spans: Spans, connect: Connect) -> None:
    requests = [infer_request("mse", pair(rows, 5), id=f"of {rows}") for rows in (1, 2, 3)]
    answers = stub_on(connect(traced.address)).ModelStreamInfer(iter(requests), metadata=(("traceparent", PARENT),))
    assert [answer.infer_response.id for answer in answers] == ["of 1", "of 2", "of 3"]
    found = spans.servers(3)
    assert len({id_of(server) for server in found}) == 3
    for server, rows in zip(found, (1, 2, 3), strict=True):
        assert server.name == f"{SERVICE}/ModelStreamInfer"
        assert (trace_of(server), parent_of(server)) == (int(TRACE, 16), int(SPAN, 16))
        told = attributes_of(server)
        assert (told["lossgrad.api"], told["lossgrad.request_id"]) == ("open_inference_stream", f"of {rows}")
        assert told["lossgrad.element_count"] == 5 * rows
        assert_stages_add_up(spans, server)


def test_what_is_refused_while_it_is_computed_says_why(traced: RunningServer, spans: Spans, connect: Connect) -> None:
    late = infer_request("mse", pair(2, 5), id="late", parameters={"timeout": 1})  # a microsecond
    refusal(stub_on(connect(traced.address)), late)
    (server,) = spans.servers(1)
    told = attributes_of(server)
    assert (told["rpc.grpc.status_code"], told["error.type"]) == (4, "DEADLINE_PASSED")
    assert told["lossgrad.request_id"] == "late"
    assert server.status.status_code is StatusCode.ERROR


def test_who_does_not_sample_gets_no_span(traced: RunningServer, spans: Spans, connect: Connect) -> None:
    stub = stub_on(connect(traced.address))
    stub.ModelInfer(infer_request("l1", pair(1, 3)), metadata=(("traceparent", UNSAMPLED),))
    stub.ModelInfer(infer_request("l1", pair(1, 3)), metadata=(("traceparent", PARENT),))
    (server,) = spans.servers(1)
    assert trace_of(server) == int(TRACE, 16)
