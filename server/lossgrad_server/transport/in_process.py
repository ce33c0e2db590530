"""The second transport under the handlers: plain function calls, for a client in the server's own process.

`InProcessChannel` looks to the SDK like a grpc.Channel of which it uses two methods. Handlers run in the server's event
loop; callers block in their own threads. Errors are grpc.RpcErrors with the same code, text and details as on the wire.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.rpc import status_pb2

from lossgrad_server.errors import Code, InternalError, Reason, RequestError
from lossgrad_server.transport.call import Method, UnaryHandler
from lossgrad_server.transport.status import new_request_id, pushback, to_status

logger = logging.getLogger(__name__)

_STATUS_KEY = "grpc-status-details-bin"
_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

Metadata = tuple[tuple[str, str | bytes], ...]


class InProcessError(grpc.RpcError):
    """A call's error, with the methods that an error of a grpc.Channel has."""

    def __init__(self, status: status_pb2.Status, trailing_metadata: Metadata = ()) -> None:
        super().__init__(status.message)
        self._status = status
        self._trailing_metadata = (*trailing_metadata, (_STATUS_KEY, status.SerializeToString()))

    def code(self) -> grpc.StatusCode:
        """The status code."""
        return _CODES[self._status.code]

    def details(self) -> str:
        """The status message."""
        return self._status.message

    def trailing_metadata(self) -> Metadata:  # type: ignore[override]
        """The trailers, the status with its details among them."""
        return self._trailing_metadata


class InProcessCall:
    """`Call` of a caller in this process."""

    def __init__(self, method: str, timeout: float | None, metadata: Metadata | None) -> None:
        self.method = method
        self.metadata: Mapping[str, str | bytes] = dict(metadata or ())
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.peer = "inproc"
        self.begun_ns = time.perf_counter_ns()


