"""Triton's nv_inference_* series: there only when asked for, with Triton's names and labels, equal to ModelStatistics."""

from __future__ import annotations

from typing import Any

import pytest

from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.transport.open_inference.models import MODELS
from lossgrad_server.transport.open_inference.statistics import Failure, failure_of
from tests.server import calling
from tests.server.calling import Connect
from tests.server.open_inference.asking import infer_request, messages, pair, refusal, stub_on
from tests.server.requests import request
from tests.server.scraping import Scrape
from tests.server.serving import HeldWorker, StartServer, eventually


def test_there_are_none_unless_asked_for(start_server: StartServer) -> None:
    assert "nv_inference" not in start_server(metrics_port=0).scrape()


def test_they_are_what_the_statistics_say(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(metrics_port=0, triton_metrics=True, worker=worker)
    stub: Any = stub_on(connect(running.address))
    stub.ModelInfer(infer_request("mse", pair(2, 5)))
    refusal(stub, infer_request("mse", pair(2, 5), parameters={"denominator": 0}))
    worker.hold()
    waiting = [stub.ModelInfer.future(infer_request("mse", pair(rows, 5))) for rows in (3, 4)]
    eventually(lambda: running.batcher.admitted_requests == 2)
    found = Scrape(running.scrape())
    of_mse = {"model": "mse", "version": "1"}
    assert found("nv_inference_pending_request_count", **of_mse) == 2
    worker.release()
    for call in waiting:
        call.result()
    found = Scrape(running.scrape())
    (told,) = stub.ModelStatistics(messages.ModelStatisticsRequest(name="mse")).model_stats
    assert {name: found(f"nv_inference_{name}", **of_mse) for name in ("request_success", "count", "exec_count")} == {
        "request_success": 3,
        "count": 9,
        "exec_count": told.execution_count,
    }
    parts = told.inference_stats
    for name, duration in (
        ("request", parts.success),
        ("queue", parts.queue),
        ("compute_input", parts.compute_input),
        ("compute_infer", parts.compute_infer),
        ("compute_output", parts.compute_output),
    ):
        assert found(f"nv_inference_{name}_duration_us", **of_mse) == duration.ns // 1000, name
    assert found("nv_inference_pending_request_count", **of_mse) == 0
    assert found("nv_inference_request_failure", **of_mse, reason="OTHER") == 1
    assert found("nv_inference_request_success", model="l1", version="1") == 0
    # The models and the reasons, and nothing that a caller names.
    assert len([name for name, _ in found.series() if name.startswith("nv_inference")]) == len(MODELS) * (
        9 + len(Failure)
    )


@pytest.mark.parametrize(
    ("code", "reason", "failure"),
    [
        (Code.UNAVAILABLE, Reason.QUEUE_FULL, Failure.REJECTED),
        (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_PASSED, Failure.REJECTED),
        (Code.CANCELLED, Reason.CANCELLED, Failure.CANCELED),
        (Code.INTERNAL, Reason.INTERNAL, Failure.BACKEND),
        (Code.RESOURCE_EXHAUSTED, Reason.OUT_OF_DEVICE_MEMORY, Failure.BACKEND),
        (Code.UNAVAILABLE, Reason.DEVICE_FAILED, Failure.BACKEND),
        (Code.INVALID_ARGUMENT, Reason.BAD_SHAPE, Failure.OTHER),
    ],
)
def test_failures_have_tritons_words(code: Code, reason: Reason, failure: Failure) -> None:
    assert failure_of(RequestError("", code=code, reason=reason)) is failure


def test_native_requests_are_none_of_them(start_server: StartServer, connect: Connect) -> None:
    running = start_server(metrics_port=0, triton_metrics=True)
    calling.stub_on(connect(running.address)).ComputeLoss(request([1.0], [2.0]))
    assert not any(
        value for (name, _), value in Scrape(running.scrape()).samples.items() if name.startswith("nv_inference")
    )


def test_without_the_protocol_there_is_nothing_to_count() -> None:
    with pytest.raises(ConfigError, match="--open-inference is false"):
        ServerConfig(triton_metrics=True, open_inference=False)
