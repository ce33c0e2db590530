"""The stream's window by itself: what it packs, what it holds, what it sends again, and in which order it gives back."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from lossgrad import (
    L1,
    DeadlineExceeded,
    InvalidRequest,
    LossResult,
    Overloaded,
    ServerError,
    Unavailable,
)
from lossgrad.calls import Request, prepare
from lossgrad.exchange import MAX_REQUESTS_PER_MESSAGE, backoff_seconds
from lossgrad.window import StreamWindow
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import status

Code = grpc.StatusCode


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_window(clock: Clock | None = None, **options: Any) -> StreamWindow:
    settings: dict[str, Any] = {
        "max_requests": 8,
        "max_bytes": 1 << 26,
        "max_message_bytes": 1 << 28,
        "timeout": 10.0,
        "retries": 2,
    }
    return StreamWindow(**(settings | options), clock=clock or Clock())


def request(count: int = 1, value: float = 1.0) -> Request:
    array = np.full(count, value, np.float32)
    return prepare(array, array, (L1(),), is_single=True, max_message_bytes=1 << 28)


def parse(message: bytes) -> list[pb.TaggedRequest]:
    return list(pb.StreamComputeLossRequest.FromString(message).requests)


def tags(messages: list[bytes]) -> list[list[int]]:
    return [[tagged.tag for tagged in parse(message)] for message in messages]


def answer(*tags: int, error: Any = None) -> bytes:
    """Return a message that answers these tags with their own number as the loss, or with an error."""
    response = pb.StreamComputeLossResponse()
    for tag in tags:
        tagged = response.responses.add(tag=tag)
        if error is None:
            tagged.response.results.add(scalar=float(tag), element_count=1)
        else:
            tagged.error.CopyFrom(error)
    return response.SerializeToString()


def values(window: StreamWindow) -> list[float | None]:
    results = []
    for result in window.take_ready():
        assert isinstance(result, LossResult)
        results.append(result.value)
    return results


def fill(window: StreamWindow) -> list[bytes]:
    messages = []
    while window.has_room:
        messages += window.add(request())
    return messages + window.flush()


BUSY = status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.5)


def test_the_first_request_goes_out_at_once_and_then_half_windows_alternate() -> None:
    window = make_window(max_requests=8)
    assert tags(fill(window)) == [[1], [2, 3, 4, 5], [6, 7, 8]]
    window.receive(answer(1))
    assert values(window) == [1.0]
    assert not window.has_room  # less than half a message: wait, so that the next one is larger
    window.receive(answer(2, 3, 4, 5))
    assert values(window) == [2.0, 3.0, 4.0, 5.0]
    assert tags(fill(window)) == [[9, 10, 11, 12], [13]]


def test_a_server_always_has_a_message_to_work_on_while_the_next_is_packed() -> None:
    """Messages of uneven sizes must not let the window wait for its last answer before it sends again."""
    window = make_window(max_requests=16)
    messages = fill(window)
    for _ in range(50):
        given = tags([messages.pop(0)])[0]
        window.receive(answer(*given))
        assert values(window) == given
        left = sum(len(requests) for requests in tags(messages))
        assert left >= 4, (
            f"only {left} requests are left for the server, which take it less time than packing the next 8"
        )
        messages += fill(window)


def test_a_server_that_has_nothing_to_do_is_sent_the_next_request_at_once() -> None:
    window = make_window()
    assert tags(window.add(request())) == [[1]]
    assert window.add(request()) == []
    assert tags(window.flush()) == [[2]]
    window.receive(answer(1, 2))
    assert tags(window.add(request())) == [[3]]


def test_what_comes_back_in_any_order_is_given_back_in_the_order_of_the_pairs() -> None:
    window = make_window()
    fill(window)
    window.receive(answer(3, 2, 8))
    assert values(window) == []
    window.receive(answer(1))
    assert values(window) == [1.0, 2.0, 3.0]
    window.receive(answer(7, 5, 6, 4))
    assert values(window) == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert window.is_empty


def test_results_not_yet_given_back_count_as_held() -> None:
    window = make_window()
    fill(window)
    window.receive(answer(2, 3, 4, 5, 6, 7, 8))
    assert not window.has_room
    window.receive(answer(1))
    assert not window.has_room
    values(window)
    assert window.has_room


def test_the_window_is_bounded_in_bytes_and_takes_one_request_of_any_size() -> None:
    one = request(1000).byte_count
    window = make_window(max_requests=1000, max_bytes=4 * one)
    while window.has_room:
        window.add(request(1000))
    window.flush()
    assert len(window._exchange._sent) == 4
    small = make_window(max_bytes=10)
    assert tags(small.add(request(1000))) == [[1]]
    assert not small.has_room


def test_a_message_is_bounded_in_requests_and_in_bytes() -> None:
    window = make_window(max_requests=10_000)
    messages = fill(window)
    assert {len(parse(message)) for message in messages[1:-1]} == {MAX_REQUESTS_PER_MESSAGE}
    window = make_window(max_requests=1000)
    messages = [message for _ in range(100) for message in window.add(request(10_000))] + window.flush()
    assert max(map(len, messages)) <= 1024 * 1024 + 100 * 64
    assert sum(len(parse(message)) for message in messages) == 100
    assert len(messages) < 12


def test_a_large_request_has_a_message_of_its_own_behind_what_waits() -> None:
    window = make_window(max_requests=100)
    window.add(request())
    assert window.add(request()) == []
    assert tags(window.add(request(100_000))) == [[2], [3]]
    assert window.flush() == []


def test_the_callers_arrays_may_be_reused_once_a_pair_is_added() -> None:
    window = make_window(max_requests=100)
    array = np.array([1.0], np.float32)
    large = np.ones(100_000, np.float32)
    window.add(prepare(array, array, (L1(),), is_single=True, max_message_bytes=1 << 28))
    messages = window.add(prepare(large, large, (L1(),), is_single=True, max_message_bytes=1 << 28))
    array[:], large[:] = 7.0, 7.0
    for message in messages + window.resend():
        for tagged in parse(message):
            assert set(np.frombuffer(tagged.request.input.data, np.float32)) == {1.0}


def test_a_slow_iterable_is_not_waited_for() -> None:
    clock = Clock()
    window = make_window(clock)
    window.add(request())
    assert window.add(request()) == []
    assert window.flush_if_slow(0.0005) == []
    assert tags(window.flush_if_slow(0.002)) == [[2]]
    window.add(request())
    clock.now += 0.002  # several pulls, each quick
    assert tags(window.flush_if_slow(0.0001)) == [[3]]
    assert window.flush_if_slow(1.0) == []


def test_each_request_tells_the_server_what_is_left_of_its_timeout() -> None:
    clock = Clock()
    window = make_window(clock, max_requests=2, retries=1)
    (message,) = window.add(request())
    assert parse(message)[0].timeout_ns == 10_000_000_000
    clock.now += 4
    window.receive(answer(1, error=BUSY))
    clock.now += 0.5
    (message,) = window.take_due()
    assert parse(message)[0].timeout_ns == pytest.approx(5_500_000_000, rel=1e-6)
    unlimited = make_window(timeout=None, max_requests=2)
    (message,) = unlimited.add(request())
    assert parse(message)[0].timeout_ns == 0
    assert unlimited.seconds_to_wait() is None


def test_what_is_unanswered_at_its_deadline_is_given_up_and_a_late_answer_ignored() -> None:
    clock = Clock()
    window = make_window(clock, max_requests=2)
    fill(window)
    assert window.seconds_to_wait() == 10.0
    clock.now += 9
    window.receive(answer(2))
    assert window.take_due() == []
    assert window.seconds_to_wait() == 1.0
    clock.now += 1
    assert window.take_due() == []
    error, result = window.take_ready()
    assert isinstance(error, DeadlineExceeded)
    assert "10.0 s" in str(error)
    assert isinstance(result, LossResult)
    window.receive(answer(1))
    assert list(window.take_ready()) == []
    assert window.is_empty


def test_a_request_that_the_server_cannot_take_now_is_sent_again_when_the_server_says() -> None:
    clock = Clock()
    window = make_window(clock, max_requests=2)
    fill(window)
    for _ in range(2):
        window.receive(answer(1, error=BUSY))
        assert list(window.take_ready()) == []
        assert window.seconds_to_wait() == 0.5
        assert window.take_due() == []
        clock.now += 0.5
        assert tags(window.take_due()) == [[1]]
    window.receive(answer(1, error=BUSY))  # the third time, after two retries
    (error,) = window.take_ready()
    assert isinstance(error, Overloaded)


def test_a_retry_beyond_the_deadline_is_not_waited_for() -> None:
    window = make_window(timeout=0.4, max_requests=2)
    window.add(request())
    window.receive(answer(1, error=BUSY))
    (error,) = window.take_ready()
    assert isinstance(error, Overloaded)


def test_what_the_caller_must_change_is_not_sent_again() -> None:
    window = make_window(max_requests=2)
    fill(window)
    window.receive(answer(1, error=status(Code.INVALID_ARGUMENT, "bad", reason="BAD_SHAPE")))
    window.receive(answer(2))
    error, result = window.take_ready()
    assert isinstance(error, InvalidRequest)
    assert isinstance(result, LossResult)


def test_a_pair_of_which_no_request_could_be_made_keeps_its_place() -> None:
    window = make_window(max_requests=4)
    window.add(request())
    window.add_failed(InvalidRequest("bad"))
    window.add(request())
    window.flush()
    window.receive(answer(3))
    assert list(window.take_ready()) == []
    window.receive(answer(1))
    first, second, third = window.take_ready()
    assert isinstance(second, InvalidRequest)
    assert isinstance(first, LossResult)
    assert isinstance(third, LossResult)


def test_a_draining_server_asks_for_another_stream() -> None:
    clock = Clock()
    window = make_window(clock, max_requests=8)
    fill(window)
    window.receive(answer(2, error=status(Code.UNAVAILABLE, "drains", reason="DRAINING", retry_after=0.1)))
    assert window.must_reopen
    assert tags(window.resend()) == [[1, 3, 4, 5], [6, 7, 8]]
    clock.now += 0.1
    assert tags(window.take_due()) == [[2]]
    window.receive(answer(*range(1, 9)))
    assert values(window) == [float(tag) for tag in range(1, 9)]


def test_a_broken_stream_is_opened_again_a_few_times_and_progress_starts_the_count_anew() -> None:
    window = make_window(retries=2)
    fill(window)
    broken = Unavailable("gone", Code.UNAVAILABLE)
    for _ in range(3):
        first, second = window.break_stream(broken), window.break_stream(broken)
        assert first is not None
        assert second is not None
        assert 0.05 < first < second < 1
        window.receive(answer(1))
    window.break_stream(broken)
    window.break_stream(broken)
    assert window.break_stream(broken) is None
    assert make_window(retries=0).break_stream(broken) is None
    assert make_window().break_stream(InvalidRequest("bad")) is None


def test_a_large_request_is_sent_again_as_it_was() -> None:
    window = make_window()
    (message,) = window.add(request(100_000))
    assert window.resend() == [message]


def test_backoff_grows_and_the_server_knows_better() -> None:
    assert backoff_seconds(1, 0.25) == 0.25
    assert 0.08 <= backoff_seconds(1, None) <= 0.12
    assert 0.24 <= backoff_seconds(2, None) <= 0.36
    assert 1.6 <= backoff_seconds(50, None) <= 2.4


def test_an_answer_that_is_none_is_the_servers_error() -> None:
    window = make_window(max_requests=4)
    window.add(request())
    window.add(request())
    with pytest.raises(ServerError, match="cannot be read"):
        window.receive(b"\x0a\xff")
    window.receive(answer(99))  # nobody asked for it
    response = pb.StreamComputeLossResponse()
    response.responses.add(tag=1).response.results.add(element_count=1)
    window.receive(response.SerializeToString())
    (error,) = window.take_ready()
    assert isinstance(error, ServerError)


@pytest.mark.parametrize(("name", "field"), [("max_requests", "in_flight"), ("max_bytes", "in_flight_bytes")])
def test_a_window_of_nothing_is_refused(name: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is 0; it must be at least 1"):
        make_window(None, **{name: 0})


def test_a_window_of_one_works() -> None:
    window = make_window(max_requests=1)
    assert tags(fill(window)) == [[1]]
    window.receive(answer(1))
    assert values(window) == [1.0]
    assert window.has_room


def test_nothing_is_given_back_while_something_waits_to_be_sent() -> None:
    window = make_window(max_requests=4)
    messages = window.add(request()) + window.add(request())
    window.receive(answer(1))
    assert (tags(messages), window.may_give_back) == ([[1]], False)
    messages = window.flush()
    assert (tags(messages), window.may_give_back) == ([[2]], True)
