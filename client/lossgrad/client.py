"""LossClient: the client for threads. What it shares with AsyncLossClient is in calls.py, window.py, loss_methods.py.

A client may be used from any number of threads. Its gRPC channel belongs to the process: after a fork the child makes
its own at its first call and never touches the parent's. Each running `stream` has one thread of its own, which only
moves received messages into a queue; the caller's iterable, packing and unpacking stay in the caller's thread.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, overload

import grpc
import numpy as np

from lossgrad import forking, tracing
from lossgrad.calls import (
    ASK_SECONDS,
    HEALTH_REQUEST,
    Answer,
    Connection,
    Losses,
    Request,
    TensorOptions,
    as_losses,
    deadline_seconds,
    known_request,
    new_shared_memory,
    prepare,
    read_info,
    require_serving,
    watched,
)
from lossgrad.channel import Channel, ChannelSettings, connect
from lossgrad.errors import LossgradError, RequestTooLarge, from_rpc_error
from lossgrad.evaluating import EvaluateMethods
from lossgrad.feed import ComputeOptions, OnError, PairFeed, StreamOptions
from lossgrad.large import LargeCall, compute_in_threads, is_too_large, may_be_cut
from lossgrad.loss_methods import LossMethods
from lossgrad.losses import Loss
from lossgrad.results import LossResult, ServerInfo
from lossgrad.sweep import SweepMethods
from lossgrad.tensor_buffer import filled, gradient_outs
from lossgrad.thread_coalescer import ThreadCoalescer
from lossgrad.thread_stream import inherited, run_stream
from lossgrad.window import DEFAULT_IN_FLIGHT, DEFAULT_IN_FLIGHT_BYTES

if TYPE_CHECKING:
    from lossgrad.metrics import CollectorRegistry


class LossClient(LossMethods[LossResult], EvaluateMethods, SweepMethods):
    """Computes losses on a lossgrad server. Use it as a context manager, or call `close`.

    Every argument left out is read from its environment variable, LOSSGRAD_TARGET and so on.

    `target` is a gRPC target: "host:port", "dns:///host:port", "unix:/path" (localhost:50051). `token` is sent as a
    bearer token. `ca`, `cert` and `key` (PEM: paths, or bytes) turn TLS on; `tls=True` alone trusts the system's
    authorities. `timeout` is each call's, in seconds (30). `retries` is how often a call that found the server
    unavailable is sent again (2). `max_message_bytes` is the largest message to send or take (256 MiB). `bulk` lets all that
    others wait for go first (False).

    Calls with small tensors that follow one another within a second, or come from several threads at once, share a stream:
    those that wait travel in one message. Each keeps its own timeout and error. `coalesce=False` makes every call a call of
    its own.
    `shared_memory=True` leaves large tensors in memory shared with a server on this machine that allows it; otherwise they
    travel as ever. Arrays of results then lie there, so keep no more of them than you need.
    `metrics` is a prometheus_client.CollectorRegistry for the series lossgrad_client_* and grpc_client_*.
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
        self._set_up(settings, None)

    @classmethod
    def from_channel(
        cls,
        channel: Channel,
        *,
        target: str = "the channel's target",
        timeout: float | None = None,
        retries: int | None = None,
        max_message_bytes: int | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> Self:
        """Return a client over a channel of the caller's own, with interceptors perhaps; `close` closes it too.

        `target` is what errors call the server. `retries` are those of streams; unary calls have the channel's.
        """
        client = cls.__new__(cls)
        settings = ChannelSettings.of_given_channel(
            target, timeout=timeout, retries=retries, max_message_bytes=max_message_bytes, metrics=metrics
        )
        client._set_up(settings, channel)
        return client

    def _set_up(self, settings: ChannelSettings, channel: Channel | None) -> None:
        self._settings = settings
        self._metadata = settings.metadata
        self._metrics = settings.metrics_of("compute")
        self._limit_bytes = settings.max_message_bytes
        self._given = channel
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._is_closed = False
        self._pid = os.getpid()
        self._memory = new_shared_memory(self._ask_for_memory) if settings.shared_memory else None
        forking.watch(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.target!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} holds a connection and cannot be pickled; make one in each process")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of what holds it, such as a module, goes on using the same connection

    @overload
    def compute(self, input: Any, target: Any, losses: Loss, **options: Unpack[ComputeOptions]) -> LossResult: ...

    @overload
    def compute(
        self, input: Any, target: Any, losses: Sequence[Loss], **options: Unpack[ComputeOptions]
    ) -> tuple[LossResult, ...]: ...

    def compute(
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
        """Compute one loss, or several over the same tensors in one pass: `[SmoothL1(beta=0.1), L1()]`.

        The options are those of the methods `smooth_l1`, `huber`, `l1` and `mse`; `gradient_out` for several losses is a
        list of arrays, None where there is no gradient. Raises LossgradError.
        """
        more = TensorOptions(weight=weight, mask=mask, allow_broadcast=allow_broadcast, idempotency_key=idempotency_key)
        with watched(self._metrics):
            return self._compute(input, target, losses, more, timeout, gradient_out)

    def _compute(
        self, input: Any, target: Any, losses: Losses, options: TensorOptions, timeout: float | None, gradient_out: Any
    ) -> Answer:
        specs, is_single = as_losses(losses)
        outs = gradient_outs(gradient_out, specs, is_single=is_single)
        if self._memory is not None:
            answer = self._memory.compute(self._send, timeout, input, target, specs, is_single=is_single, **options)
            if answer is not None:
                return filled(answer, outs)
        limit = self._limit_bytes
        refusal: RequestTooLarge | None = None
        if not is_too_large(input, target, specs, limit, weight=options["weight"], mask=options["mask"]):
            try:
                request = prepare(input, target, specs, is_single=is_single, max_message_bytes=limit, **options)
                return filled(self._compute_request(request, timeout), outs)
            except RequestTooLarge as error:
                if not may_be_cut(error):
                    raise
                refusal = error
                if error.__cause__ is not None:  # the server's own limit, or that of what lies between
                    limit = self._limit_bytes = min(limit, self.info(timeout=timeout).limits.max_message_bytes or limit)
        call = LargeCall(
            input, target, specs, is_single=is_single, max_message_bytes=limit, gradient_out=outs, **options
        )
        if refusal is not None and call.is_whole:
            raise refusal
        return compute_in_threads(call, self._open_stream, self._settings, limit, timeout)

    def _compute_request(self, request: Request, timeout: float | None) -> Answer:
        connection = self._connected()
        coalescer = connection.coalescer
        if coalescer is not None and coalescer.takes(request):
            try:
                return coalescer.compute(request, deadline_seconds(timeout, self._settings.timeout))
            except LossgradError as error:
                if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                connection.coalescer = None  # of what lies between, something knows no streams
        return self._send(request, timeout)

    def _send(self, request: Request, timeout: float | None) -> Answer:
        start = time.perf_counter()
        answer = self._call(self._connected().compute, request.message(), timeout)
        return request.read(answer, time.perf_counter() - start, is_own=self._given is None)

    def empty(self, shape: int | tuple[int, ...], dtype: Any = "float32") -> np.ndarray[Any, Any]:
        """Return a new array, as numpy.empty, for tensors to send: in shared memory, nothing of it is then copied.

        An ordinary array where memory is not shared. `torch.from_numpy` of it is a tensor in the same memory.
        """
        return np.empty(shape, dtype) if self._memory is None else self._memory.empty(shape, dtype)

    def _compute_one(self, input: Any, target: Any, loss: Loss, options: dict[str, Any]) -> LossResult:
        memory = self._memory
        known = known_request if memory is None else memory.known_request
        request: Any = None if options else known(input, target, loss)
        if request is None or (memory is None and request.byte_count > self._limit_bytes):
            return self.compute(input, target, loss, **options)
        with watched(self._metrics):
            answer: Any = (
                self._compute_request(request, None) if memory is None else memory.send(self._send, request, None)
            )
        return self.compute(input, target, loss, **options) if answer is None else answer

    @overload
    def stream(
        self,
        pairs: Iterable[Any],
        losses: Loss,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamOptions],
    ) -> Iterator[LossResult]: ...

    @overload
    def stream(
        self,
        pairs: Iterable[Any],
        losses: Sequence[Loss],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[StreamOptions],
    ) -> Iterator[tuple[LossResult, ...]]: ...

    @overload
    def stream(
        self, pairs: Iterable[Any], losses: Losses, *, on_error: OnError, **options: Unpack[StreamOptions]
    ) -> Iterator[Any]: ...

    def stream(
        self,
        pairs: Iterable[Any],
        losses: Losses,
        *,
        in_flight: int = DEFAULT_IN_FLIGHT,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Any]:
        """Compute the losses of many pairs of tensors; give the results in the order of the pairs.

        A pair is (input, target) or (input, target, {"weight": ..., "mask": ...}). Small ones travel many to a message.
        At most `in_flight` pairs, and about `in_flight_bytes` of them, are held at a time; `pairs` is read no further
        ahead, in the caller's thread, and its arrays may be reused once the next pair is asked for. `timeout` is each
        pair's, from being sent. A pair that fails raises at its turn, or with on_error="return" its error stands in the
        place of its result and the rest go on. Where the stream itself breaks, it is opened again as often as the client
        retries, and then raises.
        """
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
        return run_stream(iter(pairs), feed, self._open_stream, lambda: self._is_closed)

    def compute_many(
        self,
        pairs: Iterable[Any],
        losses: Losses,
        *,
        on_error: OnError = "raise",
        **options: Unpack[StreamOptions],
    ) -> list[Any]:
        """Return the results of `stream` as a list; the options are its own."""
        return list(self.stream(pairs, losses, on_error=on_error, **options))

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server what it is, what it computes on, and its limits."""
        return read_info(self._call(self._connected().info, b"", timeout))

    def ping(self, *, timeout: float | None = None) -> float:
        """Ask the server whether it serves; return the seconds of a round trip. Raises Unavailable if it does not."""
        connection = self._connected()
        try:
            answer = self._call(connection.health, HEALTH_REQUEST, timeout)
        except LossgradError as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                raise
        else:
            require_serving(answer, self._settings.target)
        start = time.perf_counter()  # the first call has connected
        self._call(connection.info, b"", timeout)
        return time.perf_counter() - start

    def close(self) -> None:
        """End the connection, and with it every call under way. Idempotent."""
        with self._lock:
            self._is_closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            if connection.coalescer is not None:
                connection.coalescer.close()
            connection.channel.close()
        if self._memory is not None:
            self._memory.close()

    def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None:
            return connection
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this client is closed; make a new one")
            if self._connection is None:
                if self._given is not None and self._pid != os.getpid():
                    raise RuntimeError(
                        "this client's channel belongs to the parent process; make a client after the fork"
                    )
                channel = connect(self._settings) if self._given is None else self._given
                connection = Connection(channel, self._settings.metrics)
                if self._given is None and self._settings.coalesce:
                    connection.coalescer = ThreadCoalescer(self._settings, connection.stream)
                self._connection = connection
            return self._connection

    def _call(self, method: Any, message: bytes, timeout: float | None) -> bytes:
        seconds = deadline_seconds(timeout, self._settings.timeout)
        try:
            answer: bytes = method(message, timeout=seconds, metadata=tracing.traced(self._metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._settings.target) from error
        return answer

    def _ask_for_memory(self) -> bytes:
        return self._call(self._connected().info, b"", ASK_SECONDS)

    def _at(self, target: str) -> LossClient:
        client = LossClient.__new__(LossClient)
        client._set_up(dataclasses.replace(self._settings, target=target), None)
        return client

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's connections. Called by forking.py."""
        inherited.append(self._connection)
        self._connection = None
        self._lock = threading.Lock()  # another thread of the parent may have held it
        if self._memory is not None:
            inherited.append(self._memory)
            self._memory = new_shared_memory(self._ask_for_memory)

    def _open_stream(self, messages: Iterator[bytes], *, bulk: bool = False) -> Any:
        metadata = self._settings.metadata_for(bulk=True) if bulk else self._metadata
        return self._connected().stream(messages, timeout=None, metadata=tracing.traced(metadata))
