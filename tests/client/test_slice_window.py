"""The window of slices over several streams, without any I/O: packing, lanes, what is sent again and when it is given up."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import grpc
import pytest

from lossgrad.errors import LossgradError, ServerError, Unavailable, from_status
from lossgrad.slice_window import ALONE_BYTES, MAX_SLICES, Outcome, SliceRequest, SliceWindow
from lossgrad_api.codec import ResponseView
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import status

Code = grpc.StatusCode
BROKEN = Unavailable("broken", Code.UNAVAILABLE)


class Driver:
    """A window, the clock's hands, and what was delivered."""

    def __init__(self, lanes: int = 1, max_bytes: int = 1 << 26, patience: float = 60.0) -> None:
        self.now = 1000.0
        self.outcomes: dict[str, list[Outcome]] = {}
        self.window = SliceWindow(
            lanes,
            max_bytes=max_bytes,
            max_message_bytes=1 << 28,
            silence_seconds=30.0,
            patience_seconds=patience,
            clock=lambda: self.now,
        )

    def add(self, name: str, size: int = 10) -> None:
        body = name.encode().ljust(size, b"\0")
        request = pb.ComputeLossRequest(idempotency_key=name, specs=[pb.LossSpec()])
        part = request.SerializeToString() + b"\xfa\x01" + _varint(len(body)) + body  # an unknown field, for the size
        self.window.add(SliceRequest([part], len(part), self.outcomes.setdefault(name, []).append))

    def sent(self, *, flush: bool = False) -> list[tuple[int, pb.StreamComputeLossRequest]]:
        messages = self.window.messages(flush=flush)
        return [(lane, pb.StreamComputeLossRequest.FromString(message)) for lane, message in messages]

    def answer(self, lane: int, message: pb.StreamComputeLossRequest, error: object = None) -> None:
        response = pb.StreamComputeLossResponse()
        for tagged in message.requests:
            answer = response.responses.add(tag=tagged.tag)
            if error is None:
                answer.response.idempotency_key = tagged.request.idempotency_key
            else:
                answer.error.CopyFrom(error)  # type: ignore[arg-type]
        self.window.receive(lane, response.SerializeToString())

    def names(self, message: pb.StreamComputeLossRequest) -> list[str]:
        return [tagged.request.idempotency_key for tagged in message.requests]

    @property
    def delivered(self) -> Counter[str]:
        assert all(isinstance(each, ResponseView) for outcomes in self.outcomes.values() for each in outcomes)
        return Counter({name: len(outcomes) for name, outcomes in self.outcomes.items() if outcomes})


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_the_first_slice_goes_at_once_and_the_next_ones_wait_for_a_full_message() -> None:
    driver = Driver()
    driver.add("a")
    ((_, first),) = driver.sent()
    assert driver.names(first) == ["a"]
    for number in range(63):
        driver.add(str(number))
        assert driver.sent() == []
    driver.add("63")
    ((_, full),) = driver.sent()
    assert driver.names(full) == [str(number) for number in range(64)]


def test_a_flush_sends_what_there_is() -> None:
    driver = Driver()
    for name in "abc":
        driver.add(name)
        if name == "a":
            driver.sent()
    ((_, message),) = driver.sent(flush=True)
    assert driver.names(message) == ["b", "c"]
    assert driver.sent(flush=True) == []


def test_messages_of_small_slices_are_bounded_in_bytes() -> None:
    driver = Driver()
    sent = []
    for number in range(75):
        driver.add(str(number), 30_000)
        sent += driver.sent()
    sent += driver.sent(flush=True)
    assert [len(message.requests) for _, message in sent] == [1, 34, 34, 6]


def test_messages_of_medium_slices_hold_as_many_as_there_is_room_for() -> None:
    driver = Driver()
    sent = []
    for number in range(50):
        driver.add(f"{number:02}", 200_000)
        sent += driver.sent()
    sent += driver.sent(flush=True)
    assert [len(message.requests) for _, message in sent] == [1, 41, 8]
    assert [name for _, message in sent for name in driver.names(message)] == [f"{number:02}" for number in range(50)]


def test_what_is_being_written_counts_once_the_lanes_are_full() -> None:
    driver = Driver(max_bytes=2_000_000)  # in messages of two
    sent = []
    count = 0
    while driver.window.is_open:
        driver.add(f"{count:02}", 200_000)
        count += 1
        sent += driver.sent()
    assert [len(message.requests) for _, message in sent] == [1, 2, 2, 2, 2, 2]
    assert count == 12  # one of which waits in a message that is not full
    assert driver.sent() == []


