"""ModelInfer's other failures: typed contents, bytes that are no request, and the server's own troubles."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from tests.server.calling import Connect, Failure, failure_of
from tests.server.open_inference.asking import MODEL_INFER, infer, infer_request, messages, pair, refusal, stub_on
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE = 3, 4, 8, 13, 14


def good(model: str = "smooth_l1_grad", **more: Any) -> Any:
    return infer_request(model, pair(2, 3), **more)


# ---- Typed contents ----


def typed(dtype: str, **contents: Any) -> Any:
    request = good("l1")
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([1.0] * 6)
    request.inputs[1].datatype = dtype
    for name, values in contents.items():
        getattr(request.inputs[1].contents, name).extend(values)
    return request


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (typed("FP16"), "input TARGET: FP16 has no typed contents; send its elements in raw_input_contents"),
        (typed("BF16"), "input TARGET: BF16 has no typed contents"),
        (
            typed("FP32", fp64_contents=[1.0] * 6),
            "input TARGET: FP32 goes into fp32_contents, and another field is set",
        ),
        (typed("FP64", fp64_contents=[1.0] * 6, int_contents=[1]), "input TARGET: FP64 goes into fp64_contents, and"),
        (typed("INT8", int_contents=[128] * 6), "input TARGET: an element of int_contents is out of the range of its"),
        (
            typed("INT64", int_contents=[1] * 6),
            "input TARGET: INT64 goes into int64_contents, and another field is set",
        ),
        (typed("FP32", fp32_contents=[1.0] * 5), "input TARGET: it came with 20 bytes; shape [2, 3] of FP32 needs 24"),
        (typed("FP32"), "input TARGET: it came with 0 bytes; shape [2, 3] of FP32 needs 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_typed_contents_that_do_not_fit_are_refused(triton: Any, request_: Any, text: str) -> None:
    error = refusal(triton, request_)
    assert error.message.startswith(text)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "DATA_LENGTH_MISMATCH")


def test_an_error_names_the_request_by_its_id(triton: Any) -> None:
    assert refusal(triton, good("l1", id="mine", parameters={"beta": 1.0})).info.metadata["request_id"] == "mine"


def test_long_names_are_cut_in_the_texts(triton: Any) -> None:
    assert len(refusal(triton, good("x" * 60_000)).message) < 1000
    renamed = good()
    renamed.inputs[0].name = "x" * 60_000
    assert len(refusal(triton, renamed).message) < 1000


# ---- Bytes that are no request ----


def refused_bytes(channel: grpc.Channel, data: bytes) -> Failure:
    call: Callable[..., Any] = channel.unary_unary(MODEL_INFER)
    with pytest.raises(grpc.RpcError) as caught:
        call(data, timeout=PATIENCE_SECONDS)
    return failure_of(caught.value)


def test_bytes_that_are_no_message_are_refused(server: RunningServer, connect: Connect) -> None:
    error = refused_bytes(connect(server.address), b"\xff\xff\xff")
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert "grpc_service.proto" in error.message


def test_a_header_over_64_kib_is_refused(server: RunningServer, connect: Connect) -> None:
    request = good()
    request.inputs[0].parameters["x"].string_param = "y" * 70_000
    error = refused_bytes(connect(server.address), request.SerializeToString())
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "HEADER_TOO_LARGE")


def test_an_id_that_is_no_text_is_refused_also_where_the_request_is_known(
    server: RunningServer, connect: Connect
) -> None:
    channel = connect(server.address)
    data = good(id="ABCDEFGH").SerializeToString()
    call: Callable[..., Any] = channel.unary_unary(MODEL_INFER)
    call(data)
    error = refused_bytes(channel, data.replace(b"ABCDEFGH", b"\xff" * 8))
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "MALFORMED_MESSAGE")


# ---- The server's troubles ----


def test_a_full_queue_a_warm_up_and_a_passed_deadline_are_told_as_natively(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=2)
    stub = stub_on(connect(running.address))
    worker.hold()
    running_call = stub.ModelInfer.future(good(), timeout=PATIENCE_SECONDS)
    worker.wait_for_batch()
    late = stub.ModelInfer.future(good("mse", parameters={"timeout": 1000}), timeout=PATIENCE_SECONDS)
    eventually(lambda: running.batcher.waiting_requests == 1)
    full = refusal(stub, good())
    assert (full.code, full.info.reason) == (UNAVAILABLE, "QUEUE_FULL")
    assert full.retry_seconds is not None
    assert "grpc-retry-pushback-ms" in full.trailers
    time.sleep(0.002)  # the caller's own millisecond
    worker.release()
    with pytest.raises(grpc.RpcError) as caught:
        late.result()
    passed = failure_of(caught.value)
    assert (passed.code, passed.info.reason) == (DEADLINE_EXCEEDED, "DEADLINE_PASSED")
    assert running_call.result().model_name == "smooth_l1_grad"


def test_a_request_before_the_warm_up_is_told_to_come_back(connect: Connect) -> None:
    worker = HeldWorker()
    worker.hold_warm_up()
    running = RunningServer(worker=worker, metrics_port=-1)
    try:
        running.start(wait=False)
        stub = stub_on(connect(running.address))
        assert not stub.ServerReady(messages.ServerReadyRequest(), wait_for_ready=True).ready
        assert stub.ServerLive(messages.ServerLiveRequest()).live
        assert not stub.ModelReady(messages.ModelReadyRequest(name="mse")).ready
        index = stub.RepositoryIndex(messages.RepositoryIndexRequest()).models
        assert {one.state for one in index} == {"UNAVAILABLE"}
        assert not stub.RepositoryIndex(messages.RepositoryIndexRequest(ready=True)).models
        error = refusal(stub, good())
        assert (error.code, error.info.reason) == (UNAVAILABLE, "WARMING_UP")
    finally:
        running.stop()


def test_a_bug_is_answered_internal_and_tells_nothing(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    worker.failure = RuntimeError("secret")
    stub = stub_on(connect(start_server(worker=worker).address))
    error = refusal(stub, good())
    assert (error.code, error.info.reason) == (INTERNAL, "INTERNAL")
    assert "secret" not in error.message


def test_an_answer_over_the_message_limit_is_refused(start_server: StartServer, connect: Connect) -> None:
    stub = stub_on(connect(start_server(max_message_bytes=65_536).address))
    inputs = pair(1, 12_000) | {"TARGET": np.ones((1, 12_000), "i1")}  # 60,000 bytes, and 96,000 of loss and gradient
    error = refusal(stub, infer_request("l1_grad", inputs, parameters={"reduction": "none"}))
    assert (error.code, error.info.reason) == (RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
    assert "98056 bytes, at most 65536" in error.message
    assert infer(stub, infer_request("l1_grad", inputs))["GRAD"].shape == (1, 12_000)
