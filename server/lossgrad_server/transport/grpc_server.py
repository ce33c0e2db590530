"""Puts methods on grpc.aio: adapts handlers, turns their errors into statuses, counts RPCs. Knows nothing of losses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import grpc
import grpc.aio
from grpc_status import rpc_status

from lossgrad_server.errors import InternalError, Reason, RequestError, TooLarge
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.call import Method
from lossgrad_server.transport.status import pushback, to_status

logger = logging.getLogger(__name__)

# Above our own limit, so that a message a little too large still gets our error, with details. gRPC refuses beyond.
_LIMIT_SLACK_BYTES: Final = 1 << 20

Context = grpc.aio.ServicerContext[bytes, bytes]


def create_server(
    methods: Sequence[Method], metrics: Metrics, *, max_message_bytes: int, max_connection_age_seconds: float = 0.0
) -> grpc.aio.Server:
    """Return a server, not yet started, that serves `methods`."""
    server = grpc.aio.server(options=server_options(max_message_bytes, max_connection_age_seconds))
    by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method in methods:
        _, service, name = method.name.split("/")
        by_service.setdefault(service, {})[name] = _handler(method, metrics, max_message_bytes)
    for service, handlers in by_service.items():
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    return server


def server_options(max_message_bytes: int, max_connection_age_seconds: float) -> list[tuple[str, int]]:
    """Return the channel arguments of the server, each with its reason. Figures: docs/architecture.md."""
    limit = max_message_bytes + _LIMIT_SLACK_BYTES
    options = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        # Fewer, larger frames: a quarter less server CPU at 1 MiB, nothing lost elsewhere.
        ("grpc.http2.max_frame_size", 16_777_215),
        # The SDK pings every 20 s; by default gRPC closes a connection that pings more than once in 5 minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A second server on the same port must fail at once, and not take half of the connections.
        ("grpc.so_reuseport", 0),
    ]
    if max_connection_age_seconds:
        # gRPC resolves names anew only when a connection ends, so this is how clients come to see new replicas.
        options.append(("grpc.max_connection_age_ms", round(max_connection_age_seconds * 1e3)))
        options.append(("grpc.max_connection_age_grace_ms", 30_000))
    return options


class GrpcCall:
    """`Call` over grpcio's context."""

    def __init__(self, method: str, context: Context) -> None:
        self.method = method
        self._context = context

    @cached_property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The caller's metadata."""
        return dict(self._context.invocation_metadata() or ())

    @cached_property
    def deadline(self) -> float | None:
        """When the caller stops waiting, on time.monotonic's clock."""
        remaining = self._context.time_remaining()
        return None if remaining is None else time.monotonic() + remaining

    @property
    def peer(self) -> str:
        """Where the call comes from."""
        peer: str = self._context.peer()
        return peer


def _handler(method: Method, metrics: Metrics, max_message_bytes: int) -> grpc.RpcMethodHandler[Any, Any]:
    # No (de)serializer: handlers take and give bytes, and what cannot be read is answered by ours, not by grpcio, which
    # says INTERNAL or UNKNOWN and shows its insides.
    if method.unary is not None:
        return grpc.unary_unary_rpc_method_handler(_unary(method, metrics, max_message_bytes))
    return grpc.stream_stream_rpc_method_handler(_stream(method, metrics, max_message_bytes))


def _unary(method: Method, metrics: Metrics, max_message_bytes: int) -> Any:
    handler = method.unary
    assert handler is not None  # noqa: S101 - for the type checker
    watch = RpcWatch(metrics, method, "unary")

    async def serve(request: bytes, context: Context) -> bytes:
        started = watch.started()
        watch.received.inc()
        code = "OK"
        try:
            check_size(request, max_message_bytes)
            reply = await handler(request, GrpcCall(method.name, context))
            watch.sent.inc()
            return reply
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as exception:
            error = as_request_error(exception, method.name)
            code = error.code.name
            await _abort(context, error)
            raise  # never reached: abort raises
        finally:
            watch.handled(code, started)

    return serve


def _stream(method: Method, metrics: Metrics, max_message_bytes: int) -> Any:
    handler = method.stream
    assert handler is not None  # noqa: S101 - for the type checker
    watch = RpcWatch(metrics, method, "bidi_stream")

    async def serve(messages: AsyncIterator[bytes], context: Context) -> None:
        async def received() -> AsyncIterator[bytes]:
            async for message in messages:
                watch.received.inc()
                check_size(message, max_message_bytes)
                yield message

        async def send(message: bytes) -> None:
            await context.write(message)
            watch.sent.inc()

        started = watch.started()
        code = "OK"
        try:
            await handler(received(), send, GrpcCall(method.name, context))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as exception:
            error = as_request_error(exception, method.name)
            code = error.code.name
            await _abort(context, error)
        finally:
            watch.handled(code, started)

    return serve


class RpcWatch:
    """Counts the RPCs of one method, in the series that go-grpc-prometheus has made known."""

    def __init__(self, metrics: Metrics, method: Method, grpc_type: str) -> None:
        self._metrics = metrics
        _, service, name = method.name.split("/")
        self._labels = (grpc_type, service, name)
        self._is_bound = False
        if not method.is_occasional:
            self._bind()

    def _bind(self) -> None:
        metrics, labels = self._metrics, self._labels
        self._started = metrics.grpc_started.labels(*labels)
        self._seconds = metrics.grpc_handling_seconds.labels(*labels)
        self._handled = {code.name: metrics.grpc_handled.labels(*labels, code.name) for code in grpc.StatusCode}
        self.received = metrics.grpc_received.labels(*labels)
        self.sent = metrics.grpc_sent.labels(*labels)
        self._is_bound = True

    def started(self) -> float:
        """Count an RPC in; return when it started, for `handled`."""
        if not self._is_bound:
            self._bind()
        self._started.inc()
        return time.perf_counter()

    def handled(self, code: str, started: float) -> None:
        """Count an RPC out."""
        self._handled[code].inc()
        self._seconds.observe(time.perf_counter() - started)


def check_size(message: bytes, max_message_bytes: int) -> None:
    """Refuse a message over the limit."""
    if len(message) > max_message_bytes:
        raise TooLarge(
            f"the message has {len(message)} bytes, at most {max_message_bytes} are taken; send fewer rows at a time",
            reason=Reason.MESSAGE_TOO_LARGE,
        )


def as_request_error(exception: Exception, method: str) -> RequestError:
    """Return what the caller is told of a handler's exception. Whatever we did not raise is a bug of ours."""
    if isinstance(exception, RequestError):
        return exception
    logger.error("%s failed", method, exc_info=exception)
    return InternalError()


async def _abort(context: Context, error: RequestError) -> None:
    status = rpc_status.to_status(to_status(error, error.request_id))  # type: ignore[no-untyped-call]
    # Not abort_with_status, whose trailers would replace all that were set before.
    await context.abort(status.code, status.details, (*status.trailing_metadata, *pushback(error)))
