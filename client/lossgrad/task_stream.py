"""The stream of an AsyncLossClient: one StreamComputeLoss call, and the queue between it and the caller's task."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from lossgrad.errors import Cancelled, Unavailable


class TaskStream:
    """One StreamComputeLoss call at a time, opened when there is something to send.

    A reader task puts what comes into a queue, so that the server can always send, also while this side waits to send.
    """

    def __init__(self, open_stream: Callable[[], Any]) -> None:
        self._open_stream = open_stream
        self._call: Any = None
        self._incoming: deque[bytes | Exception | None] = deque()
        self._arrived = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def send(self, messages: list[bytes]) -> None:
        """Send messages; wait until gRPC has taken them."""
        if messages and self._call is None:
            self._incoming = deque()
            self._arrived = asyncio.Event()
            self._call = self._open_stream()
            self._reader = asyncio.create_task(_read(self._call, self._incoming, self._arrived))
        try:
            for message in messages:
                await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the call has ended; why, the reader learns

    async def received(self, wait_seconds: float | None) -> list[bytes | Exception | None]:
        """Return all that has come; if there is nothing, wait for the first for this long, for ever if None."""
        if not self._incoming and wait_seconds != 0.0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        received = list(self._incoming)
        self._incoming.clear()
        return received

    async def close(self) -> None:
        """End the call, if there is one. Another can follow."""
        if self._call is not None:
            self._call.cancel()
            assert self._reader is not None  # noqa: S101 - started with the call
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._call = self._reader = None


async def _read(call: Any, incoming: deque[bytes | Exception | None], arrived: asyncio.Event) -> None:
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            incoming.append(message)
            arrived.set()
        incoming.append(None)
    except grpc.aio.AioRpcError as error:
        # What grpc.aio makes of a call that ends while it sends, whatever the call ended with.
        is_broken = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
        incoming.append(Unavailable("the connection broke", grpc.StatusCode.UNAVAILABLE) if is_broken else error)
    except Exception as error:  # carried over to the caller's task, which raises it
        incoming.append(error)
    except asyncio.CancelledError:  # the channel was closed, or this task was cancelled by `close`
        incoming.append(Cancelled("the client was closed during the stream", grpc.StatusCode.CANCELLED))
        raise
    finally:
        arrived.set()
