"""The window of a stream: what waits, what is sent, what is answered, in which order it is given back. No I/O, no threads.

`LossClient.stream` and `AsyncLossClient.stream` each own one and drive it from the caller's thread or task: they feed
pairs in, send the messages that it packs, hand it what comes back, and ask it what is ready. It is greedy and has no
timer: a message goes out when nothing is under way, when it is full, when the caller's iterable made it wait, or when
there is nothing to add.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import grpc

from lossgrad import tracing
from lossgrad.calls import Answer, Request
from lossgrad.errors import LossgradError, Unavailable
from lossgrad.exchange import (
    FRAME_BYTES,
    FULL_MESSAGE_BYTES,
    MAX_REQUESTS_PER_MESSAGE,
    TRANSIENT,
    Exchange,
    Item,
    Room,
    backoff_seconds,
)
from lossgrad.throttle import RetryThrottle

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics

# Why a stream is left whose server drains.
DRAINING: Final = Unavailable("the server takes no more", grpc.StatusCode.UNAVAILABLE, "DRAINING")
# Four full messages: one that the server computes, one that waits there, one on its way, one that is being read or packed.
DEFAULT_IN_FLIGHT: Final = 256
DEFAULT_IN_FLIGHT_BYTES: Final = 64 * 1024 * 1024
# An iterable that takes longer than this to give the next pair is slower than the server: do not wait for it.
_SLOW_PULL_SECONDS: Final = 0.001


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
        metrics: MethodMetrics | None = None,
        throttle: RetryThrottle | None = None,
    ) -> None:
        # Half a window a message at most, so that the server computes one while the client packs the other.
        message_requests = max(1, min(max_requests // 2, MAX_REQUESTS_PER_MESSAGE))
        message_bytes = min(FULL_MESSAGE_BYTES, max_message_bytes, max(1, max_bytes // 2))
        self._room = Room(max_requests, max_bytes, message_requests, message_bytes)
        self._exchange = Exchange(
            requests_per_message=message_requests,
            bytes_per_message=message_bytes,
            retries=retries,
            finish=self._finish,
            metrics=metrics,
            throttle=throttle,
        )
        self._metrics = metrics
        if metrics is not None:
            metrics.watch(self)
        self._max_message_bytes = max_message_bytes
        self._timeout = timeout
        self._retries = retries
        self._clock = clock
        self._next_tag = 1
        self._next_out = 1
        self._waiting: list[Item] = []
        self._waiting_bytes = 0
        self._waiting_since = 0.0
        self._done: dict[int, Answer | LossgradError] = {}
        self._sizes: deque[int] = deque()  # of all from _next_out to _next_tag: the window
        self._breaks = 0
        self._left_for: LossgradError | None = None  # why the stream before was given up
        self.must_reopen = False

    @property
    def held(self) -> tuple[int, int]:
        """How many requests are in the window, and their bytes."""
        return self._room.requests, self._room.bytes

    @property
    def is_empty(self) -> bool:
        """Whether everything that was added has been given back."""
        return not self._sizes

    @property
    def has_room(self) -> bool:
        """Whether to add more. Once full, not before half a message's room is free, so that messages stay large."""
        return self._room.is_open

    @property
    def may_give_back(self) -> bool:
        """Whether the next result in order is there, and nothing waits that giving it back would hold up."""
        return self._next_out in self._done and not self._waiting

    def add(self, request: Request) -> list[bytes]:
        """Add the next pair; return the messages to send now."""
        now = self._clock()
        exchange, byte_count = self._exchange, request.byte_count
        item = Item(self._take_tag(byte_count), request, now, self._timeout, None)
        if tracing.is_on():
            item.caller = tracing.pair_span()
            trace = tracing.fields_of(item.caller)
            if byte_count + FRAME_BYTES + len(trace) <= self._max_message_bytes:
                item.trace = trace
        if exchange.is_alone(byte_count):
            return [*self.flush(), *self._pack([item])]
        messages = self.flush() if self._waiting_bytes + byte_count > exchange.bytes_per_message else []
        if not self._waiting:
            self._waiting_since = now
        self._waiting.append(item)
        self._waiting_bytes += byte_count + FRAME_BYTES
        if len(self._waiting) >= exchange.requests_per_message or not exchange.is_waiting:
            messages += self.flush()
        return messages

    def add_failed(self, error: LossgradError) -> None:
        """Add the next pair, of which no request could be made."""
        self._done[self._take_tag(0)] = error
        if self._metrics is not None:
            self._metrics.finished(error, 0.0)

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
        self._exchange.receive(message, self._clock())
        self._breaks = 0
        if self._exchange.draining:
            self._exchange.draining.clear()
            self.must_reopen = True  # this stream's server takes no more; another one may
            self._left_for = DRAINING

    def take_due(self) -> list[bytes]:
        """Return the messages to send again now; give up what is past its deadline."""
        return self._pack(self._exchange.take_due(self._clock()))

    def seconds_to_wait(self) -> float | None:
        """Return after how long `take_due` may have something to do; None if only an answer can change anything."""
        wake_at = self._exchange.wake_at
        return None if wake_at == math.inf else max(0.0, wake_at - self._clock())

    def take_ready(self) -> Iterator[Answer | LossgradError]:
        """Give the results that are ready, in the order of the pairs."""
        while (outcome := self._done.pop(self._next_out, None)) is not None:
            self._next_out += 1
            self._room.release(self._sizes.popleft())
            yield outcome

    def break_stream(self, error: LossgradError) -> float | None:
        """Take note that the stream broke; return after how many seconds to open another, None to give up."""
        self.must_reopen = False
        self._breaks += 1
        if error.code not in TRANSIENT or self._breaks > self._retries or not self._exchange.throttle.failed():
            return None
        self._left_for = error
        return backoff_seconds(self._breaks, error.retry_after)

    def resend(self) -> list[bytes]:
        """Return all that is sent and unanswered as messages, for a new stream."""
        self.must_reopen = False
        items = self._exchange.take_sent()
        if self._metrics is not None and self._left_for is not None:
            self._metrics.reconnected(self._left_for)
            self._metrics.retried(self._left_for, len(items))
        return self._pack(items)

    def _take_tag(self, byte_count: int) -> int:
        tag = self._next_tag
        self._next_tag += 1
        self._sizes.append(byte_count)
        self._room.take(byte_count)
        return tag

    def _pack(self, items: list[Item]) -> list[bytes]:
        if not items:
            return []
        now = self._clock()
        if self._timeout is not None:
            for item in items:
                if item.deadline is None:
                    item.deadline = now + self._timeout
        return self._exchange.pack(items, now)

    def _finish(self, item: Item, outcome: Answer | LossgradError) -> None:
        self._done[item.tag] = outcome
        if item.caller is not None:
            tracing.end_span(item.caller, outcome)
        if self._metrics is not None:
            self._metrics.finished(outcome, self._clock() - item.added_at)
