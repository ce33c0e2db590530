"""StreamComputeLoss: many requests on one stream, each answered or failed by itself, within bounds."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.calling import Caller, Connect, Failure, answers_by_tag, failure_of, message, results_of, stub_on
from tests.server.requests import request, zeros
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually, handled

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 3, 4, 8, 14
GOOD = request([1.0, 2.0], [3.0, 5.0])
NONE = pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_NONE)


def stream(stub: LossServiceStub, *messages: pb.StreamComputeLossRequest) -> dict[int, pb.TaggedResponse]:
    """Send messages on one stream; return its answers by tag."""
    return answers_by_tag(list(stub.StreamComputeLoss(iter(messages), timeout=PATIENCE_SECONDS)))


def failed(answer: pb.TaggedResponse) -> Failure:
    assert answer.WhichOneof("outcome") == "error", answer
    return Failure(answer.error)


# ---- Answers ----


def test_every_request_of_many_messages_is_answered_as_compute_loss_answers_it(stub: LossServiceStub) -> None:
    random = np.random.default_rng(2)
    requests = [request(random.normal(size=size), random.normal(size=size)) for size in range(1, 150)]
    messages = [message(*requests[start : start + 40], first_tag=start) for start in range(0, 149, 40)]
    answers = stream(stub, *messages)
    assert sorted(answers) == list(range(149))
    for tag in (0, 1, 64, 148):
        assert results_of(answers[tag].response) == results_of(stub.ComputeLoss(requests[tag]))
    assert all(answer.WhichOneof("outcome") == "response" for answer in answers.values())


def test_answers_are_packed_into_fewer_messages_than_there_are_requests(stub: LossServiceStub) -> None:
    messages = list(stub.StreamComputeLoss(iter([message(*[GOOD] * 500)]), timeout=PATIENCE_SECONDS))
    assert sum(len(one.responses) for one in messages) == 500
    assert len(messages) < 50


@pytest.mark.parametrize("tag", [0, 1, -1, (1 << 63) - 1, -(1 << 63)])
def test_a_tag_comes_back_as_it_was_sent(stub: LossServiceStub, tag: int) -> None:
    bad = pb.ComputeLossRequest()
    requests = [pb.TaggedRequest(tag=tag, request=GOOD)], [pb.TaggedRequest(tag=tag, request=bad)]
    for one in requests:
        assert list(stream(stub, pb.StreamComputeLossRequest(requests=one))) == [tag]


def test_an_answer_comes_as_soon_as_it_is_ready_and_not_at_the_streams_end(stub: LossServiceStub) -> None:
    caller = Caller()
    answers = stub.StreamComputeLoss(iter(caller), timeout=PATIENCE_SECONDS)
    for tag in range(3):
        caller.send(message(GOOD, first_tag=tag))
        assert [answer.tag for answer in next(answers).responses] == [tag]
    caller.close()
    assert list(answers) == []


def test_a_stream_without_requests_ends_well(stub: LossServiceStub) -> None:
    assert stream(stub) == {}
    assert stream(stub, pb.StreamComputeLossRequest()) == {}


# ---- Failures of single requests ----


def test_one_bad_request_fails_alone_and_changes_no_bit_of_its_neighbours(stub: LossServiceStub) -> None:
    random = np.random.default_rng(3)
    good = [request(random.normal(size=50), random.normal(size=50), idempotency_key=f"row {row}") for row in range(9)]
    bad = {
        2: request([1.0], [1.0, 2.0], idempotency_key="bad"),
        5: pb.ComputeLossRequest(),
        7: request(zeros(2), zeros(2), pb.LossSpec(huber=pb.HuberLoss(delta=0.0))),
    }
    alone = {tag: results_of(answer.response) for tag, answer in stream(stub, message(*good)).items()}
    mixed = stream(stub, message(*(bad.get(tag, one) for tag, one in enumerate(good))))
    for tag, answer in mixed.items():
        if tag not in bad:
            assert results_of(answer.response) == alone[tag]
            assert answer.response.idempotency_key == f"row {tag}"
    failures = {tag: failed(mixed[tag]) for tag in bad}
    assert {one.code for one in failures.values()} == {INVALID_ARGUMENT}
    assert [one.info.reason for one in failures.values()] == ["SHAPE_MISMATCH", "SPEC_COUNT", "BAD_PARAMETER"]
    assert failures[2].violations[0][0] == "target.shape"
    assert failures[2].info.metadata["request_id"] == "bad"


def test_a_request_that_cannot_be_read_fails_alone(server: RunningServer, connect: Connect) -> None:
    good = GOOD.SerializeToString()
    entries = [b"\x08\x01\x1a" + bytes((len(good),)) + good, b"\x08\x02\x1a\x02\x3a\x7f", b"\x08\x03"]
    data = b"".join(b"\x0a" + bytes((len(entry),)) + entry for entry in entries)
    call: Callable[..., Any] = connect(server.address).stream_stream(
        codec.STREAM_COMPUTE_LOSS, response_deserializer=pb.StreamComputeLossResponse.FromString
    )
    answers = answers_by_tag(list(call(iter([data]), timeout=PATIENCE_SECONDS)))
    assert answers[1].WhichOneof("outcome") == "response"
    assert failed(answers[2]).info.reason == "MALFORMED_MESSAGE"
    assert failed(answers[3]).info.reason == "SPEC_COUNT"  # a request that is missing is an empty one


def test_timeouts_are_of_each_request_by_itself(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    caller = Caller()
    answers = stub.StreamComputeLoss(iter(caller), timeout=PATIENCE_SECONDS)
    worker.hold()
    caller.send(message(GOOD))
    worker.wait_for_batch()
    caller.send(message(GOOD, GOOD, first_tag=1, timeout_ns=1))
    caller.send(message(GOOD, first_tag=3))
    caller.send(message(GOOD, first_tag=4, timeout_ns=(1 << 63) - 1))
    caller.send(message(GOOD, first_tag=5, timeout_ns=-1))
    caller.close()
    eventually(lambda: running.batcher.waiting_requests == 4)
    worker.release()
    by_tag = answers_by_tag(list(answers))
    for tag in (1, 2):
        late = failed(by_tag[tag])
        assert (late.code, late.info.reason) == (DEADLINE_EXCEEDED, "DEADLINE_PASSED")
        assert "deadline passed" in late.message
    for tag in (0, 3, 4):
        assert by_tag[tag].WhichOneof("outcome") == "response"
    negative = failed(by_tag[5])
    assert (negative.code, negative.info.reason) == (INVALID_ARGUMENT, "BAD_TIMEOUT")
    assert negative.violations[0][0] == "timeout_ns"
    assert "-1" in negative.message


def test_the_streams_own_deadline_holds_for_its_requests(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    # The client's clock and the server's end it, whichever is first: then its requests' own errors come just in time.
    call = stub.StreamComputeLoss(iter([message(GOOD, GOOD)]), timeout=0.5)
    answers: list[pb.StreamComputeLossResponse] = []
    with suppress(grpc.RpcError):
        answers.extend(call)
    if answers:
        assert [failed(answer).code for answer in answers_by_tag(answers).values()] == [DEADLINE_EXCEEDED] * 2
    else:
        assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    # The server has let go of it, too.
    eventually(lambda: handled(running, "StreamComputeLoss", "DEADLINE_EXCEEDED") == 1)
    worker.release()
    assert inside.result(timeout=PATIENCE_SECONDS).results
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1


def test_requests_beyond_what_the_server_holds_are_told_so_one_by_one(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=3)
    stub = stub_on(connect(running.address))
    worker.hold()
    inside = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    caller = Caller()
    answers = stub.StreamComputeLoss(iter(caller), timeout=PATIENCE_SECONDS)
    caller.send(message(*[GOOD] * 5))
    full = next(answers)  # at once, while the others wait
    assert [answer.tag for answer in full.responses] == [2, 3, 4]
    for answer in full.responses:
        error = failed(answer)
        assert (error.code, error.info.reason) == (UNAVAILABLE, "QUEUE_FULL")
        assert error.retry_seconds == pytest.approx(0.05)
    worker.release()
    caller.close()
    assert sorted(answers_by_tag(list(answers))) == [0, 1]
    assert inside.result(timeout=PATIENCE_SECONDS).results


# ---- Streams that end otherwise ----


def test_a_cancelled_stream_leaves_nothing_inside(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    caller = Caller()
    answers = stub.StreamComputeLoss(iter(caller))
    caller.send(message(GOOD))
    worker.wait_for_batch()
    caller.send(message(*[GOOD] * 20, first_tag=1))
    eventually(lambda: running.batcher.waiting_requests == 20)
    answers.cancel()
    caller.close()
    eventually(lambda: handled(running, "StreamComputeLoss", "CANCELLED") == 1)
    worker.release()
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert (running.batcher.waiting_requests, running.batcher.admitted_bytes) == (0, 0)
    assert worker.batch_count == 1  # the twenty were dropped
    assert stub.ComputeLoss(GOOD).results


def test_a_caller_that_goes_away_leaves_nothing_inside(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    channel = grpc.insecure_channel(running.address)
    worker.hold()
    caller = Caller()
    answers = stub_on(channel).StreamComputeLoss(iter(caller))
    caller.send(message(GOOD))
    worker.wait_for_batch()
    caller.send(message(*[GOOD] * 5, first_tag=1))
    eventually(lambda: running.batcher.waiting_requests == 5)
    channel.close()
    caller.close()
    with pytest.raises(grpc.RpcError):
        list(answers)
    eventually(lambda: handled(running, "StreamComputeLoss", "CANCELLED") == 1)
    worker.release()
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1


def test_garbage_in_the_middle_ends_the_stream_and_what_waits_is_dropped(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    call: Callable[..., Any] = connect(running.address).stream_stream(codec.STREAM_COMPUTE_LOSS)
    worker.hold()
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers = call(iter(messages.get, None), timeout=PATIENCE_SECONDS)
    messages.put(message(GOOD).SerializeToString())
    worker.wait_for_batch()
    messages.put(message(GOOD, GOOD).SerializeToString())
    eventually(lambda: running.batcher.waiting_requests == 2)
    messages.put(b"\xff\xff")
    with pytest.raises(grpc.RpcError) as caught:
        list(answers)
    messages.put(None)
    assert failure_of(caught.value).info.reason == "MALFORMED_MESSAGE"
    worker.release()
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1
