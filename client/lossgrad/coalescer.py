"""The small calls of an AsyncLossClient, put together onto one stream. CallWindow decides; this is its I/O.

Everything runs in the client's event loop. A call adds itself to the window, and is a future of its answer. A writer task
lives while there is something to send: it starts when every task that is ready has had its turn, so that a gather's calls
are all there, and takes what has come together each time that gRPC has taken the messages before. Each stream has a
reader task. One timer serves all deadlines, all retries and the streams' age.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Generator
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc

from lossgrad.call_window import CallWindow
from lossgrad.calls import (
    HEALTH_CHECK,
    JOINED_BYTES,
    UNCUT_BYTES,
    Answer,
    Request,
    deadline_seconds,
    known_request,
    prepare,
    stream_ended,
)
from lossgrad.channel import ChannelSettings, connect_aio
from lossgrad.errors import Cancelled, LossgradError, ServerError
from lossgrad.exchange import FRAME_BYTES, Item
from lossgrad.losses import Loss
from lossgrad.task_stream import finish_stream, read_stream, write_stream
from lossgrad.throttle import throttle_of
from lossgrad_api.codec import COMPUTE_LOSS, GET_SERVER_INFO, STREAM_COMPUTE_LOSS

# Larger requests are calls of their own. Below this a shared stream takes less processor time on both sides than unary
# calls, for a lone caller too: with tensors of 1 and 64 KiB 0.85 and 0.9 of the client's, 0.65 of the server's. Above,
# requests would no longer be joined when they are made, and would hold up small ones behind them.
COALESCED_BYTES: Final = JOINED_BYTES
# A balancer places streams, not messages, and a server that drains waits for streams to end: so none gets old, and none
# is kept for nothing. A new one costs about as much as a unary call.
MAX_AGE_SECONDS: Final = 10.0
MAX_IDLE_SECONDS: Final = 1.0
_MAX_CLOSE_SECONDS: Final = 1.0


@dataclass(slots=True, eq=False)
class _Stream:
    """One StreamComputeLoss call."""

    number: int
    call: Any
    opened_at: float
    used_at: float
    is_old: bool = False  # to be written to no more
    reader: asyncio.Task[None] | None = None


class SharedCall(asyncio.Future[Answer]):
    """A call under way: a future of its answer that can also be used as the coroutine of a call of its own.

    A coroutine takes a task, and the task two turns of the event loop: of a thousand calls in a gather, more time than all
    else that the client does. gather, wait_for and await take this as the future that it is; create_task and TaskGroup,
    which take coroutines only, find `send`, `throw` and `close`.
    """

    # Set by the coalescer, and no parameters of a constructor: one written in Python takes as long as all the rest of it.
    coalescer: Coalescer
    item: Item | None = None  # until it is answered
    _steps: Generator[Any, None, Answer] | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        """Give the call up, unless it is answered."""
        if not super().cancel(msg=msg):
            return False
        item, self.item = self.item, None
        if item is not None:
            self.coalescer.forget(item)
        return True

    def send(self, value: None) -> Any:
        """Go on waiting, as a coroutine does."""
        return self._started().send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error where the answer is waited for, as a coroutine does."""
        return self._started().throw(*error)

    def close(self) -> None:
        """End the waiting, as a coroutine does; with it the call."""
        self.cancel()

    def _started(self) -> Generator[Any, None, Answer]:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps


