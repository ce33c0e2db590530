"""The streams of an AsyncLossClient's evaluation: one call for each lane of a SliceWindow, driven from the caller's task.

Each call has a writer and a reader task, which only move messages between gRPC and queues; packing, reading answers and
all decisions are the caller's task's, inside `send`, `poll` and `drain`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from lossgrad.calls import stream_ended
from lossgrad.errors import LossgradError
from lossgrad.slice_window import SliceRequest, SliceWindow
from lossgrad.task_stream import read_stream, write_stream

_Received = bytes | Exception | None  # None: the server ended the stream


class TaskLanes:
    """Sends slices, and delivers their outcomes. `targets` are what errors call the servers. Close it in the end."""

    def __init__(self, window: SliceWindow, open_streams: Sequence[Callable[[], Any]], targets: Sequence[str]) -> None:
        self._window = window
        self._arrivals: deque[tuple[_Stream, _Received]] = deque()
        self._arrived = asyncio.Event()
        self._lanes = list(zip(open_streams, targets, strict=True))
        self._streams: list[_Stream | None] = [None] * len(self._lanes)

    async def send(self, request: SliceRequest) -> None:
        """Send a slice, once there is room for it. Outcomes of others are delivered meanwhile."""
        while not self._window.is_open:
            await self._step(wait=True)
        self._window.add(request)
        if self._send_messages():
            await asyncio.sleep(0)  # so that the writers, and everybody else, have their turn

    async def poll(self, *, flush: bool = False) -> None:
        """Deliver what has come, without waiting. `flush`: send also what does not fill a message."""
        if flush:
            self._send_messages(flush=True)
        if self._arrivals:
            await self._step(wait=False)

    async def drain(self) -> None:
        """Wait for all outcomes."""
        while not self._window.is_idle:
            self._send_messages(flush=True)
            await self._step(wait=True)

    async def close(self) -> None:
        """End the calls. Others can follow."""
        for number in range(len(self._streams)):
            await self._close(number)

    async def _step(self, *, wait: bool) -> None:
        self._send_messages()
        if wait and not self._arrivals:
            self._arrived.clear()
            wake_at = self._window.wake_at
            metrics = self._window.metrics
            with suppress(TimeoutError), nullcontext() if metrics is None else metrics.waiting():
                async with asyncio.timeout(max(0.0, wake_at - time.perf_counter()) if wake_at < 1e18 else None):
                    await self._arrived.wait()
        while self._arrivals:
            await self._take(*self._arrivals.popleft())
        for number in self._window.wake():
            await self._break(number, self._window.silence_error())
        self._send_messages()

    async def _take(self, stream: _Stream, received: _Received) -> None:
        number = stream.number
        if stream is not self._streams[number]:
            return  # of a call that was given up
        if isinstance(received, bytes):
            self._window.receive(number, received)
            if self._window.lanes[number].must_reopen:
                await self._break(number, stream_ended(None, self._lanes[number][1]))
        else:
            await self._break(number, stream_ended(received, self._lanes[number][1]))

    async def _break(self, number: int, error: LossgradError) -> None:
        await self._close(number)
        self._window.lose(number, error)

    def _send_messages(self, *, flush: bool = False) -> bool:
        messages = self._window.messages(flush=flush)
        for number, message in messages:
            stream = self._streams[number]
            if stream is None:
                stream = self._streams[number] = _Stream(number, self._lanes[number][0], self._receive)
            stream.send(message)
        return bool(messages)

    def _receive(self, stream: _Stream, received: _Received) -> None:
        self._arrivals.append((stream, received))
        self._arrived.set()

    async def _close(self, number: int) -> None:
        stream, self._streams[number] = self._streams[number], None
        if stream is not None:
            await stream.close()


class _Stream:
    """One StreamComputeLoss call."""

    def __init__(
        self, number: int, open_stream: Callable[[], Any], receive: Callable[[_Stream, _Received], None]
    ) -> None:
        self.number = number
        self._outgoing: deque[bytes] = deque()
        self._has_outgoing = asyncio.Event()
        self._call = open_stream()
        self._reader = asyncio.create_task(read_stream(self._call, lambda received: receive(self, received)))
        self._writer = asyncio.create_task(self._write())

    def send(self, message: bytes) -> None:
        """Send a message, which takes no time: how many there are at a time, the window bounds."""
        self._outgoing.append(message)
        self._has_outgoing.set()

    async def close(self) -> None:
        """End the call."""
        self._call.cancel()
        self._reader.cancel()
        self._writer.cancel()
        await asyncio.wait([self._reader, self._writer])

    async def _write(self) -> None:
        while True:
            while self._outgoing:
                await write_stream(self._call, self._outgoing.popleft())
            self._has_outgoing.clear()
            await self._has_outgoing.wait()
