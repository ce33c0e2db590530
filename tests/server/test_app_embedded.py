"""The server in a client's process, without sockets: the same answers and errors as on the wire, and it stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health_pb2

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_server import engine
from lossgrad_server.config import ConfigError
from lossgrad_server.embedded import EmbeddedServer
from lossgrad_server.transport import pipeline
from tests.server.calling import Failure, answers_by_tag, failure, failure_of, results_of
from tests.server.requests import request, zeros
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, eventually

GOOD = request([1.0, 2.0], [3.0, 5.0])
BAD = request([1.0, 2.0], [3.0, 5.0], pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=-0.5)))
UNAVAILABLE, DEADLINE_EXCEEDED, UNIMPLEMENTED, CANCELLED = 14, 4, 12, 1


@pytest.fixture
def embed() -> Iterator[Callable[..., EmbeddedServer]]:
    """Give a function that starts an embedded server, stopped at the test's end."""
    started: list[EmbeddedServer] = []

    def start(worker: HeldWorker | None = None, **settings: Any) -> EmbeddedServer:
        one = EmbeddedServer(**{"device": "cpu", **settings})
        if worker is None:
            one.start()
        else:
            with mock.patch.object(engine, "create_worker", return_value=worker):
                one.start()
        started.append(one)
        return one

    yield start
    for one in started:
        one.stop()


Embed = Callable[..., EmbeddedServer]


def compute(server: EmbeddedServer) -> Callable[..., pb.ComputeLossResponse]:
    return server.channel().unary_unary(
        codec.COMPUTE_LOSS, pb.ComputeLossRequest.SerializeToString, pb.ComputeLossResponse.FromString
    )


def stream(server: EmbeddedServer) -> Callable[..., Any]:
    return server.channel().stream_stream(
        codec.STREAM_COMPUTE_LOSS,
        pb.StreamComputeLossRequest.SerializeToString,
        pb.StreamComputeLossResponse.FromString,
    )


def message(*requests: pb.ComputeLossRequest) -> pb.StreamComputeLossRequest:
    return pb.StreamComputeLossRequest(
        requests=[pb.TaggedRequest(tag=tag, request=one) for tag, one in enumerate(requests)]
    )


def test_answers_are_those_of_the_wire_to_the_bit(embed: Embed, stub: LossServiceStub) -> None:
    server = embed()
    assert results_of(compute(server)(GOOD)) == results_of(stub.ComputeLoss(GOOD))
    here = answers_by_tag(list(stream(server)(iter([message(GOOD, BAD)]))))
    there = answers_by_tag(list(stub.StreamComputeLoss(iter([message(GOOD, BAD)]))))
    assert results_of(here[0].response) == results_of(there[0].response)
    assert Failure(here[1].error).violations == Failure(there[1].error).violations


def test_errors_carry_what_they_carry_on_the_wire(embed: Embed, stub: LossServiceStub) -> None:
    here, there = failure(compute(embed()), BAD), failure(stub.ComputeLoss, BAD)
    assert (here.code, here.message, here.violations) == (there.code, there.message, there.violations)
    assert (here.info.reason, here.info.domain) == (there.info.reason, there.info.domain)


def test_a_full_server_says_when_to_come_back(embed: Embed) -> None:
    worker = HeldWorker()
    server = embed(worker, max_queued_requests=1)
    worker.hold()
    inside = stream(server)(iter([message(GOOD)]))
    worker.wait_for_batch()
    error = failure(compute(server), GOOD)
    assert (error.code, error.info.reason) == (UNAVAILABLE, "QUEUE_FULL")
    assert error.trailers["grpc-retry-pushback-ms"] == "50"
    worker.release()
    assert next(inside).responses[0].response.results


def test_a_deadline_that_passes_ends_the_wait(embed: Embed) -> None:
    worker = HeldWorker()
    server = embed(worker)
    worker.hold()
    with pytest.raises(grpc.RpcError) as caught:
        compute(server)(GOOD, timeout=0.05)
    assert failure_of(caught.value).code == DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as caught:
        next(stream(server)(iter([message(GOOD)]), timeout=0.05))
    assert failure_of(caught.value).code == DEADLINE_EXCEEDED
    worker.release()
    assert compute(server)(GOOD).results