def test_medium_slices_that_are_lost_are_sent_again_packed_anew() -> None:
    driver = Driver()
    arrays = {str(number): bytearray(b"%d" % number * (100_000 + number)) for number in range(7)}
    for name, array in arrays.items():
        request = pb.ComputeLossRequest(idempotency_key=name)
        request.input.data = bytes(array)
        whole = request.SerializeToString()
        driver.window.add(SliceRequest([whole], len(whole), driver.outcomes.setdefault(name, []).append))
        array[:] = b""
    first = driver.sent(flush=True)
    driver.window.lose(0, BROKEN)
    driver.now += 5
    again = driver.sent(flush=True)
    for messages in (first, again):
        requests = [tagged.request for _, message in messages for tagged in message.requests]
        assert {each.idempotency_key: len(each.input.data) for each in requests} == {
            str(number): 100_000 + number for number in range(7)
        }
    for lane, message in again:
        driver.answer(lane, message)
    assert driver.delivered == Counter(dict.fromkeys(arrays, 1))
    assert driver.window.is_idle


def test_large_slices_have_messages_of_their_own_and_let_go_of_the_callers_arrays() -> None:
    driver = Driver()
    array = bytearray(ALONE_BYTES)
    request = SliceRequest([b"\xfa\x01" + _varint(len(array)), memoryview(array)], len(array) + 5, lambda _: None)
    driver.window.add(request)
    assert request.parts == []
    array.append(1)  # which a view would not let it do
    ((_, message),) = driver.sent()
    assert len(message.requests) == 1


def test_it_is_closed_once_the_lanes_are_full_and_open_again_after_an_answer() -> None:
    driver = Driver(max_bytes=4 * ALONE_BYTES)
    messages: list[Any] = []
    while driver.window.is_open:
        driver.add(str(len(messages)), ALONE_BYTES)
        messages += driver.sent()
    assert len(messages) == 4
    assert driver.sent() == []
    driver.answer(*messages[0])
    assert len(driver.sent()) == 1
    assert bool(driver.window.is_open)
    small = Driver()
    while small.window.is_open:
        small.add("x")
        small.sent()
    assert MAX_SLICES <= len(small.window.lanes[0].sent) < MAX_SLICES + 64


def test_slices_go_to_the_lane_with_the_least_to_do() -> None:
    driver = Driver(lanes=3)
    for number in range(9):
        driver.add(str(number), ALONE_BYTES)
    sent = driver.sent()
    assert sorted(lane for lane, _ in sent) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for lane, message in sent:
        if lane == 1:
            driver.answer(lane, message)
    driver.add("next", ALONE_BYTES)
    assert [lane for lane, _ in driver.sent()] == [1]


def test_what_a_lost_lane_leaves_unanswered_goes_to_another_and_is_delivered_once() -> None:
    driver = Driver(lanes=2)
    for number in range(6):
        driver.add(str(number), ALONE_BYTES)
    sent = driver.sent()
    lost = [message for lane, message in sent if lane == 0]
    driver.answer(0, lost[0])
    driver.window.lose(0, BROKEN)
    again = driver.sent()
    assert {lane for lane, _ in again} == {1}
    assert [driver.names(message) for _, message in again] == [driver.names(message) for message in lost[1:]]
    driver.answer(0, lost[1])  # too late: it is under way on lane 1
    for lane, message in [*sent, *again]:
        if lane == 1:
            driver.answer(lane, message)
            driver.answer(lane, message)  # a server that repeats itself
    assert driver.delivered == Counter({str(number): 1 for number in range(6)})
    assert driver.window.is_idle
    assert driver.window.resent_count == 2


def test_a_lane_that_was_lost_pauses_longer_each_time_until_it_works_again() -> None:
    driver = Driver()
    pauses = []
    driver.add("a")
    for _ in range(6):
        ((lane, message),) = driver.sent(flush=True)
        driver.window.lose(0, BROKEN)
        assert driver.sent(flush=True) == []
        pauses.append(driver.window.wake_at - driver.now)
        driver.now = driver.window.wake_at
    assert pauses[0] < pauses[1] < pauses[2] < pauses[3]
    assert 0.05 < pauses[0] < 0.15
    assert pauses[-1] < 2.5
    ((lane, message),) = driver.sent(flush=True)
    driver.answer(lane, message)
    assert driver.window.lanes[0].failures == 0


