"""The small calls of a LossClient, put together onto one stream. CallWindow decides; this is its I/O.

Threads. A caller adds its call to the window and sleeps until it is answered, or late. gRPC takes a stream's messages in a
thread of its own, the writer: `_messages`, which it iterates over, packs all that has come since it took the one before. A
reader thread for each stream delivers what comes. The writer is also the timer, for what is to be sent again and for the
stream's age; where a stream broke, its reader is, until there is another. All share the window, under one lock, which
nobody holds while waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc

from lossgrad.call_window import CallWindow
from lossgrad.calls import Answer, Request, stream_ended
from lossgrad.channel import ChannelSettings
from lossgrad.coalescer import COALESCED_BYTES
from lossgrad.errors import Cancelled, LossgradError, ServerError
from lossgrad.exchange import FRAME_BYTES, Item, too_late
from lossgrad.throttle import throttle_of

# As an AsyncLossClient's (coalescer.py). A call that comes alone is not worth a stream either: it goes by itself.
MAX_AGE_SECONDS: Final = 10.0
MAX_IDLE_SECONDS: Final = 1.0
_MAX_CLOSE_SECONDS: Final = 1.0
_CLOSED: Final = "the client was closed during the call"


@dataclass(slots=True, eq=False)
class _Stream:
    """One StreamComputeLoss call."""

    number: int
    opened_at: float
    used_at: float
    call: Any = None
    doorbell: SimpleQueue[None] = field(default_factory=SimpleQueue)
    messages: list[bytes] = field(default_factory=list)  # for the writer to take first
    is_asleep: bool = False  # whether the writer waits for the doorbell
    wakes_at: float = 0.0  # by itself
    is_old: bool = False  # to be written to no more
    is_over: bool = False  # to be read from no more
    reader: threading.Thread | None = None


class _Caller:
    """A thread that waits for the outcome of its call."""

    __slots__ = ("answered", "outcome")

    def __init__(self) -> None:
        self.answered = threading.Lock()  # released when there is an outcome
        self.answered.acquire()
        self.outcome: Answer | Exception | None = None


class ThreadCoalescer:
    """Puts the calls of any number of threads onto a shared stream, each with its own deadline and error."""

    def __init__(self, settings: ChannelSettings, open_stream: Callable[..., Any]) -> None:
        """`open_stream` is a channel's callable (messages, timeout, metadata) -> responses."""
        self._target = settings.target
        self._metadata = settings.metadata
        self._open_stream = open_stream
        self._clock = time.perf_counter
        self._lock = threading.Lock()
        self._window = CallWindow(
            max_message_bytes=settings.max_message_bytes,
            retries=settings.retries,
            clock=self._clock,
            deliver=_deliver,
            metrics=settings.metrics_of("compute"),
            throttle=throttle_of(settings.target),
        )
        self._limit_bytes = min(COALESCED_BYTES, settings.max_message_bytes - FRAME_BYTES)
        self._streams: dict[int, _Stream] = {}
        self._current: _Stream | None = None  # to write to; the others have only answers to come
        self._opened = 0
        self._called_at = -MAX_IDLE_SECONDS
        self._closed = threading.Event()

    def takes(self, request: Request) -> bool:
        """Whether to compute a request here: a small one, and not the first for a while. To be asked once for each."""
        before, self._called_at = self._called_at, self._clock()
        return request.byte_count < self._limit_bytes and self._called_at - before < MAX_IDLE_SECONDS

    def compute(self, request: Request, timeout_seconds: float | None) -> Answer:
        """Compute a request. Raises LossgradError."""
        caller = _Caller()
        with self._lock:
            if self._closed.is_set():
                raise Cancelled(_CLOSED, grpc.StatusCode.CANCELLED)
            item = self._window.add(request, timeout_seconds, caller)
            self._proceed()
        seconds = -1.0 if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX)
        try:
            if not caller.answered.acquire(timeout=seconds):
                with self._lock:
                    if caller.outcome is None:
                        caller.outcome = too_late(item)
                        self._forget(item)
        except BaseException:  # ctrl-C
            with self._lock:
                self._forget(item)
            raise
        outcome = caller.outcome
        assert outcome is not None  # noqa: S101 - set before it is released
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """End every call, and every stream."""
        with self._lock:
            self._closed.set()
            self._window.fail_all(lambda: Cancelled(_CLOSED, grpc.StatusCode.CANCELLED))
            streams = list(self._streams.values())
            for stream in streams:
                self._leave(stream, Cancelled("the client was closed", grpc.StatusCode.CANCELLED))
        for stream in streams:
            if stream.reader is not None:
                stream.reader.join(_MAX_CLOSE_SECONDS)

    # --- all that follows, but the two threads' loops, with the lock held ---

    def _proceed(self) -> None:
        """See to it that what is to be sent gets sent, and that the writer wakes in time."""
        window = self._window
        if self._current is None and window.has_to_send and not self._closed.is_set():
            self._open()
        stream = self._current
        if (
            stream is not None
            and stream.is_asleep
            and (window.has_to_send or stream.is_old or window.wake_at < stream.wakes_at)
        ):
            stream.is_asleep = False
            stream.doorbell.put(None)

    def _open(self) -> None:
        self._opened += 1
        now = self._clock()
        stream = _Stream(self._opened, now, now)
        try:
            # In no caller's context: each request says which trace it belongs to.
            stream.call = Context().run(
                self._open_stream, self._messages(stream), timeout=None, metadata=self._metadata
            )
        except Exception as error:
            self._fail_all(error)
            return
        self._streams[stream.number] = self._current = stream
        # At once, and not when the writer comes to it: where the stream ends before that, a call that was not sent on it
        # would go to another as if nothing had failed, again and again.
        stream.messages = self._window.messages(stream.number)
        stream.reader = threading.Thread(target=self._read, args=(stream,), name="lossgrad-calls-reader", daemon=True)
        stream.reader.start()

    def _forget(self, item: Item) -> None:
        """Take note that nobody waits for a call any more."""
        self._window.forget(item)
        self._drop_deserted()
        self._proceed()

    def _wake(self) -> None:
        """Do what is due."""
        self._window.wake()
        self._drop_deserted()

    def _drop_deserted(self) -> None:
        """End the streams on which nobody waits for an answer since some gave up: the server need not go on."""
        for number in self._window.take_deserted():
            if number in self._streams:
                self._leave(self._streams[number], Cancelled("nobody waits any more", grpc.StatusCode.CANCELLED))

    def _leave(self, stream: _Stream, error: LossgradError) -> None:
        """End a stream, if it has not ended itself; what it leaves unanswered goes to another, or fails."""
        del self._streams[stream.number]
        stream.is_over = True
        if self._current is stream:
            self._current = None
        stream.doorbell.put(None)
        stream.call.cancel()
        self._window.lose(stream.number, error)

    def _fail_all(self, error: Exception) -> None:
        """Give a fault that nobody foresaw to those who wait, who would wait for ever."""
        self._window.fail_all(lambda: error)

    # --- the writer ---

    def _messages(self, stream: _Stream) -> Iterator[bytes]:
        while True:
            with self._lock:
                messages = self._next_messages(stream)
                if messages is None:
                    return
                seconds = max(0.0, stream.wakes_at - self._clock()) if stream.is_asleep else 0.0
            yield from messages
            if seconds:
                with suppress(Empty):
                    stream.doorbell.get(timeout=seconds)

    def _next_messages(self, stream: _Stream) -> list[bytes] | None:
        """Return what is to be sent now, nothing where the writer is to sleep, None where there is nothing more to send."""
        window, now = self._window, self._clock()
        stream.is_asleep = False
        if now >= window.wake_at:
            self._wake()
        if stream.is_over:
            return None
        if stream.messages:
            messages, stream.messages = stream.messages, []
            return messages
        ends_at = stream.opened_at + MAX_AGE_SECONDS
        if window.is_idle:
            ends_at = min(ends_at, stream.used_at + MAX_IDLE_SECONDS)
        if stream.is_old or now >= ends_at:
            stream.is_old = True
            self._current = None
            self._proceed()
            if self._current is None and not window.is_idle:
                # What is put off must not wait for the old stream's last answers.
                threading.Thread(target=self._wait_for_another, name="lossgrad-calls-timer", daemon=True).start()
            return None
        if window.has_to_send:
            stream.used_at = now
            return window.messages(stream.number)
        stream.is_asleep = True
        stream.wakes_at = min(ends_at, now + MAX_IDLE_SECONDS, window.wake_at)
        return []

    # --- the reader ---

    def _read(self, stream: _Stream) -> None:
        ending: Exception | None = None
        try:
            for message in stream.call:
                with self._lock:
                    if stream.is_over:
                        break
                    self._receive(stream, message)
        except Exception as error:
            ending = error
        with self._lock:
            if not stream.is_over:
                self._leave(stream, self._reason(ending))
        self._wait_for_another()

    def _receive(self, stream: _Stream, message: bytes) -> None:
        try:
            self._window.receive(message)
        except ServerError as error:
            self._leave(stream, error)
        if self._window.is_draining(stream.number):
            stream.is_old = True
        self._proceed()

    def _reason(self, ending: Exception | None) -> LossgradError:
        try:
            return stream_ended(ending, self._target)
        except Exception as fault:
            self._fail_all(fault)
            return ServerError("the client failed to read the stream")  # nobody is left to be told

    def _wait_for_another(self) -> None:
        """See to it that what a broken stream has left is sent again when it is due."""
        while True:
            with self._lock:
                if self._current is None and not self._closed.is_set():
                    self._wake()
                    self._proceed()
                if self._current is not None or self._window.is_idle or self._closed.is_set():
                    return
                seconds = self._window.wake_at - self._clock()
            self._closed.wait(min(max(0.0, seconds), MAX_IDLE_SECONDS))


def _deliver(caller: _Caller, outcome: Answer | Exception) -> None:
    caller.outcome = outcome
    caller.answered.release()
