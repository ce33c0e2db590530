"""A channel whose calls are counted: by method and status code, their time, their messages and bytes.

`metered` and `metered_aio` wrap what LossClient and AsyncLossClient use of a channel, where they are given a registry.
Names and labels of the series are those of go-grpc-prometheus, so that existing dashboards work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Final

import grpc
import grpc.aio

from lossgrad.metrics import ClientMetrics

_UNARY: Final = "unary"
_BIDI_STREAM: Final = "bidi_stream"


class _Method:
    """The series of one gRPC method."""

    def __init__(self, metrics: ClientMetrics, path: str, grpc_type: str) -> None:
        self._metrics = metrics
        _, service, self._name = path.split("/")
        self._labels = (grpc_type, service, self._name)

    def begin(self) -> _Rpc:
        """Count an RPC in."""
        self._metrics.add("grpc_client_started", self._labels)
        return _Rpc(self)

    def sent(self, message: bytes) -> None:
        """Count a message."""
        self._metrics.add("grpc_client_msg_sent", self._labels)
        self._metrics.add("lossgrad_client_sent_bytes", (self._name,), len(message))

    def received(self, message: bytes) -> None:
        """Count a message."""
        self._metrics.add("grpc_client_msg_received", self._labels)
        self._metrics.add("lossgrad_client_received_bytes", (self._name,), len(message))

    def handled(self, code: str, seconds: float) -> None:
        """Count an RPC out."""
        self._metrics.add("grpc_client_handled", (*self._labels, code))
        self._metrics.observe("grpc_client_handling_seconds", self._labels, seconds)


class _Rpc:
    """One RPC under way. `end` counts it out, the first time that it is called."""

    def __init__(self, method: _Method) -> None:
        self._method = method
        self._start = time.perf_counter()
        self._is_over = False

    def end(self, outcome: BaseException | str = "OK") -> None:
        """Take note that it ended, with a status code or an error."""
        if self._is_over:
            return
        self._is_over = True
        if isinstance(outcome, grpc.RpcError):
            outcome = outcome.code().name
        elif isinstance(outcome, BaseException):
            outcome = "CANCELLED" if isinstance(outcome, asyncio.CancelledError) else "UNKNOWN"
        self._method.handled(outcome, time.perf_counter() - self._start)


class _Channel:
    """What the SDK asks of a channel, asked of another one."""

    def __init__(self, channel: Any, metrics: ClientMetrics) -> None:
        self._channel = channel
        self._metrics = metrics

    def close(self) -> Any:
        """End everything under way."""
        return self._channel.close()


class MeteredChannel(_Channel):
    """A grpc.Channel, counted."""

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        """Return a callable (request, timeout, metadata) -> response."""
        series, inner = _Method(self._metrics, method, _UNARY), self._channel.unary_unary(method)

        def call(message: bytes, **options: Any) -> bytes:
            rpc = series.begin()
            series.sent(message)
            try:
                answer: bytes = inner(message, **options)
            except BaseException as error:
                rpc.end(error)
                raise
            rpc.end()
            series.received(answer)
            return answer

        return call

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        """Return a callable (request_iterator, timeout, metadata) -> response iterator."""
        series, inner = _Method(self._metrics, method, _BIDI_STREAM), self._channel.stream_stream(method)

        def counted(messages: Iterator[bytes]) -> Iterator[bytes]:
            for message in messages:
                series.sent(message)
                yield message

        def call(messages: Iterator[bytes], **options: Any) -> _Stream:
            return _Stream(inner(counted(messages), **options), series)

        return call


class _Stream:
    """The responses of a stream."""

    def __init__(self, call: Any, series: _Method) -> None:
        self._call = call
        self._series = series
        self._rpc = series.begin()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            message: bytes = next(self._call)
        except StopIteration:
            self._rpc.end()
            raise
        except BaseException as error:
            self._rpc.end(error)
            raise
        self._series.received(message)
        return message

    def cancel(self) -> Any:
        """End the stream."""
        self._rpc.end("CANCELLED")
        return self._call.cancel()


class MeteredAioChannel(_Channel):
    """A grpc.aio.Channel, counted."""

    def unary_unary(self, method: str) -> Any:
        """Return a function (request, timeout, metadata) to await."""
        series, inner = _Method(self._metrics, method, _UNARY), self._channel.unary_unary(method)

        async def call(message: bytes, **options: Any) -> bytes:
            rpc = series.begin()
            series.sent(message)
            try:
                answer: bytes = await inner(message, **options)
            except BaseException as error:
                rpc.end(error)
                raise
            rpc.end()
            series.received(answer)
            return answer

        return call

    def stream_stream(self, method: str) -> Any:
        """Return a function (timeout, metadata) -> call."""
        series, inner = _Method(self._metrics, method, _BIDI_STREAM), self._channel.stream_stream(method)
        return lambda **options: _AioStream(inner(**options), series)


class _AioStream:
    """A stream's call, read from and written to."""

    def __init__(self, call: Any, series: _Method) -> None:
        self._call = call
        self._series = series
        self._rpc = series.begin()

    async def read(self) -> Any:
        """Return the next message, or grpc.aio.EOF."""
        try:
            message = await self._call.read()
        except BaseException as error:
            self._rpc.end(error)
            raise
        if message is grpc.aio.EOF:
            self._rpc.end()
        else:
            self._series.received(message)
        return message

    async def write(self, message: bytes) -> None:
        """Send a message."""
        self._series.sent(message)
        await self._call.write(message)

    async def done_writing(self) -> None:
        """Say that there is no more to come."""
        await self._call.done_writing()

    def cancel(self) -> Any:
        """End the stream."""
        self._rpc.end("CANCELLED")
        return self._call.cancel()
