"""LossClient.stream against the peer: order, packing, errors of items, broken streams, backpressure, endings."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import numpy as np
import pytest
import torch

from lossgrad import L1, MSE, DeadlineExceeded, InvalidRequest, LossClient, LossResult, Overloaded, Unavailable
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, PeerServer, Refused, status

Code = grpc.StatusCode
ZERO = np.zeros(1)


def pairs(count: int) -> Iterator[tuple[Any, Any]]:
    for number in range(count):
        yield np.array([float(number)]), ZERO


def value_of(request: pb.ComputeLossRequest) -> float:
    return float(np.frombuffer(request.input.data, np.float64)[0])


def test_results_come_in_the_order_of_the_pairs_though_answers_do_not(client: LossClient, peer: Peer) -> None:
    peer.group = lambda answers: [[answer] for answer in reversed(answers)]
    values = [result.value for result in client.stream(pairs(300), L1(), in_flight=32)]
    assert values == [float(number) for number in range(300)]


def test_small_requests_travel_packed(client: LossClient, peer: Peer) -> None:
    client.compute_many([(ZERO, ZERO)] * 1000, L1())
    assert sum(peer.messages) == 1000
    assert max(peer.messages) == 64
    assert len(peer.messages) <= 40
    assert peer.streams == 1


def test_several_losses_and_options_of_a_pair(client: LossClient) -> None:
    ones = torch.ones(3)
    first, second = client.stream(
        [
            (ones, ones * 3, {"weight": torch.tensor([1.0, 1.0, 2.0]), "idempotency_key": "a"}),
            [ones[:2], torch.zeros(()), {"mask": torch.tensor([True, False])}],
        ],
        [L1(gradient=True), MSE(reduction="sum")],
        allow_broadcast=True,
    )
    assert [result.value for result in first] == [2.0, 16.0]
    assert first[0].idempotency_key == "a"
    assert torch.equal(first[0].gradient, torch.tensor([-0.25, -0.25, -0.5]))
    assert [result.value for result in second] == [1.0, 1.0]
    assert second[0].target_gradient.shape == ()


def test_no_pairs_give_no_results_and_no_call(client: LossClient, peer: Peer) -> None:
    assert client.compute_many([], L1()) == []
    assert peer.streams == 0


def test_large_requests_are_streamed_too(client: LossClient, peer: Peer) -> None:
    array = np.ones(200_000, np.float32)
    results = client.compute_many([(array * number, array) for number in range(5)], L1(gradient=True))
    assert [result.value for result in results] == [1.0, 0.0, 1.0, 2.0, 3.0]
    assert results[4].gradient.shape == (200_000,)
    assert peer.messages == [1] * 5


def test_an_error_raises_at_its_turn(client: LossClient) -> None:
    stream = client.stream([*pairs(3), (np.ones(2), ZERO), *pairs(3)], L1())
    assert [next(stream).value for _ in range(3)] == [0.0, 1.0, 2.0]
    with pytest.raises(InvalidRequest, match="send equal shapes"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_errors_can_stand_in_the_place_of_results(client: LossClient) -> None:
    bad: list[Any] = [(np.ones(2), ZERO), (np.ones(1, np.uint16), ZERO), "ab", (1.0,), (1.0, 2.0, {"wieght": 1})]
    outcomes = client.compute_many([*pairs(2), *bad, *pairs(2)], L1(), on_error="return")
    assert [outcome.value for outcome in outcomes[:2] + outcomes[-2:]] == [0.0, 1.0, 0.0, 1.0]
    for outcome, says in zip(
        outcomes[2:-2],
        (
            "send equal shapes",
            "uint16",
            "pairs holds a str; give (input, target)",
            "pairs holds a tuple of 1",
            "options hold ['wieght']; they may hold 'weight'",
        ),
        strict=True,
    ):
        assert isinstance(outcome, InvalidRequest)
        assert says in str(outcome)


def test_one_bad_request_leaves_its_neighbours_in_the_message_alone(client: LossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if value_of(request) % 3 == 0:
            raise Refused(status(Code.INTERNAL, "three", reason="INTERNAL"))

    peer.fail = fail
    outcomes = client.compute_many(pairs(60), L1(), on_error="return")
    for number, outcome in enumerate(outcomes):
        if number % 3:
            assert outcome.value == number
        else:
            assert str(outcome) == "three"


def test_an_item_that_finds_the_queue_full_is_sent_again(client: LossClient, peer: Peer) -> None:
    refused: list[float] = []

    def fail(request: pb.ComputeLossRequest) -> None:
        number = value_of(request)
        if number in (3.0, 7.0) and refused.count(number) < 2:
            refused.append(number)
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.001))

    peer.fail = fail
    assert [result.value for result in client.stream(pairs(10), L1())] == list(range(10))
    assert sorted(refused) == [3.0, 3.0, 7.0, 7.0]


def test_an_item_that_finds_it_full_too_often_fails_alone(target: str, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if value_of(request) == 1.0:
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.001))

    peer.fail = fail
    with LossClient(target, retries=1) as client:
        first, second, third = client.compute_many(pairs(3), L1(), on_error="return")
    assert isinstance(second, Overloaded)
    assert (first.value, third.value) == (0.0, 2.0)
    assert len(peer.requests) == 4


def test_a_stream_that_breaks_goes_on_where_it_was(client: LossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if value_of(request) in (50.0, 120.0) and not any(value_of(r) == value_of(request) for r in peer.requests[:-1]):
            raise RuntimeError("the stream breaks")

    # An exception in the peer's handler ends the call with UNKNOWN; a restarting server's ends with UNAVAILABLE.
    def unavailable(request: pb.ComputeLossRequest) -> None:
        try:
            fail(request)
        except RuntimeError:
            context.abort(Code.UNAVAILABLE, "restarting")

    context: Any = None

    def remember(_number: int, given: Any) -> None:
        nonlocal context
        context = given

    peer.fail, peer.fail_call = unavailable, remember
    assert [result.value for result in client.stream(pairs(200), L1(), in_flight=16)] == list(range(200))
    assert peer.streams == 3


def test_a_stream_that_cannot_be_opened_again_raises_after_its_retries(target: str, peer: Peer) -> None:
    peer.fail_call = lambda _number, context: context.abort(Code.UNAVAILABLE, "gone")
    with LossClient(target, retries=2) as client:
        modes: tuple[Literal["raise", "return"], ...] = ("raise", "return")
        for on_error in modes:
            peer.streams = 0
            with pytest.raises(Unavailable, match="gone"):
                client.compute_many(pairs(3), L1(), on_error=on_error)
            assert peer.streams == 3


def test_a_stream_that_ends_for_another_reason_raises_at_once(client: LossClient, peer: Peer) -> None:
    peer.fail_call = lambda _number, context: context.abort(Code.INVALID_ARGUMENT, "malformed")
    with pytest.raises(InvalidRequest, match="malformed"):
        client.compute_many(pairs(3), L1())
    assert peer.streams == 1


def test_a_server_that_drains_is_left_for_another_stream(client: LossClient, peer: Peer) -> None:
    def fail(_: pb.ComputeLossRequest) -> None:
        if peer.streams == 1:
            raise Refused(status(Code.UNAVAILABLE, "drains", reason="DRAINING", retry_after=0.001))

    peer.fail = fail
    assert [result.value for result in client.stream(pairs(20), L1())] == list(range(20))
    assert peer.streams >= 2


def test_a_server_that_is_restarted_is_found_again() -> None:
    server = PeerServer()
    port = server.port
    with LossClient(server.target, retries=4) as client:
        stream = client.stream(pairs(100), L1(), in_flight=4)
        values = [next(stream).value for _ in range(10)]
        server.stop()
        server = PeerServer(f"127.0.0.1:{port}")
        values += [result.value for result in stream]
    server.stop()
    assert values == list(range(100))


def test_pairs_are_read_no_further_than_the_window_and_in_the_callers_thread(client: LossClient, peer: Peer) -> None:
    pulled: list[int] = []
    threads: set[int] = set()

    def source() -> Iterator[tuple[Any, Any]]:
        for number, pair in enumerate(pairs(200)):
            pulled.append(number)
            threads.add(threading.get_ident())
            yield pair

    stream = client.stream(source(), L1(), in_flight=10)
    assert not pulled
    for given, result in enumerate(stream):
        assert result.value == given
        assert len(pulled) - given <= 10
    assert len(pulled) == 200
    assert threads == {threading.get_ident()}


def test_the_window_is_bounded_in_bytes(client: LossClient) -> None:
    pulled: list[int] = []

    def source() -> Iterator[tuple[Any, Any]]:
        for number in range(50):
            pulled.append(number)
            yield np.zeros(1000), np.zeros(1000)

    for given, _ in enumerate(client.stream(source(), L1(), in_flight=50, in_flight_bytes=100_000)):
        assert len(pulled) - given <= 7  # 16 kB each


def test_results_are_given_while_a_slow_iterable_still_goes_on(client: LossClient) -> None:
    pulled: list[int] = []

    def source() -> Iterator[tuple[Any, Any]]:
        for number, pair in enumerate(pairs(50)):
            threading.Event().wait(0.002)  # slower than the server: what was pulled is sent without more
            pulled.append(number)
            yield pair

    stream = client.stream(source(), L1(), in_flight=100)
    assert next(stream).value == 0.0
    assert len(pulled) < 50
    assert len(list(stream)) == 49


def test_with_a_window_of_one_a_pair_may_depend_on_the_result_before(client: LossClient) -> None:
    last = [1.0]

    def source() -> Iterator[tuple[Any, Any]]:
        for _ in range(5):
            yield np.array(last) * 2, ZERO

    for result in client.stream(source(), L1(), in_flight=1):
        assert result.value == last[0] * 2
        last[0] = result.value
    assert last == [32.0]


def test_arrays_may_be_reused_for_the_next_pair(client: LossClient) -> None:
    buffer = np.zeros(1)

    def source() -> Iterator[tuple[Any, Any]]:
        for number in range(100):
            buffer[0] = number
            yield buffer, ZERO

    assert [result.value for result in client.stream(source(), L1())] == list(range(100))


def test_a_request_that_is_never_answered_is_given_up_at_its_timeout(client: LossClient, peer: Peer) -> None:
    peer.hold.clear()
    outcomes = client.compute_many(pairs(2), L1(), timeout=0.05, on_error="return")
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 2


def test_leaving_a_stream_ends_the_call(client: LossClient, peer: Peer) -> None:
    stream = client.stream(pairs(1000), L1(), in_flight=8)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert peer.ended.wait(10)
    peer.ended.clear()
    stream = client.stream(pairs(1000), L1(), in_flight=8)
    next(stream)
    del stream
    gc.collect()
    assert peer.ended.wait(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "lossgrad-stream-reader"]


def test_an_exception_of_the_iterable_reaches_the_caller(client: LossClient, peer: Peer) -> None:
    def source() -> Iterator[tuple[Any, Any]]:
        yield from pairs(20)
        raise LookupError("no more data")

    with pytest.raises(LookupError, match="no more data"):
        client.compute_many(source(), L1(), in_flight=4)
    assert peer.ended.wait(10)


def test_mistakes_in_the_call_are_told_at_the_call(client: LossClient) -> None:
    with pytest.raises(InvalidRequest, match="losses holds 0"):
        client.stream([], [])
    with pytest.raises(InvalidRequest, match="in_flight is 0"):
        client.stream([], L1(), in_flight=0)
    with pytest.raises(ValueError, match="on_error is 'ignore'; it must be 'raise' or 'return'"):
        client.stream([], L1(), on_error="ignore")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not iterable"):
        client.stream(None, L1())  # type: ignore[call-overload]


def test_a_request_just_under_the_limit_fits_with_its_frame(target: str) -> None:
    with LossClient(target, max_message_bytes=2000) as client:
        outcomes = client.compute_many(
            [(np.zeros(count, np.uint8), np.zeros(count, np.float16)) for count in range(600, 680)],
            L1(),
            on_error="return",
        )
    taken = [isinstance(outcome, LossResult) for outcome in outcomes]
    assert True in taken
    assert False in taken
    assert taken == sorted(taken, reverse=True)
    assert "the limit is" in str(outcomes[-1])


def test_streams_run_side_by_side(client: LossClient) -> None:
    first, second = client.stream(pairs(100), L1()), client.stream(pairs(100), MSE())
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        assert (one.value, other.value) == (number, number**2)
