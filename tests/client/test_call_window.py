"""The window of concurrent calls by itself: who waits, what is sent, what is given up, and what each call is told."""

from __future__ import annotations

import random
from typing import Any

import grpc
import numpy as np
import pytest

from lossgrad import L1, Cancelled, DeadlineExceeded, InvalidRequest, LossResult, Overloaded, ServerError, Unavailable
from lossgrad.call_window import CallWindow
from lossgrad.calls import Request, prepare
from lossgrad.exchange import MAX_REQUESTS_PER_MESSAGE
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import status

Code = grpc.StatusCode
BUSY = status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.5)
DRAINS = status(Code.UNAVAILABLE, "drains", reason="DRAINING", retry_after=0.1)
BAD = status(Code.INVALID_ARGUMENT, "bad", reason="BAD_SHAPE")
GONE = Unavailable("gone", Code.UNAVAILABLE)


class Bench:
    """A window, time that passes when told, and what each caller was told."""

    def __init__(self, **options: Any) -> None:
        self.now = 100.0
        self.told: dict[Any, Any] = {}
        settings: dict[str, Any] = {"max_message_bytes": 1 << 28, "retries": 2}
        self.window = CallWindow(**(settings | options), clock=lambda: self.now, deliver=self._deliver)

    def _deliver(self, caller: Any, outcome: Any) -> None:
        assert caller not in self.told, "told twice"
        self.told[caller] = outcome

    def add(self, *callers: Any, timeout: float | None = 10.0, count: int = 1) -> list[Any]:
        return [self.window.add(request(count), timeout, caller) for caller in callers]

    def sent(self, stream: int = 1) -> list[list[pb.TaggedRequest]]:
        return [list(pb.StreamComputeLossRequest.FromString(m).requests) for m in self.window.messages(stream)]

    def sent_tags(self, stream: int = 1) -> list[list[int]]:
        return [[tagged.tag for tagged in message] for message in self.sent(stream)]

    def answer(self, *tags: int, error: Any = None) -> None:
        """Answer these tags with their own number as the loss, or with an error."""
        response = pb.StreamComputeLossResponse()
        for tag in tags:
            tagged = response.responses.add(tag=tag)
            if error is None:
                tagged.response.results.add(scalar=float(tag), element_count=1)
            else:
                tagged.error.CopyFrom(error)
        self.window.receive(response.SerializeToString())

    def values(self) -> dict[Any, float | None]:
        return {caller: told.value for caller, told in self.told.items() if isinstance(told, LossResult)}

    def errors(self) -> dict[Any, type[Exception]]:
        return {caller: type(told) for caller, told in self.told.items() if isinstance(told, Exception)}


def request(count: int = 1) -> Request:
    array = np.ones(count, np.float32)
    return prepare(array, array, (L1(),), is_single=True, max_message_bytes=1 << 28)


def test_all_that_waits_goes_out_together() -> None:
    bench = Bench()
    assert bench.sent_tags() == []
    bench.add(*"abc")
    assert bench.sent_tags() == [[1, 2, 3]]
    assert not bench.window.has_to_send
    bench.answer(2)
    bench.answer(3, 1)
    assert bench.values() == {"b": 2.0, "c": 3.0, "a": 1.0}
    assert bench.window.is_idle


def test_messages_are_bounded_in_requests_and_bytes() -> None:
    bench = Bench()
    bench.add(*range(150))
    assert [len(message) for message in bench.sent_tags()] == [MAX_REQUESTS_PER_MESSAGE] * 2 + [22]
    bench = Bench()
    bench.add(*range(10), count=25_000)  # 200 kB each
    assert [len(message) for message in bench.sent_tags()] == [5, 5]


def test_what_is_beyond_the_window_waits_first_come_first_served() -> None:
    bench = Bench(max_requests=4)
    bench.add(*range(1, 11))
    assert bench.sent_tags() == [[1, 2, 3, 4]]
    bench.answer(1)
    assert not bench.window.has_to_send  # fewer than half are free: wait, so that the next message is a large one
    bench.answer(3)
    assert bench.sent_tags() == [[5, 6]]
    bench.answer(2, 4, 5, 6)
    assert bench.sent_tags() == [[7, 8, 9, 10]]


def test_the_window_is_bounded_in_bytes_and_takes_one_request_of_any_size() -> None:
    one = request(1000).byte_count
    bench = Bench(max_bytes=3 * one)
    bench.add(*range(5), count=1000)
    assert bench.sent_tags() == [[1, 2, 3]]
    bench = Bench(max_bytes=10)
    bench.add(*range(2), count=1000)
    assert bench.sent_tags() == [[1]]
    bench.answer(1)
    assert bench.sent_tags() == [[2]]