def test_a_bug_of_ours_tells_nothing_of_our_insides(
    embed: Embed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = embed()

    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(server._running().pipeline.checker, "check", fail)
    error = failure(compute(server), GOOD)
    assert error.info.reason == "INTERNAL"
    assert "secret" not in error.message
    assert "secret" in caplog.text


def test_a_method_that_is_not_there_is_unimplemented(embed: Embed) -> None:
    channel = embed().channel()
    for call in (channel.unary_unary("/other.Service/Method"), channel.stream_stream(codec.COMPUTE_LOSS)):
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
        assert failure_of(caught.value).code == UNIMPLEMENTED


def test_health_says_serving(embed: Embed) -> None:
    check = embed().channel().unary_unary("/grpc.health.v1.Health/Check")
    answer = health_pb2.HealthCheckResponse.FromString(check(b""))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_two_servers_in_one_process_know_nothing_of_each_other(embed: Embed) -> None:
    first, second = embed(max_message_bytes=65536), embed()
    large = request(zeros(20_000), zeros(20_000))  # the gradient takes 80,000 bytes
    assert compute(second)(large).results
    assert failure(compute(first), large).info.reason == "RESULT_TOO_LARGE"
    assert compute(first)(GOOD).results
    name, labels = (
        "lossgrad_requests_total",
        {"loss": "smooth_l1", "mode": "loss_grad", "api": "native", "outcome": "ok"},
    )
    assert [one.metrics.registry.get_sample_value(name, labels) for one in (first, second)] == [1, 1]


def test_it_can_be_used_from_many_threads(embed: Embed) -> None:
    call = compute(embed())
    expected = results_of(call(GOOD))
    answers: list[bytes] = []

    def work() -> None:
        answers.extend(results_of(call(GOOD)) for _ in range(25))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert answers == [expected] * 200


def test_a_cancelled_stream_leaves_nothing_inside(embed: Embed) -> None:
    worker = HeldWorker()
    server = embed(worker)
    batcher = server._running().batcher
    worker.hold()
    answers = stream(server)(iter([message(GOOD)]))
    worker.wait_for_batch()
    more = stream(server)(iter([message(GOOD, GOOD)]))
    eventually(lambda: batcher.waiting_requests == 2)
    more.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(more)
    assert failure_of(caught.value).code == CANCELLED
    worker.release()
    assert next(answers).responses[0].response.results
    eventually(lambda: batcher.admitted_requests == 0)
    assert worker.batch_count == 1


def test_a_stream_whose_answers_nobody_reads_is_bounded_and_does_not_keep_the_server_from_stopping(
    embed: Embed,
) -> None:
    server = embed(max_stream_requests=2)
    sent = 0

    def messages() -> Iterator[pb.StreamComputeLossRequest]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield message(GOOD)

    answers = stream(server)(messages())
    eventually(lambda: sent > 4)
    assert next(answers).responses
    # Far from all: a few answers wait unread, a few messages wait to be taken.
    eventually(lambda: server._running().batcher.admitted_requests == 0)
    assert sent < 50
    # The fixture stops the server with the stream still open.


def test_an_iterator_of_requests_that_fails_ends_the_stream(embed: Embed, caplog: pytest.LogCaptureFixture) -> None:
    def messages() -> Iterator[pb.StreamComputeLossRequest]:
        yield message(GOOD)
        raise ValueError("the caller's own trouble")

    with pytest.raises(grpc.RpcError) as caught:
        list(stream(embed())(messages()))
    assert failure_of(caught.value).code == CANCELLED
    assert "the caller's own trouble" in caplog.text


def test_a_bug_where_answers_are_made_leaves_nobody_waiting(embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(pipeline, "response_parts", fail)
    assert failure(compute(embed()), GOOD).info.reason == "INTERNAL"


def test_a_server_that_has_stopped_says_so() -> None:
    server = EmbeddedServer(device="cpu")
    with pytest.raises(RuntimeError, match="call start"):
        server.channel()
    server.start()
    call = compute(server)
    assert call(GOOD).results
    server.stop()
    error = failure(call, GOOD)
    assert (error.code, error.info.reason) == (UNAVAILABLE, "DRAINING")
    with pytest.raises(RuntimeError, match="not running"):
        server.channel()


def test_what_waits_is_answered_when_the_server_stops() -> None:
    worker = HeldWorker()
    server = EmbeddedServer(device="cpu")
    with mock.patch.object(engine, "create_worker", return_value=worker):
        server.start()
    worker.hold()
    call = compute(server)
    outcomes: list[object] = []

    def ask() -> None:
        try:
            outcomes.append(call(GOOD).results)
        except grpc.RpcError as error:
            outcomes.append(failure_of(error).code)

    running = threading.Thread(target=ask)
    running.start()
    worker.wait_for_batch()
    waiting = threading.Thread(target=ask)
    waiting.start()
    eventually(lambda: server._running().batcher.waiting_requests == 1)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    waiting.join(PATIENCE_SECONDS)
    assert outcomes == [UNAVAILABLE]
    worker.release()
    for thread in (running, stopping):
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert len(outcomes) == 2


def test_a_start_that_fails_leaves_no_thread() -> None:
    server = EmbeddedServer(device="cuda:99")
    with pytest.raises(ConfigError, match="--device is 'cuda:99'"):
        server.start()
    assert not any(thread.name == "lossgrad-embedded" and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(ConfigError, match="--port is -5"):
        EmbeddedServer(port=-5)
