"""The loads of bench.transport: bursts of calls by raw gRPC clients and by the SDK, one at a time or many outstanding.

Everything is called from the main thread. A raw client sends bytes made beforehand and looks at no answer, so it shows the
server alone; the SDK starts from arrays and ends with arrays, so it shows what a user pays. Asynchronous loads share one
event loop, which runs only during their bursts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio

from bench import transport_messages as messages
from bench.transport_servers import ServerProcess
from lossgrad import AsyncLossClient, LossClient
from lossgrad_api import codec

_LIMIT_BYTES: Final = 257 * 1024 * 1024
# What of the SDK's options matters for speed; without balancing, health checks and retries.
CHANNEL_OPTIONS: Final = [
    ("grpc.max_send_message_length", _LIMIT_BYTES),
    ("grpc.max_receive_message_length", _LIMIT_BYTES),
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.use_local_subchannel_pool", 1),
]
_DEADLINE_SECONDS: Final = 120.0


@dataclass(slots=True)
class Burst:
    """What a burst came to. `latencies` are in seconds, empty where calls have none of their own."""

    calls: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    server_cpu_seconds: float = 0.0
    server_faults: int = 0
    client_cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.seconds


def measured(server: ServerProcess, burst: Callable[[], Burst]) -> Callable[[], Burst]:
    """Return the burst with the processor time that it takes on both sides added, and the server's page faults."""

    def run() -> Burst:
        faults, server_start, client_start = server.page_faults(), server.cpu_seconds(), time.process_time()
        result = burst()
        result.client_cpu_seconds = time.process_time() - client_start
        result.server_cpu_seconds = server.cpu_seconds() - server_start
        result.server_faults = server.page_faults() - faults
        return result

    return run