def test_each_request_carries_what_is_left_of_its_own_timeout() -> None:
    bench = Bench()
    bench.add("long", timeout=10.0)
    bench.add("short", timeout=2.0)
    bench.add("endless", timeout=None)
    bench.now += 1
    ((long, short, endless),) = bench.sent()
    assert long.timeout_ns == pytest.approx(9e9)
    assert short.timeout_ns == pytest.approx(1e9)
    assert endless.timeout_ns == 0


def test_only_what_is_late_is_given_up_whether_sent_or_waiting() -> None:
    bench = Bench(max_requests=2)
    bench.add("a", "b")
    bench.sent()
    bench.add("c", timeout=3.0)
    bench.add("d", timeout=None)
    assert bench.window.wake_at == 103.0
    bench.window.wake()
    assert not bench.told
    bench.now = 103.0
    bench.window.wake()
    assert bench.errors() == {"c": DeadlineExceeded}
    assert "3.0 s" in str(bench.told["c"])
    assert bench.window.wake_at == 110.0
    bench.answer(1)
    bench.now = 110.0
    bench.window.wake()
    assert bench.errors() == {"c": DeadlineExceeded, "b": DeadlineExceeded}
    bench.answer(2)  # too late, and nobody is told
    assert bench.sent_tags() == [[4]]
    bench.answer(4)
    assert bench.values() == {"a": 1.0, "d": 4.0}
    assert bench.window.is_idle


def test_without_timeouts_nothing_has_to_wake() -> None:
    bench = Bench()
    bench.add("a", timeout=None)
    bench.sent()
    assert bench.window.wake_at == float("inf")


def test_a_forgotten_call_is_not_sent_if_it_waited_and_its_answer_is_ignored_if_it_was_sent() -> None:
    bench = Bench(max_requests=2)
    first, _, third, _ = bench.add(*"abcd")
    assert bench.sent_tags() == [[1, 2]]
    bench.window.forget(first)
    bench.window.forget(third)
    bench.answer(2)
    assert bench.sent_tags() == [[4]]
    bench.answer(1, 4)
    bench.window.forget(first)  # after its answer: nothing
    assert bench.values() == {"b": 2.0, "d": 4.0}
    assert bench.window.is_idle


def test_a_forgotten_call_that_the_server_is_at_keeps_its_room() -> None:
    bench = Bench(max_requests=2)
    for call in bench.add(*"ab"):
        bench.sent()
        bench.window.forget(call)
    bench.add("c")
    assert not bench.window.has_to_send
    bench.answer(1)
    assert bench.sent_tags() == [[3]]


@pytest.mark.parametrize("is_due", [False, True])
def test_a_forgotten_call_is_not_sent_again(is_due: bool) -> None:
    bench = Bench()
    (call,) = bench.add("a")
    bench.sent()
    bench.answer(1, error=BUSY)
    bench.now += 0.5
    if is_due:
        bench.window.wake()
    bench.window.forget(call)
    bench.window.wake()
    assert bench.sent_tags() == []
    assert bench.window.is_idle
    assert not bench.told


def test_a_stream_is_deserted_when_a_call_was_given_up_and_nobody_else_waits_on_it() -> None:
    bench = Bench()
    first, second = bench.add(*"ab")
    bench.sent(1)
    (third,) = bench.add("c")
    bench.sent(2)
    assert bench.window.take_deserted() == []
    bench.window.forget(first)
    assert bench.window.take_deserted() == []
    bench.window.forget(second)
    assert bench.window.take_deserted() == [1]
    assert bench.window.take_deserted() == []
    bench.now += 10
    bench.window.wake()
    assert bench.window.take_deserted() == [1, 2]
    bench.window.forget(third)  # given up before
    assert bench.window.take_deserted() == []
    assert bench.errors() == {"c": DeadlineExceeded}


def test_errors_stay_with_their_call() -> None:
    bench = Bench()
    bench.add(*"abc")
    bench.sent()
    bench.answer(2, error=BAD)
    bench.answer(1, 3)
    assert bench.values() == {"a": 1.0, "c": 3.0}
    assert bench.errors() == {"b": InvalidRequest}


def test_what_the_server_cannot_take_now_is_sent_again_when_it_says_and_before_what_waits() -> None:
    bench = Bench(max_requests=3)
    bench.add(*"abcd")
    bench.sent()
    for _ in range(2):
        bench.answer(1, error=BUSY)
        assert bench.window.wake_at == bench.now + 0.5
        bench.now += 0.5
        bench.window.wake()
        assert bench.sent_tags() == [[1]]
    bench.answer(2, 3)
    bench.answer(1, error=BUSY)  # the third time, after two retries
    assert bench.errors() == {"a": Overloaded}
    assert bench.sent_tags() == [[4]]


