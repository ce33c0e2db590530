"""The stream of a LossClient: one StreamComputeLoss call, and the two queues between it and the caller's thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossgrad.feed import PairFeed
    from lossgrad.metrics import MethodMetrics

# What a forked child inherits and must neither use nor collect: gRPC's objects without the threads behind them.
inherited: list[Any] = []


class ThreadStream:
    """One StreamComputeLoss call at a time, opened when there is something to send.

    gRPC takes the messages to send from one queue in a thread of its own; a reader thread puts what comes into another,
    ended by None or by the error that the call ended with.
    """

    def __init__(self, open_stream: Callable[[Iterator[bytes]], Any], metrics: MethodMetrics | None = None) -> None:
        """`metrics` count the time that is spent waiting."""
        self._open_stream = open_stream
        self._metrics = metrics
        self._call: Any = None
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._incoming: SimpleQueue[bytes | Exception | None] = SimpleQueue()
        self._reader: threading.Thread | None = None
        self._pid = os.getpid()

    def send(self, messages: list[bytes]) -> None:
        """Send messages, which takes no time: how many there are at a time, the window bounds."""
        if messages and self._call is None:
            self._outgoing, self._incoming = SimpleQueue(), SimpleQueue()
            self._call = self._open_stream(iter(self._outgoing.get, None))
            self._reader = threading.Thread(
                target=_read, args=(self._call, self._incoming), name="lossgrad-stream-reader", daemon=True
            )
            self._reader.start()
        for message in messages:
            self._outgoing.put(message)

    @property
    def has_received(self) -> bool:
        """Whether `received` has something to give at once."""
        return not self._incoming.empty()

    def received(self, wait_seconds: float | None) -> Iterator[bytes | Exception | None]:
        """Give all that has come; if there is nothing, wait for the first for this long, for ever if None."""
        try:
            yield self._incoming.get_nowait() if wait_seconds == 0.0 else self._wait(wait_seconds)
            while True:
                yield self._incoming.get_nowait()
        except Empty:
            return

    def _wait(self, seconds: float | None) -> bytes | Exception | None:
        if self._metrics is None:
            return self._incoming.get(timeout=seconds)
        with self._metrics.waiting():
            return self._incoming.get(timeout=seconds)

    def close(self) -> None:
        """End the call, if there is one. Another can follow."""
        if self._pid != os.getpid():
            inherited.append(self._call)
            return
        if self._call is not None:
            self._outgoing.put(None)
            self._call.cancel()
            assert self._reader is not None  # noqa: S101 - started with the call
            self._reader.join()
            self._call = self._reader = None


def _read(call: Any, incoming: SimpleQueue[bytes | Exception | None]) -> None:
    try:
        for message in call:
            incoming.put(message)
    except Exception as error:
        incoming.put(error)
    else:
        incoming.put(None)


def run_stream(
    pairs: Iterator[Any], feed: PairFeed, open_stream: Callable[[Iterator[bytes]], Any], is_closed: Callable[[], bool]
) -> Iterator[Any]:
    """Drive the window: fill it, give back what is ready, and wait only when neither can be done."""
    window = feed.window
    stream = ThreadStream(open_stream, feed.metrics)
    if feed.memory is not None:
        feed.memory.find_out()
    has_more = True
    try:
        while True:
            while has_more and window.has_room and not window.may_give_back:
                start = time.perf_counter()
                try:
                    pair = next(pairs)
                except StopIteration:
                    has_more = False
                    break
                pull_seconds = time.perf_counter() - start
                stream.send(feed.add(pair))
                stream.send(window.flush_if_slow(pull_seconds))
                if stream.has_received:
                    _take_received(stream, feed, is_closed, block=False)
            stream.send(window.flush())
            yield from feed.take_ready()
            if window.is_empty and not has_more:
                return
            if not (has_more and window.has_room):
                _take_received(stream, feed, is_closed, block=True)
                stream.send(window.take_due())
    finally:
        stream.close()


def _take_received(stream: ThreadStream, feed: PairFeed, is_closed: Callable[[], bool], *, block: bool) -> None:
    """Hand the window what has come; reopen the stream where it broke."""
    for received in stream.received(feed.window.seconds_to_wait() if block else 0.0):
        delay = feed.take(received, is_closed=is_closed())
        if delay is not None:
            stream.close()
            time.sleep(delay)
            stream.send(feed.window.resend())
            return