class Coalescer:
    """Puts calls onto a shared stream, each with its own deadline, cancellation and error."""

    def __init__(self, settings: ChannelSettings, open_stream: Callable[[], Any]) -> None:
        self._target = settings.target
        self._timeout = settings.timeout
        self._max_message_bytes = settings.max_message_bytes
        self._open_stream = open_stream
        self._loop = asyncio.get_running_loop()
        self._window = CallWindow(
            max_message_bytes=settings.max_message_bytes,
            retries=settings.retries,
            clock=self._loop.time,
            deliver=_deliver,
            metrics=settings.metrics_of("compute"),
            throttle=throttle_of(settings.target),
        )
        self._limit_bytes = min(COALESCED_BYTES, settings.max_message_bytes - FRAME_BYTES)
        self._streams: dict[int, _Stream] = {}
        self._current: _Stream | None = None  # to write to; the others have only answers to come
        self._opened = 0
        self._writer: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def takes(self, request: Request) -> bool:
        """Whether a request is small enough."""
        return request.byte_count < self._limit_bytes

    def begin(
        self,
        input: Any,
        target: Any,
        loss: Loss,
        *,
        weight: Any = None,
        mask: Any = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> SharedCall | None:
        """Begin the call of a method such as `smooth_l1`; None where it is to be made in another way.

        That is: with larger tensors, which might have to be cut, or with such as must be converted first; in another event
        loop; with arguments that cannot be sent.
        """
        if gradient_out is not None or allow_broadcast:
            return None
        try:
            if asyncio.get_running_loop() is not self._loop:
                return None
            request = None
            if weight is None and mask is None and not idempotency_key:
                request = known_request(input, target, loss)
            if request is None:
                if _byte_count(input) + _byte_count(target) >= UNCUT_BYTES:
                    return None
                request = prepare(
                    input,
                    target,
                    (loss,),
                    is_single=True,
                    max_message_bytes=self._max_message_bytes,
                    weight=weight,
                    mask=mask,
                    idempotency_key=idempotency_key,
                )
            if request.byte_count >= UNCUT_BYTES or not self.takes(request):
                return None
            return self.compute(request, deadline_seconds(timeout, self._timeout))
        except (LossgradError, RuntimeError):
            return None  # whoever makes it in the other way finds the same

    def compute(self, request: Request, timeout_seconds: float | None) -> SharedCall:
        """Begin to compute a request. Without a timeout it may take for ever."""
        call = SharedCall(loop=self._loop)
        call.coalescer = self
        call.item = self._window.add(request, timeout_seconds, call)
        # With a writer at work, all that is left to see to is that the timer rings in time.
        if self._writer is None or self._window.wake_at < self._timer_at:
            self._proceed()
        return call

    def forget(self, call: Item) -> None:
        """Take note that nobody waits for a call any more."""
        self._window.forget(call)
        self._drop_deserted()
        self._proceed()

    async def close(self) -> None:
        """End every call, and every stream."""
        self._window.fail_all(lambda: Cancelled("the client was closed during the call", grpc.StatusCode.CANCELLED))
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in (self._writer, *(stream.reader for stream in self._streams.values())) if task]
        for stream in self._streams.values():
            stream.call.cancel()
        self._streams.clear()
        self._current = None
        if tasks:
            # They end with their calls. Cancelling them would leave gRPC with operations that end after the event loop.
            _, running = await asyncio.wait(tasks, timeout=_MAX_CLOSE_SECONDS)
            for task in running:
                task.cancel()

    def _proceed(self) -> None:
        """See to it that what is to be sent gets sent, and that the timer rings in time."""
        is_left = self._current is not None and self._current.is_old
        if self._writer is None and (is_left or self._window.has_to_send):
            self._writer = self._loop.create_task(self._write())
        self._ring_by(self._window.wake_at)

    def _ring_by(self, when: float) -> None:
        if when < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = when
            self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer_at = math.inf
        self._window.wake()
        self._drop_deserted()
        stream = self._current
        if stream is not None:
            now = self._loop.time()
            unused_at = stream.used_at if self._window.is_idle else now
            ends_at = min(stream.opened_at + MAX_AGE_SECONDS, unused_at + MAX_IDLE_SECONDS)
            if ends_at <= now:
                stream.is_old = True
            else:
                self._ring_by(ends_at)
        self._proceed()

    async def _write(self) -> None:
        try:
            while True:
                stream = self._current
                if stream is not None and stream.is_old:
                    self._current = None
                    await finish_stream(stream.call)
                elif self._window.has_to_send:
                    if stream is None:
                        stream = self._current = self._open()
                    stream.used_at = self._loop.time()
                    for message in self._window.messages(stream.number):
                        await write_stream(stream.call, message)
                else:
                    return
        except Exception as error:
            self._fail_all(error)
        finally:
            self._writer = None

    def _open(self) -> _Stream:
        self._opened += 1
        now = self._loop.time()
        # In no caller's context: each request says which trace it belongs to.
        stream = _Stream(self._opened, Context().run(self._open_stream), now, now)
        stream.reader = self._loop.create_task(read_stream(stream.call, partial(self._receive, stream)))
        self._streams[stream.number] = stream
        self._ring_by(now + MAX_IDLE_SECONDS)
        return stream

    def _receive(self, stream: _Stream, received: bytes | Exception | None) -> None:
        """Take a message, the error that a stream ended with, or None where the server ended it."""
        if stream.number not in self._streams:
            return  # left before
        if isinstance(received, bytes):
            try:
                self._window.receive(received)
            except ServerError as error:
                self._leave(stream, error)
            if self._window.is_draining(stream.number):
                stream.is_old = True
        else:
            try:
                ending = stream_ended(received, self._target)
            except Exception as fault:
                self._fail_all(fault)
                ending = ServerError("the client failed to read the stream")  # nobody is left to be told
            self._leave(stream, ending)
        self._proceed()

    def _drop_deserted(self) -> None:
        """End the streams on which nobody waits for an answer since some gave up: the server need not go on."""
        for number in self._window.take_deserted():
            if number in self._streams:
                self._leave(self._streams[number], Cancelled("nobody waits any more", grpc.StatusCode.CANCELLED))

    def _leave(self, stream: _Stream, error: LossgradError) -> None:
        """End a stream, if it has not ended itself; what it leaves unanswered goes to another, or fails."""
        del self._streams[stream.number]
        if self._current is stream:
            self._current = None
        stream.call.cancel()
        self._window.lose(stream.number, error)

    def _fail_all(self, error: Exception) -> None:
        """Give a fault that nobody foresaw to those who wait, who would wait for ever."""
        self._window.fail_all(lambda: error)


class AioConnection:
    """A channel of the running event loop, its four methods on bytes, and what shares its streams."""

    def __init__(self, settings: ChannelSettings) -> None:
        channel: Any = connect_aio(settings)
        if settings.metrics is not None:
            from lossgrad.metered import MeteredAioChannel

            channel = MeteredAioChannel(channel, settings.metrics)
        self.channel = channel
        self.compute: Any = channel.unary_unary(COMPUTE_LOSS)
        self.info: Any = channel.unary_unary(GET_SERVER_INFO)
        self.health: Any = channel.unary_unary(HEALTH_CHECK)
        self.stream: Any = channel.stream_stream(STREAM_COMPUTE_LOSS)
        self.coalescer: Coalescer | None = None


def _deliver(call: SharedCall, outcome: Answer | Exception) -> None:
    call.item = None
    if call.done():  # cancelled, and about to say so
        return
    if isinstance(outcome, Exception):
        call.set_exception(outcome)
    else:
        call.set_result(outcome)


def _byte_count(array: Any) -> float:
    """Return the size of an array, infinity for what has none yet, such as a list."""
    return getattr(array, "nbytes", math.inf)