def test_what_waits_to_be_sent_again_keeps_its_room() -> None:
    bench = Bench(max_requests=2)
    bench.add(*"abc")
    bench.sent()
    bench.answer(1, 2, error=BUSY)
    assert not bench.window.has_to_send


def test_a_broken_stream_puts_off_its_own_calls_only() -> None:
    bench = Bench()
    bench.add(*"ab")
    bench.sent(1)
    bench.add("c")
    bench.sent(2)
    bench.window.lose(1, GONE)
    bench.answer(3)
    assert not bench.window.has_to_send
    bench.now += 1
    bench.window.wake()
    assert bench.sent_tags(3) == [[1, 2]]
    bench.answer(1, 2)
    assert bench.values() == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_streams_that_go_on_breaking_fail_each_call_with_an_error_of_its_own() -> None:
    bench = Bench(retries=1)
    bench.add(*"ab")
    for stream in (1, 2):
        bench.sent(stream)
        bench.window.lose(stream, GONE)
        bench.now += 1
        bench.window.wake()
    assert bench.errors() == {"a": Unavailable, "b": Unavailable}
    assert bench.told["a"] is not bench.told["b"]
    assert bench.window.is_idle
    bench = Bench()
    bench.add("a")
    bench.sent()
    bench.window.lose(1, InvalidRequest("malformed"))
    assert bench.errors() == {"a": InvalidRequest}


def test_a_draining_server_is_known_by_its_stream() -> None:
    bench = Bench(retries=0)
    bench.add("a")
    bench.sent(7)
    bench.answer(1, error=DRAINS)
    assert bench.window.is_draining(7)
    assert not bench.window.is_draining(8)
    assert bench.errors() == {"a": Unavailable}


def test_an_answer_that_cannot_be_read_is_the_servers_error() -> None:
    bench = Bench()
    bench.add("a")
    bench.sent()
    with pytest.raises(ServerError, match="cannot be read"):
        bench.window.receive(b"\x0a\xff")


def test_the_end_reaches_every_call_once() -> None:
    bench = Bench(max_requests=3)
    first, *_ = bench.add(*"abcd")
    bench.sent()
    bench.window.forget(first)
    bench.answer(2, error=BUSY)
    bench.window.fail_all(lambda: Cancelled("closed"))
    assert bench.errors() == dict.fromkeys("bcd", Cancelled)
    assert bench.window.is_idle
    assert not bench.window.has_to_send


def test_random_histories_tell_every_caller_once_and_leave_nothing_behind() -> None:
    for seed in range(150):
        chance = random.Random(seed)
        bench = Bench(max_requests=chance.choice([1, 3, 8, 40]), max_bytes=chance.choice([1000, 1 << 20]), retries=1)
        calls: dict[int, Any] = {}
        forgotten: set[int] = set()
        at_server: set[int] = set()
        stream = 1
        for _ in range(120):
            match chance.randrange(7):
                case 0 | 1:
                    caller = len(calls)
                    (calls[caller],) = bench.add(
                        caller, timeout=chance.choice([None, 0.5, 5.0]), count=chance.randrange(1, 200)
                    )
                case 2 | 3:
                    at_server.update(tag for message in bench.sent_tags(stream) for tag in message)
                case 4:
                    tags = chance.sample(sorted(at_server), k=chance.randrange(len(at_server) + 1))
                    at_server.difference_update(tags)
                    bench.answer(*tags, error=chance.choice([None, None, BUSY, BAD, DRAINS]))
                case 5:
                    if calls:
                        caller = chance.choice(list(calls))
                        if caller not in bench.told:
                            forgotten.add(caller)
                            bench.window.forget(calls[caller])
                    if chance.random() < 0.2:
                        bench.window.lose(stream, GONE)
                        at_server.clear()
                        stream += 1
                case 6:
                    bench.now += chance.choice([0.1, 0.6])
                    bench.window.wake()
        for _ in range(200):
            if bench.window.is_idle:
                break
            at_server.update(tag for message in bench.sent_tags(stream) for tag in message)
            bench.answer(*at_server)
            at_server.clear()
            bench.now += 0.6
            bench.window.wake()
        assert bench.window.is_idle
        assert (bench.window._room.requests, bench.window._room.bytes) == (0, 0)
        assert set(bench.told) | forgotten == set(calls)
        assert not set(bench.told) & forgotten
        for caller, value in bench.values().items():
            assert value == calls[caller].tag
