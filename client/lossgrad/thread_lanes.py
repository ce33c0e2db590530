"""The streams of a LossClient's evaluation: one call for each lane of a SliceWindow, driven from the caller's thread.

gRPC takes each call's messages from a queue, in a thread of its own; a reader thread for each call puts what comes into one
queue for all lanes. Packing, reading answers and all decisions are the caller's thread's, inside `send`, `poll` and `drain`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any

from lossgrad.calls import stream_ended
from lossgrad.errors import LossgradError
from lossgrad.slice_window import SliceRequest, SliceWindow
from lossgrad.thread_stream import inherited

# Opens a StreamComputeLoss call that sends what the iterator gives.
OpenStream = Callable[[Iterator[bytes]], Any]
_Received = bytes | Exception | None  # None: the server ended the stream


class ThreadLanes:
    """Sends slices, and delivers their outcomes. `targets` are what errors call the servers. Close it in the end."""

    def __init__(self, window: SliceWindow, open_streams: Sequence[OpenStream], targets: Sequence[str]) -> None:
        self._window = window
        self._arrivals: SimpleQueue[tuple[_Stream, _Received]] = SimpleQueue()
        self._lanes = list(zip(open_streams, targets, strict=True))
        self._streams: list[_Stream | None] = [None] * len(self._lanes)

    def send(self, request: SliceRequest) -> None:
        """Send a slice, once there is room for it. Outcomes of others are delivered meanwhile."""
        while not self._window.is_open:
            self._step(wait=True)
        self._window.add(request)
        self._send_messages()

    def poll(self, *, flush: bool = False) -> None:
        """Deliver what has come, without waiting. `flush`: send also what does not fill a message."""
        if flush:
            self._send_messages(flush=True)
        if not self._arrivals.empty():
            self._step(wait=False)

    def drain(self) -> None:
        """Wait for all outcomes."""
        while not self._window.is_idle:
            self._send_messages(flush=True)
            self._step(wait=True)

    def close(self) -> None:
        """End the calls. Others can follow."""
        for number in range(len(self._streams)):
            self._close(number)

    def _step(self, *, wait: bool) -> None:
        self._send_messages()
        with suppress(Empty):
            arrival = self._wait() if wait else self._arrivals.get_nowait()
            while True:
                self._take(*arrival)
                arrival = self._arrivals.get_nowait()
        for number in self._window.wake():
            self._break(number, self._window.silence_error())
        self._send_messages()

    def _wait(self) -> tuple[_Stream, _Received]:
        wake_at = self._window.wake_at
        seconds = None if wake_at == math.inf else max(0.0, wake_at - time.perf_counter())
        with nullcontext() if self._window.metrics is None else self._window.metrics.waiting():
            return self._arrivals.get(timeout=seconds)

    def _take(self, stream: _Stream, received: _Received) -> None:
        number = stream.number
        if stream is not self._streams[number]:
            return  # of a call that was given up
        if isinstance(received, bytes):
            self._window.receive(number, received)
            if self._window.lanes[number].must_reopen:
                self._break(number, stream_ended(None, self._lanes[number][1]))
        else:
            self._break(number, stream_ended(received, self._lanes[number][1]))

    def _break(self, number: int, error: LossgradError) -> None:
        self._close(number)
        self._window.lose(number, error)

    def _send_messages(self, *, flush: bool = False) -> None:
        for number, message in self._window.messages(flush=flush):
            stream = self._streams[number]
            if stream is None:
                stream = self._streams[number] = _Stream(number, self._lanes[number][0], self._arrivals)
            stream.outgoing.put(message)

    def _close(self, number: int) -> None:
        stream, self._streams[number] = self._streams[number], None
        if stream is not None:
            stream.close()


class _Stream:
    """One StreamComputeLoss call."""

    def __init__(self, number: int, open_stream: OpenStream, arrivals: SimpleQueue[tuple[_Stream, _Received]]) -> None:
        self.number = number
        self.outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._arrivals = arrivals
        self._pid = os.getpid()
        self._call = open_stream(iter(self.outgoing.get, None))
        self._reader = threading.Thread(target=self._read, name="lossgrad-lane-reader", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End the call."""
        if self._pid != os.getpid():
            inherited.append(self._call)
            return
        self.outgoing.put(None)
        self._call.cancel()
        self._reader.join()

    def _read(self) -> None:
        ending: Exception | None = None
        try:
            for message in self._call:
                self._arrivals.put((self, message))
        except Exception as error:
            ending = error
        self._arrivals.put((self, ending))