class InProcessChannel:
    """Calls the handlers of a server in this process. Thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop, methods: Iterable[Method]) -> None:
        self._loop = loop
        self._methods = {method.name: method for method in methods}

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
    ) -> Callable[..., Any]:
        """Return a callable (request, timeout=None, metadata=None) for a unary method."""

        def call(request: Any, timeout: float | None = None, metadata: Metadata | None = None, **_: Any) -> Any:
            method = self._methods.get(path)
            if method is None or method.unary is None:
                raise _unknown(path)
            data = request_serializer(request) if request_serializer else request
            handler = _answer(method.unary, data, InProcessCall(path, timeout, metadata))
            reply = self._wait(handler, path, timeout)
            return response_deserializer(reply) if response_deserializer else reply

        return call

    def stream_stream(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
    ) -> Callable[..., Any]:
        """Return a callable (request iterator, timeout=None, metadata=None) that gives an iterator of responses."""

        def call(
            requests: Iterable[Any], timeout: float | None = None, metadata: Metadata | None = None, **_: Any
        ) -> InProcessStream:
            method = self._methods.get(path)
            if method is None or method.stream is None:
                raise _unknown(path)
            messages = (request_serializer(request) if request_serializer else request for request in requests)
            return InProcessStream(
                self._loop, method, messages, InProcessCall(path, timeout, metadata), response_deserializer
            )

        return call

    def close(self) -> None:
        """Do nothing: the server outlives its channels."""

    def _wait(self, handler: Coroutine[Any, Any, bytes], path: str, timeout: float | None) -> bytes:
        try:
            future = asyncio.run_coroutine_threadsafe(handler, self._loop)
        except RuntimeError:
            handler.close()
            raise InProcessError(to_status(_stopped())) from None
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise InProcessError(to_status(_too_late(path, timeout))) from None
        except concurrent.futures.CancelledError:
            raise InProcessError(to_status(_stopped())) from None


class InProcessStream:
    """The responses of one stream, as an iterator; `cancel` ends it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        method: Method,
        messages: Iterable[bytes],
        call: InProcessCall,
        deserialize: Callable[[bytes], Any] | None,
    ) -> None:
        self._loop = loop
        self._call = call
        self._deserialize = deserialize
        self._received: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=4)
        self._responses: queue.SimpleQueue[bytes | InProcessError | None] = queue.SimpleQueue()
        self._unread = asyncio.Semaphore(4)  # responses that may wait unread; beyond, the handler waits
        self._puts: set[asyncio.Task[None]] = set()
        self._task = asyncio.run_coroutine_threadsafe(self._serve(method), loop)
        # grpc.Channel too consumes the requests in a thread of its own.
        self._feeder = threading.Thread(target=self._feed, args=(messages,), daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[Any]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Any:
        """Wait for the next response."""
        deadline = self._call.deadline
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            response = self._responses.get(timeout=left)
        except queue.Empty:
            self.cancel()
            raise InProcessError(to_status(_too_late(self._call.method, None))) from None
        if response is None:
            raise StopIteration
        if isinstance(response, InProcessError):
            raise response
        with contextlib.suppress(RuntimeError):  # the loop has closed: there is no handler that waits
            self._loop.call_soon_threadsafe(self._unread.release)
        return self._deserialize(response) if self._deserialize else response

    def cancel(self) -> bool:
        """End the stream; its requests that wait are dropped."""
        return self._task.cancel()

    async def _serve(self, method: Method) -> None:
        assert method.stream is not None  # noqa: S101 - for the type checker

        async def received() -> AsyncIterator[bytes]:
            while (message := await self._received.get()) is not None:
                yield message

        async def send(message: bytes) -> None:
            await self._unread.acquire()
            self._responses.put(message)

        try:
            await method.stream(received(), send, self._call)
        except asyncio.CancelledError:
            self._responses.put(InProcessError(to_status(_cancelled())))
            raise
        except Exception as exception:
            self._responses.put(_as_rpc_error(exception))
        else:
            self._responses.put(None)
        finally:
            for put in self._puts:  # of messages that nobody will take
                put.cancel()

    def _feed(self, messages: Iterable[bytes]) -> None:
        try:
            for message in messages:
                if not self._put(message):
                    return
        except Exception:
            logger.exception("The iterator of requests failed")
            self.cancel()
        else:
            self._put(None)

    def _put(self, message: bytes | None) -> bool:
        """Hand a message to the loop; False once the stream has ended."""
        taken: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            # Not run_coroutine_threadsafe: a loop that ends first would leave a coroutine that never ran, and a warning.
            self._loop.call_soon_threadsafe(self._begin_put, message, taken)
        except RuntimeError:
            return False
        done, _ = concurrent.futures.wait((taken, self._task), return_when=concurrent.futures.FIRST_COMPLETED)
        return taken in done

    def _begin_put(self, message: bytes | None, taken: concurrent.futures.Future[None]) -> None:
        async def put() -> None:
            await self._received.put(message)
            taken.set_result(None)

        task = self._loop.create_task(put())
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)
        if self._task.done():
            task.cancel()


async def _answer(handler: UnaryHandler, request: bytes, call: InProcessCall) -> bytes:
    try:
        return await handler(request, call)
    except Exception as exception:
        raise _as_rpc_error(exception) from exception


def _as_rpc_error(exception: Exception) -> InProcessError:
    if isinstance(exception, RequestError):
        return InProcessError(to_status(exception, exception.request_id), pushback(exception))
    error = InternalError()
    error.request_id = new_request_id()
    logger.error("Request %s failed", error.request_id, exc_info=exception, extra={"request_id": error.request_id})
    return InProcessError(to_status(error, error.request_id))


def _unknown(path: str) -> InProcessError:
    message = f"this server has no method {path}"
    return InProcessError(to_status(RequestError(message, code=Code.UNIMPLEMENTED, reason=Reason.UNIMPLEMENTED)))


def _too_late(path: str, timeout: float | None) -> RequestError:
    within = "its time" if timeout is None else f"{timeout} s"
    return RequestError(
        f"{path} was not answered within {within}; allow more time",
        code=Code.DEADLINE_EXCEEDED,
        reason=Reason.DEADLINE_PASSED,
    )


def _stopped() -> RequestError:
    return RequestError(
        "the embedded server has stopped; make a new one", code=Code.UNAVAILABLE, reason=Reason.DRAINING
    )


def _cancelled() -> RequestError:
    return RequestError("the stream was cancelled", code=Code.CANCELLED, reason=Reason.CANCELLED)
