"""AsyncLossClient: the client for asyncio. It shares calls.py, feed.py, window.py, loss_methods.py with LossClient.

A client belongs to the event loop in which it is first used, as grpc.aio's channels do, and says so when used in
another. Each running `stream` has one task of its own, which only moves received messages into a queue; the caller's
iterable, packing and unpacking stay in the caller's task. Concurrent small calls share a stream: coalescer.py.
"""

# ruff: noqa: ASYNC109 - the timeout goes to the server as the call's deadline, which asyncio.timeout would not do
from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, overload

import grpc
import grpc.aio
import numpy as np

from lossgrad import tracing
from lossgrad.calls import (
    ASK_SECONDS,
    HEALTH_REQUEST,
    JOINED_BYTES,
    Answer,
    Losses,
    Request,
    TensorOptions,
    as_losses,
    deadline_seconds,
    new_shared_memory,
    prepare,
    read_info,
    require_serving,
    watched,
)
from lossgrad.channel import ChannelSettings
from lossgrad.coalescer import AioConnection, Coalescer
from lossgrad.errors import Cancelled, LossgradError, RequestTooLarge, from_rpc_error
from lossgrad.evaluating import AsyncEvaluateMethods
from lossgrad.feed import ComputeOptions, OnError, PairFeed, StreamOptions
from lossgrad.large import LargeCall, compute_in_tasks, is_too_large, may_be_cut
from lossgrad.loss_methods import LossMethods
from lossgrad.losses import Loss
from lossgrad.results import LossResult, ServerInfo
from lossgrad.sweep import AsyncSweepMethods
from lossgrad.task_stream import TaskStream, puller
from lossgrad.tensor_buffer import filled, gradient_outs
from lossgrad.window import DEFAULT_IN_FLIGHT, DEFAULT_IN_FLIGHT_BYTES
from lossgrad_api.raw_bytes import join_without_gil

if TYPE_CHECKING:
    from lossgrad.metrics import CollectorRegistry
    from lossgrad.shared_memory import SharedMemory


