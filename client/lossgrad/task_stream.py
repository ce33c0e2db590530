"""StreamComputeLoss calls of an AsyncLossClient: reading, writing, what is read from, and the queue to a caller's task."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from lossgrad.errors import Cancelled, Unavailable

if TYPE_CHECKING:
    from lossgrad.metrics import MethodMetrics


class TaskStream:
    """One StreamComputeLoss call at a time, opened when there is something to send.

    A reader task puts what comes into a queue, so that the server can always send, also while this side waits to send.
    """

    def __init__(self, open_stream: Callable[[], Any], metrics: MethodMetrics | None = None) -> None:
        """`metrics` count the time that is spent waiting."""
        self._open_stream = open_stream
        self._metrics = metrics
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
            self._reader = asyncio.create_task(read_stream(self._call, self._put))
        for message in messages:
            await write_stream(self._call, message)

    @property
    def has_received(self) -> bool:
        """Whether `received` has something to give at once."""
        return bool(self._incoming)

    async def received(self, wait_seconds: float | None) -> list[bytes | Exception | None]:
        """Return all that has come; if there is nothing, wait for the first for this long, for ever if None."""
        if not self._incoming and wait_seconds != 0.0:
            self._arrived.clear()
            try:
                with nullcontext() if self._metrics is None else self._metrics.waiting():
                    async with asyncio.timeout(wait_seconds):
                        await self._arrived.wait()
            except TimeoutError:
                return []
        received = list(self._incoming)
        self._incoming.clear()
        return received

    def _put(self, received: bytes | Exception | None) -> None:
        self._incoming.append(received)
        self._arrived.set()

    async def close(self) -> None:
        """End the call, if there is one. Another can follow."""
        if self._call is not None:
            self._call.cancel()
            assert self._reader is not None  # noqa: S101 - started with the call
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._call = self._reader = None


async def read_stream(call: Any, deliver: Callable[[bytes | Exception | None], None]) -> None:
    """Deliver each message of a call, and then the error that it ended with, or None where the server ended it."""
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            deliver(message)
    except grpc.aio.AioRpcError as error:
        # What grpc.aio makes of a call that ends while it sends, whatever the call ended with.
        is_broken = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
        deliver(Unavailable("the connection broke", grpc.StatusCode.UNAVAILABLE) if is_broken else error)
    except Exception as error:  # carried over to the caller's task, which raises it
        deliver(error)
    except asyncio.CancelledError:  # the channel was closed, or this task was cancelled by whoever owns it
        deliver(Cancelled("the client was closed during the stream", grpc.StatusCode.CANCELLED))
        raise
    else:
        deliver(None)


async def write_stream(call: Any, message: bytes) -> None:
    """Send a message; wait until gRPC has taken it. Where the call has ended, do nothing: why, the reader learns."""
    try:
        await call.write(message)
    except (grpc.RpcError, asyncio.InvalidStateError):
        return
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # grpc.aio raises this too when the call is cancelled, which cancels no task.


async def finish_stream(call: Any) -> None:
    """Tell the server that there is no more to come; what it has, it still answers."""
    try:
        await call.done_writing()
    except (grpc.RpcError, asyncio.InvalidStateError):
        return
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise


def puller(pairs: Iterable[Any] | AsyncIterable[Any]) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Return a function that gives the next pair, and raises StopAsyncIteration after the last."""
    if isinstance(pairs, AsyncIterable):
        asynchronous = aiter(pairs)

        async def pull_async() -> Any:
            return await anext(asynchronous)

        return pull_async
    iterator = iter(pairs)
    end = object()

    async def pull() -> Any:
        pair = next(iterator, end)
        if pair is end:
            raise StopAsyncIteration
        return pair

    return pull
