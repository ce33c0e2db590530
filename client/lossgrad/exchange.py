"""What is under way on streams: packed into messages, matched with its answers, sent again. No I/O, no threads.

The part that both windows share: StreamWindow (window.py) keeps the order of one caller's pairs, CallWindow
(call_window.py) serves concurrent callers. Each decides what to send when, and learns by `finish` what became of it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from lossgrad.calls import JOINED_BYTES, Answer, Request
from lossgrad.errors import DeadlineExceeded, InvalidRequest, LossgradError, ServerError, from_status
from lossgrad.throttle import RetryThrottle
from lossgrad_api.codec import Buffer, CodecError, ResponseView, decode_stream_response, encode_stream_request

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics

# The server takes at least this many (ServerLimits.max_stream_requests); more per message gains little.
MAX_REQUESTS_PER_MESSAGE: Final = 64
# Streams of 1 to 4 MiB messages reach a unary call's bandwidth.
FULL_MESSAGE_BYTES: Final = 1024 * 1024
# What a request in a message takes beside its own bytes: tags, lengths, its number, its timeout.
FRAME_BYTES: Final = 64
# What may be gone with another attempt. CANCELLED by whoever is not this side: see channel.py.
TRANSIENT: Final = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED))
_FIRST_BACKOFF_SECONDS: Final = 0.1
_MAX_BACKOFF_SECONDS: Final = 2.0


@dataclass(slots=True, eq=False)
class Item:
    """One request on its way, and where it is in its life."""

    tag: int
    request: Request
    added_at: float
    timeout: float | None
    deadline: float | None
    caller: Any = None  # for whoever owns the exchange
    stream: int = 0  # that it was sent on; 0: not sent yet
    failures: int = 0
    due_at: float = 0.0
    message: bytes | None = None  # of its own, if it is a large one and was packed
    is_forgotten: bool = False  # nobody waits for its answer any more
    trace: bytes = b""  # the fields of the trace that it belongs to


class Room:
    """How much may be under way. Once full, it is closed until there is room for half a message, so that they stay large.

    Not for more than that: the server must have a message to work on while the next one is packed.
    """

    def __init__(self, max_requests: int, max_bytes: int, message_requests: int, message_bytes: int) -> None:
        for name, value in (("in_flight", max_requests), ("in_flight_bytes", max_bytes)):
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be at least 1", field=name)
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._reopen_requests = max_requests - max(1, min(message_requests, max_requests) // 2)
        self._reopen_bytes = max_bytes - max(1, min(message_bytes, max_bytes) // 2)
        self._is_open = True
        self.requests = 0
        self.bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether one more may go in."""
        if self.requests >= self._max_requests or self.bytes >= self._max_bytes:
            self._is_open = False
        elif self.requests <= self._reopen_requests and self.bytes <= self._reopen_bytes:
            self._is_open = True
        return self._is_open

    def take(self, byte_count: int) -> None:
        """Take room for a request."""
        self.requests += 1
        self.bytes += byte_count

    def release(self, byte_count: int) -> None:
        """Give back what a request took."""
        self.requests -= 1
        self.bytes -= byte_count