def test_a_full_queue_pauses_the_lane_for_as_long_as_the_server_says() -> None:
    driver = Driver(lanes=2)
    driver.add("a", ALONE_BYTES)
    ((lane, message),) = driver.sent()
    driver.answer(lane, message, status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.25))
    assert driver.window.lanes[lane].paused_until == driver.now + 0.25
    ((other, _),) = driver.sent()
    assert other != lane
    assert not driver.window.lanes[lane].must_reopen


def test_a_server_that_drains_is_left() -> None:
    driver = Driver()
    driver.add("a")
    ((lane, message),) = driver.sent()
    driver.answer(lane, message, status(Code.UNAVAILABLE, "going down", reason="DRAINING", retry_after=0.0))
    assert driver.window.lanes[0].must_reopen
    assert driver.sent(flush=True) == []
    driver.window.lose(0, BROKEN)
    driver.now += 5
    assert len(driver.sent(flush=True)) == 1


def test_an_error_of_a_slice_is_its_outcome() -> None:
    driver = Driver()
    driver.add("bad")
    ((lane, message),) = driver.sent()
    driver.answer(lane, message, status(Code.INVALID_ARGUMENT, "no", reason="SHAPE_MISMATCH"))
    (outcome,) = driver.outcomes["bad"]
    assert isinstance(outcome, LossgradError)
    assert outcome.reason == "SHAPE_MISMATCH"
    assert driver.window.is_idle


@pytest.mark.parametrize("how", ["lost", "refused"])
def test_patience_ends(how: str) -> None:
    driver = Driver(patience=10.0)
    driver.add("a")
    start = driver.now

    def fail_for_ever() -> None:
        while True:
            ((lane, message),) = driver.sent(flush=True)
            if how == "lost":
                driver.window.lose(lane, BROKEN)
            else:
                driver.answer(lane, message, status(Code.UNAVAILABLE, "full", reason="WARMING_UP", retry_after=0.5))
            driver.now = max(driver.now, min(driver.window.wake_at, driver.now + 30))

    with pytest.raises(Unavailable):
        fail_for_ever()
    assert 10.0 <= driver.now - start < 13.0


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED])
def test_what_trying_again_cannot_mend_is_raised_at_once(code: grpc.StatusCode) -> None:
    driver = Driver()
    driver.add("a")
    driver.sent()
    with pytest.raises(LossgradError) as raised:
        driver.window.lose(0, from_status(status(code, "no")))
    assert raised.value.code is code


def test_odd_endings_of_a_stream_are_tried_again_a_few_times_and_an_answer_makes_up_for_them() -> None:
    driver = Driver()
    odd = ServerError("RST_STREAM", Code.INTERNAL)
    driver.add("a")
    for _ in range(5):
        ((lane, message),) = driver.sent(flush=True)
        driver.window.lose(0, odd)
        driver.now += 3
    ((lane, message),) = driver.sent(flush=True)
    driver.answer(lane, message)
    driver.add("b")
    driver.sent(flush=True)
    for _ in range(5):
        driver.window.lose(0, odd)
        driver.now += 3
        driver.sent(flush=True)
    with pytest.raises(ServerError):
        driver.window.lose(0, odd)


def test_a_stream_that_ends_with_nothing_outstanding_is_no_trouble() -> None:
    driver = Driver()
    driver.window.lose(0, from_status(status(Code.UNAUTHENTICATED, "no")))
    driver.add("a")
    assert len(driver.sent()) == 1


def test_silence_is_noticed_only_where_an_answer_is_due() -> None:
    driver = Driver(lanes=2)
    assert driver.window.wake_at == math.inf
    driver.add("a", ALONE_BYTES)
    ((lane, message),) = driver.sent()
    assert driver.window.wake_at == driver.now + 30.0
    driver.now += 29.9
    assert driver.window.wake() == []
    driver.now += 0.2
    assert driver.window.wake() == [lane]
    driver.window.lose(lane, driver.window.silence_error())
    ((other, message),) = driver.sent()
    assert other != lane
    driver.answer(other, message)
    driver.now += 1000
    assert driver.window.wake() == []


def test_what_is_no_answer_is_the_servers_error() -> None:
    driver = Driver()
    with pytest.raises(ServerError, match="cannot be read"):
        driver.window.receive(0, b"\xff\xff")