class AsyncLossClient(LossMethods[Coroutine[Any, Any, LossResult]], AsyncEvaluateMethods, AsyncSweepMethods):
    """LossClient for asyncio: the same arguments, methods and results, awaited. Use it as an async context manager.

    Calls with small tensors that are under way at the same time travel together, many to a message, which takes a small
    part of the time that calls of their own would take: `await asyncio.gather(*(client.l1(a, b) for a, b in pairs))`. Each
    keeps its own timeout, cancellation and error. `coalesce=False` makes every call a call of its own. With
    `shared_memory=True` large tensors do not travel, as LossClient says.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        tls: bool | None = None,
        ca: str | Path | bytes | None = None,
        cert: str | Path | bytes | None = None,
        key: str | Path | bytes | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        max_message_bytes: int | None = None,
        coalesce: bool | None = None,
        shared_memory: bool | None = None,
        bulk: bool | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        settings = ChannelSettings.resolve(
            target,
            token=token,
            tls=tls,
            ca=ca,
            cert=cert,
            key=key,
            timeout=timeout,
            retries=retries,
            max_message_bytes=max_message_bytes,
            coalesce=coalesce,
            shared_memory=shared_memory,
            bulk=bulk,
            metrics=metrics,
        )
        self._set_up(settings)

    def _set_up(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._memory = new_shared_memory() if settings.shared_memory else None
        self._metadata = self._settings.metadata
        self._metrics = settings.metrics_of("compute")
        self._limit_bytes = settings.max_message_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: AioConnection | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.target!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} holds a connection and cannot be pickled; make one in each process")

    @overload
    async def compute(self, input: Any, target: Any, losses: Loss, **options: Unpack[ComputeOptions]) -> LossResult: ...

    @overload
    async def compute(
        self, input: Any, target: Any, losses: Sequence[Loss], **options: Unpack[ComputeOptions]
    ) -> tuple[LossResult, ...]: ...

    async def compute(
        self,
        input: Any,
        target: Any,
        losses: Losses,
        *,
        weight: Any = None,
        mask: Any = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> Answer:
        """Compute one loss, or several over the same tensors in one pass, as LossClient.compute. Raises LossgradError."""
        options = TensorOptions(
            weight=weight, mask=mask, allow_broadcast=allow_broadcast, idempotency_key=idempotency_key
        )
        with watched(self._metrics):
            return await self._compute(input, target, losses, options, timeout, gradient_out)

    async def _compute(
        self, input: Any, target: Any, losses: Losses, options: TensorOptions, timeout: float | None, gradient_out: Any
    ) -> Answer:
        specs, is_single = as_losses(losses)
        outs = gradient_outs(gradient_out, specs, is_single=is_single)
        if self._memory is not None:
            await self._ask_for_memory(self._memory)
            shared = self._memory.prepare(input, target, specs, is_single=is_single, **options)
            if shared is not None:
                try:
                    return filled(await self._send(shared, timeout), outs)
                except LossgradError as error:
                    if not self._memory.must_travel(shared, error):
                        raise
        limit = self._limit_bytes
        refusal: RequestTooLarge | None = None
        if not is_too_large(input, target, specs, limit, weight=options["weight"], mask=options["mask"]):
            try:
                request = prepare(input, target, specs, is_single=is_single, max_message_bytes=limit, **options)
                return filled(await self._compute_request(request, timeout), outs)
            except RequestTooLarge as error:
                if not may_be_cut(error):
                    raise
                refusal = error
                if error.__cause__ is not None:  # the server's own limit, or that of what lies between
                    info = await self.info(timeout=timeout)
                    limit = self._limit_bytes = min(limit, info.limits.max_message_bytes or limit)
        call = LargeCall(
            input, target, specs, is_single=is_single, max_message_bytes=limit, gradient_out=outs, **options
        )
        if refusal is not None and call.is_whole:
            raise refusal
        return await compute_in_tasks(call, self._open_stream, self._settings, limit, timeout)

    async def _compute_request(self, request: Request, timeout: float | None) -> Answer:
        coalescer = self._connected().coalescer
        if coalescer is not None and coalescer.takes(request):
            return await coalescer.compute(request, deadline_seconds(timeout, self._settings.timeout))
        return await self._send(request, timeout)

    async def _send(self, request: Request, timeout: float | None) -> Answer:
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        # Copied by a thread, without the GIL: tens of MiB would hold up the event loop for as many milliseconds.
        is_large = request.byte_count >= JOINED_BYTES
        message = await loop.run_in_executor(None, join_without_gil, request.parts) if is_large else request.message()
        answer = await self._call(self._connected().compute, message, timeout)
        read = partial(request.read, answer, time.perf_counter() - start, is_own=True)
        return await loop.run_in_executor(None, read) if is_large and request.copies_answer else read()

    async def _ask_for_memory(self, memory: SharedMemory) -> None:
        if memory.must_ask:
            with suppress(LossgradError):  # the call itself will find out the same, and raises
                memory.offered(await self._call(self._connected().info, b"", ASK_SECONDS))

    async def empty(self, shape: int | tuple[int, ...], dtype: Any = "float32") -> np.ndarray[Any, Any]:
        """Return a new array for tensors to send, as LossClient.empty."""
        if self._memory is None:
            return np.empty(shape, dtype)
        await self._ask_for_memory(self._memory)
        return self._memory.empty(shape, dtype)

    def _compute_one(
        self, input: Any, target: Any, loss: Loss, options: dict[str, Any]
    ) -> Coroutine[Any, Any, LossResult]:
        is_plain = self._connection is not None and self._memory is None and not tracing.is_on()
        coalescer = self._connection.coalescer if self._connection is not None and is_plain else None
        call: Any = None if coalescer is None else coalescer.begin(input, target, loss, **options)
        if call is not None and self._metrics is not None:
            self._metrics.follow(call)
        return self.compute(input, target, loss, **options) if call is None else call

    @overload
    def stream(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        losses: Loss,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamOptions],
    ) -> AsyncIterator[LossResult]: ...

    @overload
    def stream(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        losses: Sequence[Loss],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamOptions],
    ) -> AsyncIterator[tuple[LossResult, ...]]: ...

    @overload
    def stream(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        losses: Losses,
        *,
        on_error: OnError,
        **options: Unpack[StreamOptions],
    ) -> AsyncIterator[Any]: ...

    def stream(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        losses: Losses,
        *,
        in_flight: int = DEFAULT_IN_FLIGHT,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> AsyncIterator[Any]:
        """Compute the losses of many pairs of tensors, as LossClient.stream. `pairs` may be an async iterable."""
        feed = PairFeed(
            self._settings,
            losses,
            on_error,
            in_flight=in_flight,
            in_flight_bytes=in_flight_bytes,
            allow_broadcast=allow_broadcast,
            timeout=timeout,
            memory=self._memory,
        )
        return self._run_stream(pairs, feed)

    async def compute_many(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        losses: Losses,
        *,
        on_error: OnError = "raise",
        **options: Unpack[StreamOptions],
    ) -> list[Any]:
        """Return the results of `stream` as a list; the options are its own."""
        return [result async for result in self.stream(pairs, losses, on_error=on_error, **options)]

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server what it is, what it computes on, and its limits."""
        return read_info(await self._call(self._connected().info, b"", timeout))

    async def ping(self, *, timeout: float | None = None) -> float:
        """Ask the server whether it serves; return the seconds of a round trip. Raises Unavailable if it does not."""
        connection = self._connected()
        try:
            answer = await self._call(connection.health, HEALTH_REQUEST, timeout)
        except LossgradError as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                raise
        else:
            require_serving(answer, self._settings.target)
        start = time.perf_counter()  # the first call has connected
        await self._call(connection.info, b"", timeout)
        return time.perf_counter() - start

    async def close(self) -> None:
        """End the connection, and with it every call under way. Idempotent."""
        self._is_closed = True
        if self._connection is not None:
            self._check_loop()
            connection, self._connection = self._connection, None
            if connection.coalescer is not None:
                await connection.coalescer.close()
            await connection.channel.close()
        if self._memory is not None:
            self._memory.close()

    def _connected(self) -> AioConnection:
        self._check_loop()
        if self._is_closed:
            raise RuntimeError("this client is closed; make a new one")
        if self._connection is None:
            self._connection = AioConnection(self._settings)
            if self._settings.coalesce:
                self._connection.coalescer = Coalescer(self._settings, self._open_stream)
        return self._connection

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError(
                "this AsyncLossClient belongs to another event loop, the one in which it was first used; make one client "
                "in each asyncio.run(), or use LossClient from several threads"
            )

    async def _call(self, method: Any, message: bytes, timeout: float | None) -> bytes:
        seconds = deadline_seconds(timeout, self._settings.timeout)
        try:
            answer: bytes = await method(message, timeout=seconds, metadata=tracing.traced(self._metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._settings.target) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio raises this too when the channel is closed under a call, which cancels no task.
            raise Cancelled("the client was closed during the call", grpc.StatusCode.CANCELLED) from error
        return answer

    async def _run_stream(self, pairs: Iterable[Any] | AsyncIterable[Any], feed: PairFeed) -> AsyncIterator[Any]:
        """Drive the window: fill it, give back what is ready, and wait only when neither can be done."""
        window = feed.window
        stream = TaskStream(self._open_stream, feed.metrics)
        if self._memory is not None:
            await self._ask_for_memory(self._memory)
        pull = puller(pairs)
        has_more = True
        try:
            while True:
                while has_more and window.has_room and not window.may_give_back:
                    start = time.perf_counter()
                    try:
                        pair = await pull()
                    except StopAsyncIteration:
                        has_more = False
                        break
                    pull_seconds = time.perf_counter() - start
                    if messages := [*feed.add(pair), *window.flush_if_slow(pull_seconds)]:
                        await stream.send(messages)
                    if stream.has_received:
                        await self._take_received(stream, feed, block=False)
                await stream.send(window.flush())
                for outcome in feed.take_ready():
                    yield outcome
                if window.is_empty and not has_more:
                    return
                if not (has_more and window.has_room):
                    await self._take_received(stream, feed, block=True)
                    await stream.send(window.take_due())
        finally:
            await stream.close()

    async def _take_received(self, stream: TaskStream, feed: PairFeed, *, block: bool) -> None:
        """Hand the window what has come; reopen the stream where it broke."""
        for received in await stream.received(feed.window.seconds_to_wait() if block else 0.0):
            delay = feed.take(received, is_closed=self._is_closed)
            if delay is not None:
                await stream.close()
                await asyncio.sleep(delay)
                await stream.send(feed.window.resend())
                return

    def _at(self, target: str) -> AsyncLossClient:
        client = AsyncLossClient.__new__(AsyncLossClient)
        client._set_up(dataclasses.replace(self._settings, target=target))
        return client

    def _open_stream(self, *, bulk: bool = False) -> Any:
        metadata = self._settings.metadata_for(bulk=True) if bulk else self._metadata
        return self._connected().stream(timeout=None, metadata=tracing.traced(metadata))
