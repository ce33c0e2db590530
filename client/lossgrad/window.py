"""The window of a stream: what waits, what is sent, what is answered, in which order it is given back. No I/O, no threads.

`LossClient.stream` and `AsyncLossClient.stream` each own one and drive it from the caller's thread or task: they feed
pairs in, send the messages that it packs, hand it what comes back, and ask it what is ready. It is greedy and has no
timer: a message goes out when nothing is under way, when it is full, when the caller's iterable made it wait, or when
there is nothing to add.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import grpc

from lossgrad.calls import Answer, Request
from lossgrad.errors import DeadlineExceeded, InvalidRequest, LossgradError, ServerError, from_status
from lossgrad_api.codec import Buffer, CodecError, ResponseView, decode_stream_response, encode_stream_request

DEFAULT_IN_FLIGHT: Final = 128
DEFAULT_IN_FLIGHT_BYTES: Final = 64 * 1024 * 1024
# The server takes at least this many (ServerLimits.max_stream_requests); more per message gains little.
MAX_REQUESTS_PER_MESSAGE: Final = 64
# Streams of 1 to 4 MiB messages reach a unary call's bandwidth.
_FULL_MESSAGE_BYTES: Final = 1024 * 1024
# From here on a request has a message of its own, joined at once; below, it is copied, so that the caller may reuse
# its arrays for the next pair.
_ALONE_BYTES: Final = 256 * 1024
# An iterable that takes longer than this to give the next pair is slower than the server: do not wait for it.
_SLOW_PULL_SECONDS: Final = 0.001
_FIRST_BACKOFF_SECONDS: Final = 0.1
_MAX_BACKOFF_SECONDS: Final = 2.0
# What a request in a message takes beside its own bytes: tags, lengths, its number, its timeout.
FRAME_BYTES: Final = 64


@dataclass(slots=True)
class _Item:
    """One pair on its way: its request, its encoded form, and where it is in its life."""

    tag: int
    request: Request
    byte_count: int
    added_at: float
    deadline: float | None = None
    failures: int = 0
    due_at: float = 0.0
    # One of the two: a message of its own, or bytes to pack with others.
    message: bytes | None = None
    parts: list[Buffer] | None = None


class StreamWindow:
    """Bounded in requests and in bytes; the results of pairs that were added come out in the order of the pairs.

    `timeout` is each request's, from when it is sent. A request that the server cannot take now is sent again, up to
    `retries` times, and so is all that is unanswered when the stream breaks.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_bytes: int,
        max_message_bytes: int,
        timeout: float | None,
        retries: int,
        clock: Callable[[], float],
    ) -> None:
        for name, value in (("in_flight", max_requests), ("in_flight_bytes", max_bytes)):
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be at least 1", field=name)
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        # Half a window a message, so that the server computes one while the client packs the other.
        self._requests_per_message = max(1, min(max_requests // 2, MAX_REQUESTS_PER_MESSAGE))
        self._bytes_per_message = min(_FULL_MESSAGE_BYTES, max_message_bytes, max(1, max_bytes // 2))
        self._timeout = timeout
        self._retries = retries
        self._clock = clock
        self._next_tag = 1
        self._next_out = 1
        self._waiting: list[_Item] = []
        self._waiting_bytes = 0
        self._waiting_since = 0.0
        self._sent: dict[int, _Item] = {}
        self._put_off: list[_Item] = []
        self._done: dict[int, Answer | LossgradError] = {}
        self._sizes: deque[int] = deque()  # of all from _next_out to _next_tag: the window
        self._bytes = 0
        self._is_filling = True
        self._breaks = 0
        self.must_reopen = False

    @property
    def is_empty(self) -> bool:
        """Whether everything that was added has been given back."""
        return not self._sizes

    @property
    def has_room(self) -> bool:
        """Whether to add more. Once full, not before half is free again, so that messages stay large."""
        if len(self._sizes) >= self._max_requests or self._bytes >= self._max_bytes:
            self._is_filling = False
        elif 2 * len(self._sizes) <= self._max_requests and 2 * self._bytes <= self._max_bytes:
            self._is_filling = True
        return self._is_filling

    @property
    def may_give_back(self) -> bool:
        """Whether the next result in order is there, and nothing waits that giving it back would hold up."""
        return self._next_out in self._done and not self._waiting

    def add(self, request: Request) -> list[bytes]:
        """Add the next pair; return the messages to send now."""
        now = self._clock()
        item = _Item(self._take_tag(request.byte_count), request, request.byte_count, now)
        if request.byte_count >= min(_ALONE_BYTES, self._bytes_per_message):
            return [*self.flush(), *self._pack([item])]
        item.parts = [request.message()]
        request.parts.clear()
        messages = self.flush() if self._waiting_bytes + request.byte_count > self._bytes_per_message else []
        if not self._waiting:
            self._waiting_since = now
        self._waiting.append(item)
        self._waiting_bytes += request.byte_count + FRAME_BYTES
        if len(self._waiting) >= self._requests_per_message or not self._sent:
            messages += self.flush()
        return messages

    def add_failed(self, error: LossgradError) -> None:
        """Add the next pair, of which no request could be made."""
        self._done[self._take_tag(0)] = error

    def flush_if_slow(self, pull_seconds: float) -> list[bytes]:
        """Return what waits as messages, if the iterable took this long for its last pair that waiting for more is loss."""
        waited = self._clock() - self._waiting_since if self._waiting else 0.0
        return self.flush() if self._waiting and max(waited, pull_seconds) > _SLOW_PULL_SECONDS else []

    def flush(self) -> list[bytes]:
        """Return all that waits as messages."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return self._pack(waiting) if waiting else []

    def receive(self, message: bytes) -> None:
        """Take a StreamComputeLossResponse. Raises ServerError if it is none."""
        try:
            outcomes = decode_stream_response(message)
        except CodecError as error:
            raise ServerError(f"the server's answer cannot be read: {error}") from error
        self._breaks = 0
        now = self._clock()
        for tag, outcome in outcomes:
            item = self._sent.pop(tag, None)
            if item is None:
                continue  # answered before: given up here, or sent twice because the stream broke
            if isinstance(outcome, ResponseView):
                try:
                    self._done[tag] = item.request.read_view(outcome, now - item.added_at)
                except LossgradError as error:
                    self._done[tag] = error
            else:
                self._fail(item, from_status(outcome), now)

    def take_due(self) -> list[bytes]:
        """Return the messages to send again now; give up what is past its deadline."""
        now = self._clock()
        for items in (self._sent.values(), self._put_off):
            for item in [late for late in items if late.deadline is not None and late.deadline <= now]:
                self._give_up(item)
        due = [item for item in self._put_off if item.due_at <= now]
        if not due:
            return []
        self._put_off = [item for item in self._put_off if item.due_at > now]
        return self._pack(due)

    def seconds_to_wait(self) -> float | None:
        """Return after how long `take_due` has something to do; None if only an answer can change anything."""
        times = [item.due_at for item in self._put_off]
        times += [item.deadline for item in (*self._sent.values(), *self._put_off) if item.deadline is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def take_ready(self) -> Iterator[Answer | LossgradError]:
        """Give the results that are ready, in the order of the pairs."""
        while (outcome := self._done.pop(self._next_out, None)) is not None:
            self._next_out += 1
            self._bytes -= self._sizes.popleft()
            yield outcome

    def break_stream(self, error: LossgradError) -> float | None:
        """Take note that the stream broke; return after how many seconds to open another, None to give up."""
        self.must_reopen = False
        self._breaks += 1
        if error.code is not grpc.StatusCode.UNAVAILABLE or self._breaks > self._retries:
            return None
        return backoff_seconds(self._breaks, error.retry_after)

    def resend(self) -> list[bytes]:
        """Return all that is sent and unanswered as messages, for a new stream."""
        items = list(self._sent.values())
        self._sent.clear()
        return self._pack(items)

    def _take_tag(self, byte_count: int) -> int:
        tag = self._next_tag
        self._next_tag += 1
        self._sizes.append(byte_count)
        self._bytes += byte_count
        return tag

    def _pack(self, items: list[_Item]) -> list[bytes]:
        """Return messages of these items, which are sent from now on."""
        now = self._clock()
        messages: list[bytes] = []
        packed: list[tuple[int, int, list[Buffer]]] = []
        packed_bytes = 0
        for item in items:
            if item.deadline is None and self._timeout is not None:
                item.deadline = now + self._timeout
            self._sent[item.tag] = item
            timeout_ns = 0 if item.deadline is None else max(1, int((item.deadline - now) * 1e9))
            if item.parts is None:
                if item.message is None:
                    item.message = encode_stream_request([(item.tag, timeout_ns, item.request.parts)])
                    item.request.parts.clear()  # the caller's arrays are not needed, nor to be read, from here on
                messages.append(item.message)
                continue
            if packed and (
                len(packed) >= self._requests_per_message or packed_bytes + item.byte_count > self._bytes_per_message
            ):
                messages.append(encode_stream_request(packed))
                packed, packed_bytes = [], 0
            packed.append((item.tag, timeout_ns, item.parts))
            packed_bytes += item.byte_count + FRAME_BYTES
        if packed:
            messages.append(encode_stream_request(packed))
        return messages

    def _fail(self, item: _Item, error: LossgradError, now: float) -> None:
        if error.code is not grpc.StatusCode.UNAVAILABLE or item.failures >= self._retries:
            self._done[item.tag] = error
            return
        item.failures += 1
        item.due_at = now + backoff_seconds(item.failures, error.retry_after)
        if item.deadline is not None and item.due_at >= item.deadline:
            self._done[item.tag] = error
            return
        self._put_off.append(item)
        if error.reason == "DRAINING":
            self.must_reopen = True  # this stream's server takes no more; another one may

    def _give_up(self, item: _Item) -> None:
        if self._sent.pop(item.tag, None) is None:
            self._put_off.remove(item)
        self._done[item.tag] = DeadlineExceeded(
            f"no answer within {self._timeout} s", grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"
        )


def backoff_seconds(attempt: int, retry_after: float | None) -> float:
    """Return how long to wait before trying again: what the server says, or else longer each time, with jitter."""
    if retry_after is not None:
        return retry_after
    longest: float = min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 3 ** (attempt - 1))
    return longest * random.uniform(0.8, 1.2)  # noqa: S311 - spreads clients out, guards nothing
