"""Errors through the generated stubs: the code, the text and the details, whatever goes wrong and wherever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import pytest

import lossgrad
from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_server.errors import Reason, Unavailable
from lossgrad_server.transport import pipeline
from lossgrad_server.transport.status import pushback
from lossgrad_server.work import BatchResult, Done, FailureKind, WorkFailure, WorkItem
from tests.server.calling import Connect, Failure, failure, failure_of, stub_on
from tests.server.requests import request, zeros
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually, handled

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE = 3, 4, 8, 13, 14
PUSHBACK = "grpc-retry-pushback-ms"

GOOD = request([1.0, 2.0], [3.0, 5.0])
BAD = request([1.0, 2.0], [3.0, 5.0], pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=-0.5)))


def compute_bytes(channel: grpc.Channel) -> Callable[..., Any]:
    """Return ComputeLoss over bare bytes."""
    return channel.unary_unary(codec.COMPUTE_LOSS)


def stream_call(channel: grpc.Channel) -> Callable[..., Any]:
    """Return StreamComputeLoss over bare bytes."""
    return channel.stream_stream(codec.STREAM_COMPUTE_LOSS)


def stream_bytes(channel: grpc.Channel, *messages: bytes) -> Failure:
    """Send bare bytes on a stream that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stream_call(channel)(iter(messages), timeout=PATIENCE_SECONDS))
    return failure_of(caught.value)


def test_a_push_back_is_never_0_with_which_grpc_loses_the_next_attempt(start_server: StartServer) -> None:
    running = start_server()
    for seconds, said in ((0.0, "1"), (0.0004, "1"), (0.05, "50")):
        assert pushback(Unavailable("", reason=Reason.DRAINING, retry_after_seconds=seconds)) == ((PUSHBACK, said),)
    # And so a client with gRPC's own retries learns at once, and not at its deadline, that nobody takes its call.
    running.batcher.close(0)
    with lossgrad.LossClient(running.address) as client:
        began = time.monotonic()
        with pytest.raises(lossgrad.Unavailable, match="shutting down"):
            client.l1([1.0], [2.0], timeout=PATIENCE_SECONDS)
        assert time.monotonic() - began < PATIENCE_SECONDS / 3
    eventually(lambda: handled(running, "ComputeLoss", "UNAVAILABLE") == 3)


# ---- The caller's mistakes ----


def test_a_bad_request_names_the_field_the_reason_and_the_request(stub: LossServiceStub) -> None:
    named = pb.ComputeLossRequest()
    named.CopyFrom(BAD)
    named.idempotency_key = "mine"
    error = failure(stub.ComputeLoss, named)
    assert error.code == INVALID_ARGUMENT
    assert error.message == "specs[0].smooth_l1.beta is -0.5; it must be at least 0"
    assert error.violations == [("specs[0].smooth_l1.beta", error.message, "BAD_PARAMETER")]
    assert (error.info.domain, error.info.reason) == ("lossgrad", "BAD_PARAMETER")
    assert error.info.metadata["request_id"] == "mine"
    assert error.retry_seconds is None
    assert PUSHBACK not in error.trailers


def test_an_error_without_a_key_gets_a_name_of_its_own(stub: LossServiceStub) -> None:
    first, second = (failure(stub.ComputeLoss, BAD).info.metadata["request_id"] for _ in range(2))
    assert first != second
    assert len(first) == len(second) == 32


@pytest.mark.parametrize("garbage", [b"\x3a\x7f", b"\xff" * 100, b"not protobuf at all", b"\x00"])
def test_garbage_is_the_callers_mistake(server: RunningServer, connect: Connect, garbage: bytes) -> None:
    channel = connect(server.address)
    for error in (failure(compute_bytes(channel), garbage), stream_bytes(channel, garbage)):
        assert error.code == INVALID_ARGUMENT
        assert error.info.reason == "MALFORMED_MESSAGE"
        assert "cannot be read" in error.message
        assert "DecodeError" not in error.message


def test_a_header_over_64_kib_is_the_callers_mistake(server: RunningServer, connect: Connect) -> None:
    data = GOOD.SerializeToString() + b"\x78\x01" * 40_000
    channel = connect(server.address)
    error = failure(compute_bytes(channel), data)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "HEADER_TOO_LARGE")
    assert "65536" in error.message
    assert stream_bytes(channel, b"\x78\x01" * 40_000).info.reason == "HEADER_TOO_LARGE"


def test_more_requests_in_a_message_than_the_limit_are_refused(start_server: StartServer, connect: Connect) -> None:
    channel = connect(start_server(max_stream_requests=4).address)
    five = pb.StreamComputeLossRequest(requests=[pb.TaggedRequest(tag=tag, request=GOOD) for tag in range(5)])
    error = stream_bytes(channel, five.SerializeToString())
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "TOO_MANY_REQUESTS_IN_MESSAGE")
    assert "more than 4 requests" in error.message
    assert [field for field, _, _ in error.violations] == ["requests"]


