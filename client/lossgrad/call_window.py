"""The window of concurrent calls that share streams: what waits for room, what is sent, what it came to. No I/O, no tasks.

The Coalescer (coalescer.py) owns one and drives it. Calls wait in the order in which they came, and are answered in any.
There is no timer for packing: all that waits when a message can be sent goes into it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from lossgrad import tracing
from lossgrad.calls import Answer, Request
from lossgrad.errors import LossgradError
from lossgrad.exchange import FULL_MESSAGE_BYTES, MAX_REQUESTS_PER_MESSAGE, Exchange, Item, Room, too_late
from lossgrad.throttle import RetryThrottle

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics

# A quarter of what the server takes from one stream before it stops reading, and of a size at which reading the answers
# that come in one message holds up the event loop for about 2 ms.
MAX_REQUESTS: Final = 256
MAX_BYTES: Final = 16 * 1024 * 1024


class CallWindow:
    """Bounded in requests and in bytes: what is beyond waits, first come, first served.

    Each call has a timeout of its own, which counts from when it is added. `deliver` is given the caller of each call and
    what became of it: once, and not at all if it was forgotten.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        retries: int,
        clock: Callable[[], float],
        deliver: Callable[[Any, Answer | Exception], None],
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
        metrics: MethodMetrics | None = None,
        throttle: RetryThrottle | None = None,
    ) -> None:
        message_bytes = min(FULL_MESSAGE_BYTES, max_message_bytes)
        self._room = Room(max_requests, max_bytes, MAX_REQUESTS_PER_MESSAGE, message_bytes)
        self._exchange = Exchange(
            requests_per_message=MAX_REQUESTS_PER_MESSAGE,
            bytes_per_message=message_bytes,
            retries=retries,
            finish=self._finish,
            metrics=metrics,
            throttle=throttle,
        )
        if metrics is not None:
            metrics.watch(self)
        self._clock = clock
        self._deliver = deliver
        self._next_tag = 1
        self._waiting: OrderedDict[int, Item] = OrderedDict()
        self._first_deadline = math.inf  # of those waiting; may be early
        self._again: list[Item] = []  # have their room already

    @property
    def held(self) -> tuple[int, int]:
        """No requests, because each is a call that is counted by itself, and the bytes of those under way."""
        return 0, self._room.bytes

    @property
    def has_to_send(self) -> bool:
        """Whether there is something to send, and room for it."""
        return bool(self._again) or (bool(self._waiting) and self._room.is_open)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, is sent, or will be sent again."""
        return not self._waiting and self._room.requests == 0

    @property
    def wake_at(self) -> float:
        """When to call `wake`, on the clock; infinity if only a call or an answer can change anything."""
        first, second = self._first_deadline, self._exchange.wake_at
        return first if first < second else second

    def add(self, request: Request, timeout: float | None, caller: Any) -> Item:
        """Add a call. It waits until `messages` takes it."""
        now = self._clock()
        deadline = None if timeout is None else now + timeout
        call = Item(self._next_tag, request, now, timeout, deadline, caller)
        if tracing.is_on():
            call.trace = tracing.current_fields()
        self._next_tag += 1
        self._waiting[call.tag] = call
        if deadline is not None and deadline < self._first_deadline:
            self._first_deadline = deadline
        return call

    def messages(self, stream: int) -> list[bytes]:
        """Return what is to be sent now on the stream of this number, which is above 0."""
        now = self._clock()
        items: list[Item] = []
        for call in self._again:
            if call.is_forgotten:
                self._room.release(call.request.byte_count)
            else:
                items.append(call)
        self._again.clear()
        while self._waiting and self._room.is_open:
            _, call = self._waiting.popitem(last=False)
            self._room.take(call.request.byte_count)
            items.append(call)
        if not self._waiting:
            self._first_deadline = math.inf
        return self._exchange.pack(items, now, stream)

    def receive(self, message: bytes) -> None:
        """Take a StreamComputeLossResponse. Raises ServerError if it is none."""
        self._exchange.receive(message, self._clock())

    def is_draining(self, stream: int) -> bool:
        """Whether the server at the other end of a stream takes no more; another one may."""
        return stream in self._exchange.draining

    def take_deserted(self) -> list[int]:
        """Return the streams on which a call was given up since the last time and nobody else waits for an answer."""
        return self._exchange.take_deserted()

    def lose(self, stream: int, error: LossgradError) -> None:
        """Take note that a stream is gone: its calls are sent again on another, or fail."""
        self._exchange.lose(stream, error, self._clock())

    def forget(self, call: Item) -> None:
        """Take note that nobody waits for a call any more. Does nothing where it was answered before."""
        if self._waiting.pop(call.tag, None) is None:
            self._exchange.forget(call)

    def wake(self) -> None:
        """Give up what is past its deadline, and take up what is to be sent again."""
        now = self._clock()
        self._again += self._exchange.take_due(now)
        if now >= self._first_deadline:
            late = [call for call in self._waiting.values() if call.deadline is not None and call.deadline <= now]
            for call in late:
                del self._waiting[call.tag]
                self._deliver(call.caller, too_late(call))
            self._first_deadline = min(
                (call.deadline for call in self._waiting.values() if call.deadline is not None), default=math.inf
            )

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """End every call with an error of its own."""
        for call in [*self._waiting.values(), *self._again, *self._exchange.take_all()]:
            if call.stream:
                self._room.release(call.request.byte_count)
            if not call.is_forgotten:
                self._deliver(call.caller, make_error())
        self._waiting.clear()
        self._again.clear()

    def _finish(self, call: Item, outcome: Answer | LossgradError) -> None:
        self._room.release(call.request.byte_count)
        if not call.is_forgotten:
            self._deliver(call.caller, outcome)