class Loads:
    """Makes bursts for one server. `seconds` is how long each lasts; at least one call is made per outstanding one.

    Every public method but `compute_seconds` returns a burst to run.
    """

    def __init__(self, server: ServerProcess, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._server = server
        self._loop = loop
        self.seconds = seconds
        self._open = ExitStack()
        self._channel = grpc.insecure_channel(server.target, options=CHANNEL_OPTIONS)
        self._open.callback(self._channel.close)
        self._client = self._open.enter_context(LossClient(server.target, timeout=_DEADLINE_SECONDS))
        self._unary_client = self._open.enter_context(
            LossClient(server.target, timeout=_DEADLINE_SECONDS, coalesce=False)
        )
        self._aio_channel, self._aio_client = loop.run_until_complete(self._connect())

    async def _connect(self) -> tuple[grpc.aio.Channel, AsyncLossClient]:
        return (
            grpc.aio.insecure_channel(self._server.target, options=CHANNEL_OPTIONS),
            AsyncLossClient(self._server.target, timeout=_DEADLINE_SECONDS),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._aio_client.close())
        self._loop.run_until_complete(self._aio_channel.close())
        self._open.close()

    def raw_unary(self, tensor_bytes: int, outstanding: int) -> Callable[[], Burst]:
        """Blocking stub, no serializers, the same bytes again and again."""
        call: Any = self._channel.unary_unary(codec.COMPUTE_LOSS)
        request = messages.request(tensor_bytes)
        return self._threads(lambda: call(request, timeout=_DEADLINE_SECONDS), outstanding)

    def raw_info(self) -> Callable[[], Burst]:
        """GetServerInfo, which is answered without the device."""
        call: Any = self._channel.unary_unary(codec.GET_SERVER_INFO)
        return self._threads(lambda: call(b"", timeout=_DEADLINE_SECONDS), 1)

    def sdk_unary(self, tensor_bytes: int, outstanding: int, *, coalesce: bool = True) -> Callable[[], Burst]:
        """LossClient.smooth_l1 with NumPy arrays. Without `coalesce` each is a unary call, small ones too.

        So it must be for an echo, which cannot tell whose answer it sends on a stream.
        """
        input, target = messages.tensors(tensor_bytes)
        client = self._client if coalesce else self._unary_client
        return self._threads(lambda: client.smooth_l1(input, target, gradient=True), outstanding)

    def raw_aio(self, tensor_bytes: int, outstanding: int) -> Callable[[], Burst]:
        """grpc.aio, no serializers."""
        call: Any = self._aio_channel.unary_unary(codec.COMPUTE_LOSS)
        request = messages.request(tensor_bytes)
        return self._tasks(lambda: call(request, timeout=_DEADLINE_SECONDS), outstanding)

    def sdk_aio(self, tensor_bytes: int, outstanding: int) -> Callable[[], Burst]:
        """AsyncLossClient.smooth_l1, each task awaiting its call before it makes the next."""
        input, target = messages.tensors(tensor_bytes)
        client = self._aio_client
        return self._tasks(lambda: client.smooth_l1(input, target, gradient=True), outstanding)

    def sdk_gather(self, tensor_bytes: int, count: int) -> Callable[[], Burst]:
        """AsyncLossClient.smooth_l1 in asyncio.gather, as a user writes it: `count` calls at once, then the next ones."""
        input, target = messages.tensors(tensor_bytes)
        client = self._aio_client

        async def gather() -> Burst:
            burst = Burst()
            start = time.perf_counter()
            while burst.seconds < self.seconds:
                await asyncio.gather(*(client.smooth_l1(input, target, gradient=True) for _ in range(count)))
                burst.calls += count
                burst.seconds = time.perf_counter() - start
            return burst

        return self._measured(lambda: self._loop.run_until_complete(gather()))

    def raw_stream(self, tensor_bytes: int, outstanding: int, per_message: int) -> Callable[[], Burst]:
        """A bidirectional stream of a blocking stub, `per_message` requests to a message."""
        call: Any = self._channel.stream_stream(codec.STREAM_COMPUTE_LOSS)
        message = messages.stream_request(tensor_bytes, per_message)

        def burst() -> Burst:
            outgoing: SimpleQueue[bytes | None] = SimpleQueue()
            answers = call(iter(outgoing.get, None), timeout=_DEADLINE_SECONDS)
            result = Burst()
            unanswered = 0
            start = time.perf_counter()
            is_sending = True
            while is_sending or unanswered:
                while is_sending and unanswered + per_message <= outstanding:
                    outgoing.put(message)
                    unanswered += per_message
                answered = messages.count_answers(next(answers))
                unanswered -= answered
                result.calls += answered
                is_sending = time.perf_counter() - start < self.seconds
            result.seconds = time.perf_counter() - start
            outgoing.put(None)
            for _ in answers:
                raise RuntimeError("the server answers what was not asked")
            return result

        return self._measured(burst)

    def sdk_stream(self, tensor_bytes: int, outstanding: int) -> Callable[[], Burst]:
        """LossClient.stream over pairs of NumPy arrays."""
        pair = messages.tensors(tensor_bytes)

        def burst() -> Burst:
            result = Burst()
            start = time.perf_counter()

            def pairs() -> Iterator[tuple[messages.Array, messages.Array]]:
                while time.perf_counter() - start < self.seconds:
                    yield pair

            for _ in self._client.stream(pairs(), messages.LOSS, in_flight=outstanding):
                result.calls += 1
            result.seconds = time.perf_counter() - start
            return result

        return self._measured(burst)

    def sdk_compute_many(self, tensor_bytes: int, count: int) -> Callable[[], Burst]:
        """LossClient.compute_many of `count` pairs, with its own window."""
        pairs = [messages.tensors(tensor_bytes)] * count

        def burst() -> Burst:
            result = Burst()
            start = time.perf_counter()
            while result.seconds < self.seconds:
                result.calls += len(self._client.compute_many(pairs, messages.LOSS))
                result.seconds = time.perf_counter() - start
            return result

        return self._measured(burst)

    def sdk_aio_stream(self, tensor_bytes: int, outstanding: int) -> Callable[[], Burst]:
        """AsyncLossClient.stream over pairs of NumPy arrays."""
        pair = messages.tensors(tensor_bytes)

        async def burst() -> Burst:
            result = Burst()
            start = time.perf_counter()

            def pairs() -> Iterator[tuple[messages.Array, messages.Array]]:
                while time.perf_counter() - start < self.seconds:
                    yield pair

            async for _ in self._aio_client.stream(pairs(), messages.LOSS, in_flight=outstanding):
                result.calls += 1
            result.seconds = time.perf_counter() - start
            return result

        return self._measured(lambda: self._loop.run_until_complete(burst()))

    def compute_seconds(self, tensor_bytes: int) -> float:
        """Return how long the server says that it computes such a request."""
        input, target = messages.tensors(tensor_bytes)
        return min(self._client.smooth_l1(input, target, gradient=True).timing.compute_seconds for _ in range(5))

    # --- how bursts run ---

    def _measured(self, burst: Callable[[], Burst]) -> Callable[[], Burst]:
        return measured(self._server, burst)

    def _threads(self, call: Callable[[], object], outstanding: int) -> Callable[[], Burst]:
        """Return a burst of blocking calls, from this thread or from as many as may be outstanding."""
        if outstanding == 1:
            return self._measured(lambda: _loop_over(call, time.perf_counter(), self.seconds))

        def burst() -> Burst:
            bursts: list[Burst] = []
            errors: list[Exception] = []
            start = time.perf_counter()

            def work() -> None:
                try:
                    bursts.append(_loop_over(call, start, self.seconds))
                except Exception as error:
                    errors.append(error)

            threads = [threading.Thread(target=work) for _ in range(outstanding)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
            return _together(bursts)

        return self._measured(burst)

    def _tasks(self, call: Callable[[], Awaitable[object]], outstanding: int) -> Callable[[], Burst]:
        async def work(start: float) -> Burst:
            result = Burst()
            now = time.perf_counter()
            while True:
                await call()
                began, now = now, time.perf_counter()
                result.latencies.append(now - began)
                if now - start >= self.seconds:
                    break
            result.calls = len(result.latencies)
            result.seconds = now - start
            return result

        async def burst() -> Burst:
            start = time.perf_counter()
            return _together(await asyncio.gather(*(work(start) for _ in range(outstanding))))

        return self._measured(lambda: self._loop.run_until_complete(burst()))


def _loop_over(call: Callable[[], object], start: float, seconds: float) -> Burst:
    """Call one after the other until `seconds` after `start`."""
    result = Burst()
    now = time.perf_counter()
    while True:
        call()
        began, now = now, time.perf_counter()
        result.latencies.append(now - began)
        if now - start >= seconds:
            break
    result.calls = len(result.latencies)
    result.seconds = now - start
    return result


def _together(bursts: list[Burst]) -> Burst:
    """Return bursts that ran at the same time, from the same start, as one."""
    return Burst(
        calls=sum(burst.calls for burst in bursts),
        seconds=max(burst.seconds for burst in bursts),
        latencies=[latency for burst in bursts for latency in burst.latencies],
    )
