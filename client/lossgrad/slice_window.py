"""The window of an evaluation: slices on their way, over one stream or several, sent again until answered. No I/O.

A lane is one stream to one server. Slices are independent of each other, and it makes no difference which lane computes
one, nor how often it is sent: its outcome is delivered once. So whatever fails in passing (a broken stream, a full queue, a
server that drains or says nothing any more) only makes a lane pause, and what it left unanswered goes to any lane.

Small slices are packed into messages: one goes out when it is full, when a lane has nothing to do, or when the caller
flushes. Large ones have messages of their own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

from lossgrad.errors import LossgradError, ServerError, Unavailable, from_status
from lossgrad.exchange import FRAME_BYTES, FULL_MESSAGE_BYTES, MAX_REQUESTS_PER_MESSAGE, backoff_seconds
from lossgrad_api.codec import Buffer, CodecError, ResponseView, decode_stream_response, encode_stream_request

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics

# On one lane. Four full messages: one that the server computes, one that waits there, one under way, one being packed.
MAX_SLICES: Final = 4 * MAX_REQUESTS_PER_MESSAGE
# Slices from here on have a message of their own. Below, a message's own cost is worth the second copy that packing takes.
ALONE_BYTES: Final = 512 * 1024
_ANSWERS_BYTES: Final = 5 * 1024 * 1024
_MAX_ATTEMPTS: Final = 16  # counted for the backoff's sake
_MAX_ODD_BREAKS: Final = 5
# How streams end where something between here and the server breaks. UNAVAILABLE nearly always, and for as long as the
# caller is patient; the others also where either side is at fault, so not for long.
_ODD_CODES: Final = frozenset(
    (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)
)

Outcome = ResponseView | LossgradError


@dataclass(slots=True, eq=False)
class SliceRequest:
    """One slice on its way: the parts of its ComputeLossRequest, and who is told the outcome."""

    parts: list[Buffer]
    byte_count: int
    deliver: Callable[[Outcome], None]
    tag: int = 0
    message: bytes | None = None  # of its own, if it is a large one
    added_at: float = 0.0
    failed_at: float = 0.0  # for the first time; 0: never


@dataclass(slots=True, eq=False)
class Lane:
    """One stream, and what is unanswered on it."""

    number: int
    sent: dict[int, SliceRequest] = field(default_factory=dict)
    bytes: int = 0
    paused_until: float = 0.0
    failures: int = 0  # since it last worked
    odd_breaks: int = 0
    heard_at: float = 0.0
    must_reopen: bool = False


class SliceWindow:
    """Bounded in slices and in bytes for each lane.

    `silence_seconds` is after how long without an answer a stream counts as broken, `patience_seconds` for how long a
    slice is sent again and again. `clock` is in seconds.
    """

    def __init__(
        self,
        lanes: int,
        *,
        max_bytes: int,
        max_message_bytes: int,
        silence_seconds: float,
        patience_seconds: float,
        clock: Callable[[], float],
        metrics: MethodMetrics | None = None,
        are_requests: bool = True,
    ) -> None:
        """`metrics` count the slices as requests, unless `are_requests` is false: then they are parts of one."""
        self.metrics = metrics
        self._are_counted = are_requests and metrics is not None
        if metrics is not None:
            metrics.watch(self)
        self.lanes = [Lane(number) for number in range(lanes)]
        # Servers put answers together, up to a size that a client of a smaller limit would refuse: one at a time, then.
        self._max_bytes = max(1, max_bytes // lanes) if max_message_bytes >= _ANSWERS_BYTES else 1
        self._message_bytes = min(FULL_MESSAGE_BYTES, max_message_bytes, max(1, self._max_bytes // 2))
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._next_tag = 1
        self._small: deque[SliceRequest] = deque()
        self._small_bytes = 0
        self._large: deque[SliceRequest] = deque()
        self.resent_count = 0

    @property
    def held(self) -> tuple[int, int]:
        """How many slices are in the window, if they are requests, and the bytes of all."""
        requests = len(self._small) + len(self._large) + sum(len(lane.sent) for lane in self.lanes)
        large_bytes = sum(request.byte_count for request in list(self._large))
        byte_count = self._small_bytes + large_bytes + sum(lane.bytes for lane in self.lanes)
        return requests if self._are_counted else 0, byte_count

    @property
    def is_open(self) -> bool:
        """Whether to add another one. If not, wait for what comes."""
        return not self._large and not self._is_full

    @property
    def is_idle(self) -> bool:
        """Whether every slice was delivered."""
        return not self._small and not self._large and not any(lane.sent for lane in self.lanes)

    @property
    def wake_at(self) -> float:
        """When to call `wake`, on the clock; infinity if only an answer can change anything."""
        times = [lane.heard_at + self._silence_seconds for lane in self.lanes if lane.sent]
        if self._small or self._large:
            now = self._clock()
            times += [lane.paused_until for lane in self.lanes if lane.paused_until > now]
        return min(times, default=math.inf)

    @property
    def _is_full(self) -> bool:
        return len(self._small) >= MAX_REQUESTS_PER_MESSAGE or self._small_bytes >= self._message_bytes

    def add(self, request: SliceRequest) -> None:
        """Add a slice. From here on the arrays that it views may be reused."""
        request.tag = self._next_tag
        self._next_tag += 1
        request.added_at = self._clock()
        self._put(request)

    def messages(self, *, flush: bool = False) -> list[tuple[int, bytes]]:
        """Return what is to be sent now, each message with the number of its lane. `flush`: also what is not full."""
        now = self._clock()
        messages: list[tuple[int, bytes]] = []
        while self._large and (lane := self._free_lane(now)) is not None:
            request = self._large.popleft()
            assert request.message is not None  # noqa: S101 - made when it was put here
            self._send(lane, [request], now)
            messages.append((lane.number, request.message))
        while self._small and (lane := self._free_lane(now)) is not None:
            if not (flush or self._is_full or not lane.sent):
                break
            packed = self._take_small()
            self._send(lane, packed, now)
            messages.append((lane.number, encode_stream_request([(each.tag, 0, each.parts) for each in packed])))
        return messages

    def receive(self, number: int, message: bytes) -> None:
        """Take a StreamComputeLossResponse that came on a lane. Raises ServerError if it is none, or patience runs out."""
        lane = self.lanes[number]
        lane.heard_at = self._clock()
        try:
            outcomes = decode_stream_response(message)
        except CodecError as failure:
            raise ServerError(f"the server's answer cannot be read: {failure}") from failure
        for tag, outcome in outcomes:
            request = lane.sent.pop(tag, None)
            if request is None:
                continue  # answered after it was given up here
            lane.bytes -= request.byte_count
            if isinstance(outcome, ResponseView):
                lane.failures = lane.odd_breaks = 0
                self._deliver(request, outcome)
                continue
            error = from_status(outcome)
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                self._deliver(request, error)
                continue
            if error.reason == "DRAINING":
                lane.must_reopen = True  # this stream's server takes no more; another one may
            self._pause(lane, error)
            self._put_back([request], error)

    def lose(self, number: int, error: LossgradError) -> None:
        """Take note that a lane's stream is gone. Raises the error where trying again is no use, or patience runs out."""
        lane = self.lanes[number]
        lane.must_reopen = False
        if not lane.sent:
            return  # nothing is lost: the next message opens another
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            lane.odd_breaks += 1
            if error.code not in _ODD_CODES or lane.odd_breaks > _MAX_ODD_BREAKS:
                raise error
        if self.metrics is not None:
            self.metrics.reconnected(error)
        unanswered = list(lane.sent.values())
        lane.sent.clear()
        lane.bytes = 0
        self._pause(lane, error)
        self._put_back(unanswered, error)

    def wake(self) -> list[int]:
        """Return the lanes from which nothing has come for too long: to be closed, and then to be told lost."""
        now = self._clock()
        return [lane.number for lane in self.lanes if lane.sent and now - lane.heard_at >= self._silence_seconds]

    def silence_error(self) -> LossgradError:
        """Return the error of a stream on which nothing came for too long."""
        return Unavailable(
            f"nothing came from the server for {self._silence_seconds:g} s, though it has work",
            grpc.StatusCode.UNAVAILABLE,
        )

    def _free_lane(self, now: float) -> Lane | None:
        """Return the lane to send on next: of those that have room, the one with the least to do."""
        free = [
            lane
            for lane in self.lanes
            if lane.paused_until <= now
            and len(lane.sent) < MAX_SLICES
            and lane.bytes < self._max_bytes
            and not lane.must_reopen
        ]
        return min(free, key=lambda lane: (lane.bytes, len(lane.sent)), default=None)

    def _take_small(self) -> list[SliceRequest]:
        packed: list[SliceRequest] = []
        size = 0
        while self._small and len(packed) < MAX_REQUESTS_PER_MESSAGE:
            size += self._small[0].byte_count + FRAME_BYTES
            if packed and size > self._message_bytes:
                break
            request = self._small.popleft()
            self._small_bytes -= request.byte_count
            packed.append(request)
        return packed

    def _send(self, lane: Lane, requests: Sequence[SliceRequest], now: float) -> None:
        if not lane.sent:
            lane.heard_at = now
        for request in requests:
            lane.sent[request.tag] = request
            lane.bytes += request.byte_count

    def _put(self, request: SliceRequest) -> None:
        if request.byte_count >= min(ALONE_BYTES, self._message_bytes):
            if request.message is None:
                request.message = encode_stream_request([(request.tag, 0, request.parts)])
                request.parts.clear()
            self._large.append(request)
        else:
            if len(request.parts) > 1:
                request.parts = [b"".join(request.parts)]
            self._small.append(request)
            self._small_bytes += request.byte_count

    def _pause(self, lane: Lane, error: LossgradError) -> None:
        now = self._clock()
        if lane.paused_until <= now:  # otherwise it is for the same reason, of which there is one for each slice
            lane.failures = min(lane.failures + 1, _MAX_ATTEMPTS)
        lane.paused_until = max(lane.paused_until, now + backoff_seconds(lane.failures, error.retry_after))

    def _deliver(self, request: SliceRequest, outcome: Outcome) -> None:
        if self._are_counted and self.metrics is not None:
            self.metrics.finished(outcome, self._clock() - request.added_at)
        request.deliver(outcome)

    def _put_back(self, requests: Sequence[SliceRequest], error: LossgradError) -> None:
        now = self._clock()
        for request in requests:
            request.failed_at = request.failed_at or now
            if now - request.failed_at >= self._patience_seconds:
                raise error
            self._put(request)
        self.resent_count += len(requests)
        if self.metrics is not None:
            self.metrics.retried(error, len(requests))


def answer_of(outcome: Outcome) -> Any:
    """Return an outcome that is an answer; raise one that is an error."""
    if isinstance(outcome, LossgradError):
        raise outcome
    return outcome
