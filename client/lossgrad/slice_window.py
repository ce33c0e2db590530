"""The window of an evaluation: slices on their way, over one stream or several, sent again until answered. No I/O.

A lane is one stream to one server. Slices are independent of each other, and it makes no difference which lane computes
one, nor how often it is sent: its outcome is delivered once. So whatever fails in passing (a broken stream, a full queue, a
server that drains or says nothing any more) only makes a lane pause, and what it left unanswered goes to any lane.

Slices are packed into messages: one goes out when it is full, when a lane has nothing to do, or when the caller flushes.
Small ones are joined and wait; larger ones are written where they are sent from at once, the largest alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc

from lossgrad.errors import LossgradError, ServerError, Unavailable, from_status
from lossgrad.exchange import FRAME_BYTES, FULL_MESSAGE_BYTES, MAX_REQUESTS_PER_MESSAGE, backoff_seconds
from lossgrad.message_builder import HEAD_BYTES, MessageBuilder
from lossgrad_api.codec import Buffer, CodecError, ResponseView, decode_stream_response, encode_stream_request

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics

# On one lane. Four full messages: one that the server computes, one that waits there, one under way, one being packed.
MAX_SLICES: Final = 4 * MAX_REQUESTS_PER_MESSAGE
# What a message costs by itself, some hundred microseconds on either side, is little beside moving as much as this.
# A little more than 8 MiB, so that two slices of 4 MiB fit, with their headers.
MESSAGE_BYTES: Final = 8 * 1024 * 1024 + 4096
# Slices from here on surely have a message of their own.
ALONE_BYTES: Final = MESSAGE_BYTES // 2
# Slices from here on are copied once. Below, it takes longer to prepare than to copy twice.
WRITTEN_BYTES: Final = 32 * 1024
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
    written: memoryview | None = None  # where it is in a message, to be sent again if need be
    added_at: float = 0.0
    failed_at: float = 0.0  # for the first time; 0: never


class _Message(NamedTuple):
    """A message that is written and waits for a lane with room for it."""

    data: bytes
    requests: list[SliceRequest]


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
        self._message_bytes = min(MESSAGE_BYTES, max_message_bytes, max(1, self._max_bytes // 4))
        self._small_message_bytes = min(FULL_MESSAGE_BYTES, self._message_bytes)
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._next_tag = 1
        self._small: deque[SliceRequest] = deque()
        self._small_bytes = 0
        self._builder: MessageBuilder | None = None
        self._built: list[SliceRequest] = []  # what is in it
        self._written: deque[_Message] = deque()
        self.resent_count = 0

    @property
    def held(self) -> tuple[int, int]:
        """How many slices are in the window, if they are requests, and the bytes of all."""
        waiting = [*self._built, *(request for message in list(self._written) for request in message.requests)]
        requests = len(self._small) + len(waiting) + sum(len(lane.sent) for lane in self.lanes)
        byte_count = self._small_bytes + sum(request.byte_count for request in waiting)
        byte_count += sum(lane.bytes for lane in self.lanes)
        return requests if self._are_counted else 0, byte_count

    @property
    def is_open(self) -> bool:
        """Whether to add another one. If not, wait for what comes."""
        return not self._written and not self._is_full and (not self._built or any(map(self._has_room, self.lanes)))

    @property
    def is_idle(self) -> bool:
        """Whether every slice was delivered."""
        return not self._has_unsent and not any(lane.sent for lane in self.lanes)

    @property
    def wake_at(self) -> float:
        """When to call `wake`, on the clock; infinity if only an answer can change anything."""
        times = [lane.heard_at + self._silence_seconds for lane in self.lanes if lane.sent]
        if self._has_unsent:
            now = self._clock()
            times += [lane.paused_until for lane in self.lanes if lane.paused_until > now]
        return min(times, default=math.inf)

    @property
    def _has_unsent(self) -> bool:
        return bool(self._small or self._built or self._written)

    @property
    def _is_full(self) -> bool:
        return len(self._small) >= MAX_REQUESTS_PER_MESSAGE or self._small_bytes >= self._small_message_bytes

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
        while (self._written or self._built) and (lane := self._free_lane(now)) is not None:
            if not self._written:
                if not (flush or not lane.sent):
                    break
                self._finish_message()
            message = self._written.popleft()
            self._send(lane, message.requests, now)
            messages.append((lane.number, message.data))
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
            lane for lane in self.lanes if lane.paused_until <= now and self._has_room(lane) and not lane.must_reopen
        ]
        return min(free, key=lambda lane: (lane.bytes, len(lane.sent)), default=None)

    def _has_room(self, lane: Lane) -> bool:
        return len(lane.sent) < MAX_SLICES and lane.bytes < self._max_bytes

    def _take_small(self) -> list[SliceRequest]:
        packed: list[SliceRequest] = []
        size = 0
        while self._small and len(packed) < MAX_REQUESTS_PER_MESSAGE:
            size += self._small[0].byte_count + FRAME_BYTES
            if packed and size > self._small_message_bytes:
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
        if request.byte_count >= min(WRITTEN_BYTES, self._small_message_bytes):
            self._write(request)
            return
        if len(request.parts) > 1:
            request.parts = [b"".join(request.parts)]
        self._small.append(request)
        self._small_bytes += request.byte_count

    def _write(self, request: SliceRequest) -> None:
        """Write a slice where it is sent from: into the message that is being written, if it fits."""
        parts = request.parts if request.written is None else [request.written]
        byte_count = sum(map(len, parts))
        if self._builder is not None and not self._builder.has_room(byte_count):
            self._finish_message()
        if self._builder is None:
            each_bytes = HEAD_BYTES + byte_count
            # As many as fit, if the next ones are of the same size, as they mostly are.
            count = max(1, min(MAX_REQUESTS_PER_MESSAGE, self._message_bytes // each_bytes))
            self._builder = MessageBuilder(each_bytes * count)
        self._builder.add(request.tag, parts, byte_count)
        self._built.append(request)
        request.parts.clear()  # the caller's arrays are not needed, nor to be read, from here on
        if not self._builder.has_room(byte_count) or len(self._built) >= MAX_REQUESTS_PER_MESSAGE:
            self._finish_message()

    def _finish_message(self) -> None:
        assert self._builder is not None  # noqa: S101 - there is something to finish
        data, copies = self._builder.finish()
        for request, copy in zip(self._built, copies, strict=True):
            request.written = copy
        self._written.append(_Message(data, self._built))
        self._builder, self._built = None, []

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