# ---- Sizes ----


@pytest.fixture
def small(start_server: StartServer, connect: Connect) -> grpc.Channel:
    """Give a channel to a server that takes 64 KiB."""
    return connect(start_server(max_message_bytes=65536).address)


def test_a_message_just_over_the_limit_is_refused_with_both_numbers_and_details(small: grpc.Channel) -> None:
    message = request(zeros(10_000), zeros(10_000)).SerializeToString()
    for error in (failure(compute_bytes(small), message), stream_bytes(small, message)):
        assert (error.code, error.info.reason) == (RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert f"{len(message)} bytes, at most 65536" in error.message
        assert PUSHBACK not in error.trailers


def test_a_message_far_over_the_limit_is_refused_by_grpc_with_both_numbers(small: grpc.Channel) -> None:
    message = bytes(4 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        compute_bytes(small)(message, timeout=PATIENCE_SECONDS)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(len(message)) in error.details()
    assert str(65536 + (1 << 20)) in error.details()


def test_a_message_of_exactly_the_limit_is_taken(small: grpc.Channel) -> None:
    message = request(zeros(8000), zeros(8000), pb.LossSpec(l1=pb.L1Loss())).SerializeToString()
    padding = 65536 - len(message)
    compute_bytes(small)(message + b"\x7a" + bytes((padding - 3 & 0x7F | 0x80, padding - 3 >> 7)) + bytes(padding - 3))


def test_an_answer_over_the_limit_is_refused_before_it_is_computed(small: grpc.Channel) -> None:
    error = failure(stub_on(small).ComputeLoss, request(zeros(6000), zeros(6000), *[SMOOTH_L1_OF_EACH] * 3))
    assert (error.code, error.info.reason) == (RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
    assert f"{3 * (24_000 + 1024)} bytes, at most 65536" in error.message


SMOOTH_L1_OF_EACH = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(), reduction=pb.REDUCTION_NONE)


# ---- Bugs of ours ----


def assert_tells_nothing(error: Failure, caplog: pytest.LogCaptureFixture) -> None:
    assert (error.code, error.info.reason) == (INTERNAL, "INTERNAL")
    told = error.status.SerializeToString() + repr(error.trailers).encode()
    for inside in (b"secret", b"RuntimeError", b"Traceback", b".py", b"lossgrad_server"):
        assert inside not in told
    assert "secret" in caplog.text  # the log says why


@pytest.fixture
def one_request() -> bytes:
    return pb.StreamComputeLossRequest(requests=[pb.TaggedRequest(tag=5, request=GOOD)]).SerializeToString()


def raise_secret(*_: object, **__: object) -> None:
    raise RuntimeError("secret")


def test_a_bug_in_the_checks_tells_nothing_of_our_insides(
    start_server: StartServer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_request: bytes,
) -> None:
    running = start_server()
    channel = connect(running.address)
    monkeypatch.setattr(running.server._core.pipeline.checker, "check", raise_secret)
    assert_tells_nothing(failure(stub_on(channel).ComputeLoss, GOOD), caplog)
    assert_tells_nothing(stream_bytes(channel, one_request), caplog)


def test_a_bug_in_the_engine_tells_nothing_and_ends_no_stream(
    start_server: StartServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    worker = HeldWorker()
    stub = stub_on(connect(start_server(worker=worker).address))
    worker.failure = RuntimeError("secret")
    assert_tells_nothing(failure(stub.ComputeLoss, GOOD), caplog)
    requests = pb.StreamComputeLossRequest(requests=[pb.TaggedRequest(tag=tag, request=GOOD) for tag in range(3)])
    (message,) = stub.StreamComputeLoss(iter([requests]), timeout=PATIENCE_SECONDS)
    assert [answer.tag for answer in message.responses] == [0, 1, 2]
    for answer in message.responses:
        assert_tells_nothing(Failure(answer.error), caplog)
    worker.failure = None
    assert stub.ComputeLoss(GOOD).results


def test_a_request_that_its_worker_died_of_is_in_the_log_with_its_id_and_its_caller(
    start_server: StartServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    class Crashing(HeldWorker):
        def submit(self, items: Sequence[WorkItem]) -> Done:
            crashed = WorkFailure(FailureKind.WORKER_CRASHED, "it died of this, twice")
            return Done(BatchResult([crashed] * len(items), 0, 0, 0))

    stub = stub_on(connect(start_server(worker=Crashing()).address))
    error = failure(stub.ComputeLoss, GOOD)
    assert (error.code, error.info.reason) == (INTERNAL, "WORKER_CRASHED")
    (line,) = (vars(record) for record in caplog.records if "INTERNAL" in record.getMessage())
    assert (line["request_id"], line["reason"]) == (error.info.metadata["request_id"], "WORKER_CRASHED")
    assert line["caller"].startswith("ipv4:127.0.0.1:")


def test_a_bug_where_answers_are_made_leaves_nobody_waiting(
    server: RunningServer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_request: bytes,
) -> None:
    stub = stub_on(connect(server.address))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "response_parts", raise_secret)
        assert_tells_nothing(failure(stub.ComputeLoss, GOOD), caplog)
        requests = pb.StreamComputeLossRequest.FromString(one_request)
        (message,) = stub.StreamComputeLoss(iter([requests]), timeout=PATIENCE_SECONDS)
        assert_tells_nothing(Failure(message.responses[0].error), caplog)
    assert stub.ComputeLoss(GOOD).results


def test_a_bug_where_a_stream_writes_ends_it_though_the_caller_sends_on(
    server: RunningServer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_request: bytes,
) -> None:
    ended = threading.Event()

    def messages() -> Iterator[bytes]:
        yield one_request
        ended.wait(PATIENCE_SECONDS)  # a caller that keeps its side open

    monkeypatch.setattr(codec, "encode_stream_response", raise_secret)
    channel = connect(server.address)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream_call(channel)(messages(), timeout=PATIENCE_SECONDS))
    ended.set()
    assert_tells_nothing(failure_of(caught.value), caplog)


# ---- What the server is at ----


def test_a_full_server_says_when_to_come_back(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    stub = stub_on(connect(start_server(worker=worker, max_queued_requests=1).address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    error = failure(stub.ComputeLoss, GOOD)
    assert (error.code, error.info.reason) == (UNAVAILABLE, "QUEUE_FULL")
    assert "holds 1 requests, its limit is 1" in error.message
    assert error.trailers[PUSHBACK] == "50"
    assert error.retry_seconds == pytest.approx(0.05)
    worker.release()
    assert inside.result(timeout=PATIENCE_SECONDS).results
    assert stub.ComputeLoss(GOOD).results


def test_a_server_full_of_bytes_names_them(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    stub = stub_on(connect(start_server(worker=worker, max_queued_bytes=30).address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)  # two tensors of 8 bytes and a gradient
    worker.wait_for_batch()
    error = failure(stub.ComputeLoss, GOOD)
    assert (error.code, error.info.reason) == (UNAVAILABLE, "QUEUE_BYTES_FULL")
    assert "needs 24 bytes, 24 of the server's 30 are taken" in error.message
    assert error.trailers[PUSHBACK] == "50"
    worker.release()
    assert inside.result(timeout=PATIENCE_SECONDS).results


def test_a_server_that_warms_up_says_so(connect: Connect) -> None:
    worker = HeldWorker()
    worker.hold_warm_up()
    running = RunningServer(worker=worker, metrics_port=-1).start(wait=False)
    try:
        stub = stub_on(connect(running.address))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ComputeLoss(GOOD, timeout=PATIENCE_SECONDS, wait_for_ready=True)
        error = failure_of(caught.value)
        assert (error.code, error.info.reason) == (UNAVAILABLE, "WARMING_UP")
        assert error.trailers[PUSHBACK] == "500"
        worker.release_warm_up()
        eventually(lambda: running.metrics.registry.get_sample_value("lossgrad_ready"))
        assert stub.ComputeLoss(GOOD).results
    finally:
        running.stop()


def test_a_deadline_that_passes_while_the_device_is_busy_costs_the_device_nothing(
    start_server: StartServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    with pytest.raises(grpc.RpcError) as caught:
        stub.ComputeLoss(GOOD, timeout=0.5)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    # The server, too, has let go of the call before the device is free.
    # What ends first, the caller's patience or the server's own count of it, is chance. Both are the deadline.
    eventually(lambda: handled(running, "ComputeLoss", "DEADLINE_EXCEEDED") == 1)
    worker.release()
    assert inside.result(timeout=PATIENCE_SECONDS).results
    eventually(lambda: running.batcher.admitted_requests == 0)
    eventually(lambda: outcomes(running, "deadline") == 1)
    assert outcomes(running, "cancelled") is None
    assert not handled(running, "ComputeLoss", "CANCELLED")
    assert worker.batch_count == 1
    assert not caplog.records


def outcomes(running: RunningServer, outcome: str) -> float | None:
    """Return how many requests like GOOD had an outcome."""
    labels = {"loss": "smooth_l1", "mode": "loss_grad", "api": "native", "outcome": outcome}
    return running.metrics.registry.get_sample_value("lossgrad_requests_total", labels)


def test_a_cancelled_call_is_not_computed(
    start_server: StartServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    gone = stub.ComputeLoss.future(GOOD)
    eventually(lambda: running.batcher.waiting_requests == 1)
    gone.cancel()
    eventually(lambda: handled(running, "ComputeLoss", "CANCELLED") == 1)
    worker.release()
    assert inside.result(timeout=PATIENCE_SECONDS).results
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1
    assert not caplog.records