class Exchange:
    """The requests that are sent and unanswered, and those that wait to be sent again.

    A request that the server cannot take now is sent again, up to `retries` times. `finish` is told of each request what
    became of it, once; of a forgotten one with whatever outcome.
    """

    def __init__(
        self,
        *,
        requests_per_message: int,
        bytes_per_message: int,
        retries: int,
        finish: Callable[[Item, Answer | LossgradError], None],
        metrics: MethodMetrics | None = None,
        throttle: RetryThrottle | None = None,
    ) -> None:
        self.requests_per_message = requests_per_message
        self.bytes_per_message = bytes_per_message
        # A request of this size has a message of its own, joined at once; smaller ones are joined already.
        self._alone_bytes = min(JOINED_BYTES, bytes_per_message)
        self._retries = retries
        self._finish = finish
        self._metrics = metrics
        self.throttle = throttle or RetryThrottle()
        self._sent: dict[int, Item] = {}
        self._put_off: dict[int, Item] = {}
        # Before this nothing is late and nothing due. May be early: what it stood for may be answered since.
        self.wake_at = math.inf
        # The streams whose server takes no more; another one may.
        self.draining: set[int] = set()
        self._given_up: set[int] = set()  # streams

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is outstanding."""
        return bool(self._sent)

    def is_alone(self, byte_count: int) -> bool:
        """Whether a request of this size has a message of its own."""
        return byte_count >= self._alone_bytes

    def pack(self, items: Iterable[Item], now: float, stream: int = 1) -> list[bytes]:
        """Return messages of these items, which are sent from now on."""
        messages: list[bytes] = []
        packed: list[tuple[int, int, list[Buffer]]] = []
        packed_bytes = 0
        traces: dict[int, bytes] = {}
        sent, alone_bytes = self._sent, self._alone_bytes
        for item in items:
            request = item.request
            deadline = item.deadline
            sent[item.tag] = item
            if item.trace:
                traces[item.tag] = item.trace
            item.stream = stream
            if deadline is None:
                timeout_ns = 0
            else:
                # In whole milliseconds, so that requests that were added together have equal ones: those are encoded once.
                timeout_ns = max(1, int((deadline - now) * 1e3)) * 1_000_000
                self.wake_at = min(self.wake_at, deadline)
            if request.byte_count >= alone_bytes:
                if item.message is None:
                    item.message = encode_stream_request([(item.tag, timeout_ns, request.parts)], traces)
                    request.parts.clear()  # the caller's arrays are not needed, nor to be read, from here on
                messages.append(item.message)
                continue
            if packed and (
                len(packed) >= self.requests_per_message or packed_bytes + request.byte_count > self.bytes_per_message
            ):
                messages.append(encode_stream_request(packed, traces))
                packed, packed_bytes = [], 0
            packed.append((item.tag, timeout_ns, request.parts))
            packed_bytes += request.byte_count + FRAME_BYTES
        if packed:
            messages.append(encode_stream_request(packed, traces))
        return messages

    def receive(self, message: bytes, now: float) -> None:
        """Take a StreamComputeLossResponse. Raises ServerError if it is none."""
        try:
            outcomes = decode_stream_response(message)
        except CodecError as error:
            raise ServerError(f"the server's answer cannot be read: {error}") from error
        take, finish = self._sent.pop, self._finish
        may_retry: bool | None = None  # asked once for a message, whatever failed in it
        answered = 0
        for tag, outcome in outcomes:
            item = take(tag, None)
            if item is None:
                continue  # answered before: given up here, or sent twice because the stream broke
            if not isinstance(outcome, ResponseView):
                failure = from_status(outcome)
                if may_retry is None and failure.code in TRANSIENT:
                    may_retry = self.throttle.failed()
                self.fail(item, failure, now, may_retry=may_retry is not False)
                continue
            answered += 1
            answer: Answer | LossgradError
            try:
                answer = item.request.read_view(outcome, now - item.added_at)
            except LossgradError as error:
                answer = error
            finish(item, answer)
        self.throttle.succeeded(answered)

    def fail(
        self, item: Item, error: LossgradError, now: float, jitter: float | None = None, *, may_retry: bool = True
    ) -> None:
        """Take note that a request, which is not sent now, failed: it is put off to be sent again, or finished."""
        if (other := item.request.instead(error)) is not None:
            item.request, item.message, item.due_at = other, None, now
            self._put_off[item.tag] = item
            self.wake_at = min(self.wake_at, now)
            if self._metrics is not None:
                self._metrics.retried(error)
            return
        if error.reason == "DRAINING":
            self.draining.add(item.stream)
        is_over = item.failures >= self._retries or item.is_forgotten or not may_retry
        if error.code not in TRANSIENT or is_over:
            self._finish(item, error)
            return
        item.failures += 1
        item.due_at = now + backoff_seconds(item.failures, error.retry_after, jitter)
        if item.deadline is not None and item.due_at >= item.deadline:
            self._finish(item, error)
            return
        self._put_off[item.tag] = item
        self.wake_at = min(self.wake_at, item.due_at)
        if self._metrics is not None:
            self._metrics.retried(error)

    def take_due(self, now: float) -> list[Item]:
        """Return the items to send again now; give up what is past its deadline."""
        if now < self.wake_at:
            return []
        for items in (self._sent, self._put_off):
            for item in [late for late in items.values() if late.deadline is not None and late.deadline <= now]:
                del items[item.tag]
                self._given_up.add(item.stream)
                self._finish(item, too_late(item))
        due = [item for item in self._put_off.values() if item.due_at <= now]
        for item in due:
            del self._put_off[item.tag]
        times = [item.due_at for item in self._put_off.values()]
        times += [
            item.deadline
            for items in (self._sent, self._put_off)
            for item in items.values()
            if item.deadline is not None
        ]
        self.wake_at = min(times, default=math.inf)
        return due

    def take_sent(self, stream: int | None = None) -> list[Item]:
        """Return all that is sent on a stream, or on any, and unanswered, as not sent any more."""
        items = [item for item in self._sent.values() if stream is None or item.stream == stream]
        for item in items:
            del self._sent[item.tag]
        return items

    def lose(self, stream: int, error: LossgradError, now: float) -> None:
        """Take note that a stream is gone: what is unanswered is put off to be sent again, or failed."""
        jitter = _jitter()  # one for all, which then travel together again
        lost = self.take_sent(stream)
        may_retry = not lost or error.code not in TRANSIENT or self.throttle.failed()
        if self._metrics is not None and not all(item.is_forgotten for item in lost):
            self._metrics.reconnected(error)
        for item in lost:
            own = copy.copy(error)  # one for each caller: an exception that is raised carries where
            own.__cause__ = error.__cause__
            self.fail(item, own, now, jitter, may_retry=may_retry)
        self.draining.discard(stream)

    def forget(self, item: Item) -> None:
        """Take note that nobody waits for an item any more. The server may be at it, so it stays until answered."""
        if item.tag in self._sent:
            self._given_up.add(item.stream)
        item.is_forgotten = True
        item.request.parts.clear()
        if self._put_off.pop(item.tag, None) is not None:
            self._finish(item, too_late(item))

    def take_deserted(self) -> list[int]:
        """Return the streams on which an item was given up since the last time and nobody else waits for an answer."""
        given_up, self._given_up = self._given_up, set()
        awaited = {item.stream for item in self._sent.values() if not item.is_forgotten} if given_up else set()
        return sorted(given_up - awaited)

    def take_all(self) -> list[Item]:
        """Return all that is sent or put off, as neither any more."""
        items = [*self._sent.values(), *self._put_off.values()]
        self._sent.clear()
        self._put_off.clear()
        return items


def too_late(item: Item) -> DeadlineExceeded:
    """Return the error of an item whose deadline has passed."""
    return DeadlineExceeded(f"no answer within {item.timeout} s", grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")


def backoff_seconds(attempt: int, retry_after: float | None, jitter: float | None = None) -> float:
    """Return how long to wait before trying again: what the server says, or else longer each time, with jitter."""
    if retry_after is not None:
        return retry_after
    longest: float = min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 3 ** (attempt - 1))
    return longest * (_jitter() if jitter is None else jitter)


def _jitter() -> float:
    return random.uniform(0.8, 1.2)  # noqa: S311 - spreads clients out, guards nothing
