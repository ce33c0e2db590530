"""Puts methods on grpc.aio: adapts handlers, turns their errors into statuses, counts RPCs. Knows nothing of losses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from grpc_status import rpc_status

from lossgrad_server.errors import InternalError, Reason, RequestError, TooLarge
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.call import Method, is_late
from lossgrad_server.transport.status import new_request_id, pushback, to_status
from lossgrad_server.transport.tokens import TokenGuard, Tokens
from lossgrad_server.transport.transfers import COUNTED_BYTES, Receiving, Unsent

logger = logging.getLogger(__name__)

# Above our own limit, so that a message a little too large still gets our error, with details. gRPC refuses beyond.
_LIMIT_SLACK_BYTES: Final = 1 << 20

# Tokens and trace contexts take hundreds. gRPC's own limits do not hold for metadata that come compressed.
_MAX_METADATA_BYTES: Final = 16 * 1024

_MAX_PENDING_CALLS: Final = 8192
_MAX_STREAMS: Final = 4096

# The label `api` of calls to methods that compute nothing, or that there are none of: refused for want of a token.
OTHER: Final = "other"

Context = grpc.aio.ServicerContext[bytes, bytes]


def create_server(
    methods: Sequence[Method],
    metrics: Metrics,
    *,
    max_message_bytes: int,
    max_connection_age_seconds: float = 0.0,
    max_connections: int = 4096,
    transfer_timeout_seconds: float = 60.0,
    tokens: Tokens | None = None,
    unsent: Unsent | None = None,
    under_way: UnderWay | None = None,
    shares_port: bool = False,
) -> grpc.aio.Server:
    """Return a server, not yet started, that serves `methods`. With `tokens`, calls need one of them.

    `unsent` counts the answers that callers do not read, `under_way` the calls. With `shares_port` other servers may
    listen on its port.
    """
    options = server_options(max_message_bytes, max_connection_age_seconds, max_connections, shares_port=shares_port)
    apis = {method.name: method.api or OTHER for method in methods}
    guards = (
        [TokenGuard(tokens, lambda error, name: metrics.failed(None, apis.get(name, OTHER), error))] if tokens else []
    )
    server = grpc.aio.server(options=options, interceptors=guards)
    limits = _Limits(
        max_message_bytes,
        transfer_timeout_seconds,
        Receiving(transfer_timeout_seconds),
        unsent or Unsent(max_message_bytes),
        under_way or UnderWay(),
    )
    server.add_generic_rpc_handlers([_Handlers({method.name: _handler(method, metrics, limits) for method in methods})])
    return server


class UnderWay:
    """How many calls of `methods` are under way, until their answers are sent. Health's watches are none of them."""

    def __init__(self) -> None:
        self.calls = 0

    def begin(self, context: Context) -> None:
        """Count a call in, and out when it has ended."""
        self.calls += 1
        context.add_done_callback(self._end)  # type: ignore[arg-type]

    def _end(self, _: Any) -> None:
        self.calls -= 1


@dataclass(frozen=True, slots=True)
class _Limits:
    """What bounds a message: its size, and the time that it may take on its way."""

    max_message_bytes: int
    transfer_timeout_seconds: float
    receiving: Receiving
    unsent: Unsent
    under_way: UnderWay


class _Handlers(grpc.GenericRpcHandler):
    """Finds methods by their exact name. Of a call with too much metadata, not a byte of the body is read."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._handlers = handlers
        self._refusing: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse_metadata)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return a method's handler; None where there is no such method."""
        metadata: Any = handler_call_details.invocation_metadata or ()
        if sum([len(key) + len(value) for key, value in metadata]) > _MAX_METADATA_BYTES:
            return self._refusing
        return self._handlers.get(handler_call_details.method)


async def _refuse_metadata(_messages: Any, context: Context) -> None:
    await _abort(
        context,
        TooLarge(
            f"the call's metadata have over {_MAX_METADATA_BYTES} bytes; send less of it",
            reason=Reason.HEADER_TOO_LARGE,
        ),
    )


def server_options(
    max_message_bytes: int, max_connection_age_seconds: float, max_connections: int, *, shares_port: bool = False
) -> list[tuple[str, int]]:
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
        # A connection costs a descriptor and memory whether or not it is used; those beyond are closed at once.
        ("grpc.max_allowed_incoming_connections", max_connections),
        # Finds peers that are gone without a word, and those that read nothing at all.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Of one connection; what a client has beyond waits on its side, without an error. A call without a body costs 20 kB
        # until its read deadline, and twice as many as the queue takes would only be refused.
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        # Calls that wait for the event loop. Beyond a thousand gRPC throws dice and resets some of them, which their callers
        # see as CANCELLED: a burst would lose calls that admission would have taken, or refused with a push-back. So many
        # are four seconds of a busy event loop, and cost 200 MB at most.
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
        # A second server on the same port must fail at once, and not take half of the connections, unless it is to.
        ("grpc.so_reuseport", int(shares_port)),
    ]
    if max_connection_age_seconds:
        # gRPC resolves names anew only when a connection ends, so this is how clients come to see new replicas.
        options.append(("grpc.max_connection_age_ms", round(max_connection_age_seconds * 1e3)))
        options.append(("grpc.max_connection_age_grace_ms", 30_000))
    return options


class StalledPeer(Exception):
    """The caller does not read what it is sent, or is gone."""


class GrpcCall:
    """`Call` over grpcio's context."""

    __slots__ = ("_context", "_metadata", "_started", "deadline", "method")

    def __init__(self, method: str, context: Context, started: float) -> None:
        """`started` is when the call came, on perf_counter's clock."""
        self.method = method
        self._context = context
        self._started = started
        self._metadata: Mapping[str, str | bytes] | None = None
        remaining = context.time_remaining()
        # When the caller stops waiting, on time.monotonic's clock.
        self.deadline = None if remaining is None else time.monotonic() + remaining

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The caller's metadata."""
        if self._metadata is None:
            self._metadata = dict(self._context.invocation_metadata() or ())
        return self._metadata

    @property
    def begun_ns(self) -> int:
        """When the call came, on perf_counter_ns's clock."""
        return int(self._started * 1e9)

    @property
    def peer(self) -> str:
        """Where the call comes from."""
        peer: str = self._context.peer()
        return peer


def _handler(method: Method, metrics: Metrics, limits: _Limits) -> grpc.RpcMethodHandler[Any, Any]:
    # No (de)serializer: handlers take and give bytes, and what cannot be read is answered by ours, not by grpcio, which
    # says INTERNAL or UNKNOWN and shows its insides.
    if method.unary is not None:
        return grpc.stream_unary_rpc_method_handler(_unary(method, metrics, limits))
    return grpc.stream_stream_rpc_method_handler(_stream(method, metrics, limits))


def _unary(method: Method, metrics: Metrics, limits: _Limits) -> Any:
    handler = method.unary
    assert handler is not None  # noqa: S101 - for the type checker
    watch = RpcWatch(metrics, method, "unary")
    max_message_bytes, receiving, unsent = limits.max_message_bytes, limits.receiving, limits.unsent

    # A handler of a stream, of which one message is read: of a unary handler's call gRPC reads the whole message before it
    # calls it, however long that takes. On the wire and in costs the two are the same.
    async def serve(_messages: Any, context: Context) -> bytes:
        limits.under_way.begin(context)
        started = watch.started()
        code = "OK"
        call = GrpcCall(method.name, context, started)
        try:
            try:
                unsent.check(context.peer)
                request = await receiving.message(context)
                watch.received.inc()
                check_size(request, max_message_bytes)
            except RequestError as refusal:  # what the handler refuses, it counts itself
                if method.api is not None:
                    metrics.failed(None, method.api, refusal)
                raise
            reply = await handler(request, call)
            watch.sent.inc()
            if len(reply) >= COUNTED_BYTES:
                let_go = unsent.hold(context.peer(), len(reply))
                context.add_done_callback(lambda _: let_go())  # type: ignore[arg-type]
            return reply
        except asyncio.CancelledError:
            code = "DEADLINE_EXCEEDED" if is_late(call.deadline) else "CANCELLED"
            raise
        except Exception as exception:
            error = as_request_error(exception, method.name)
            code = error.code.name
            await _abort(context, error)
            raise  # never reached: abort raises
        finally:
            watch.handled(code, started)

    return serve


def _stream(method: Method, metrics: Metrics, limits: _Limits) -> Any:
    handler = method.stream
    assert handler is not None  # noqa: S101 - for the type checker
    watch = RpcWatch(metrics, method, "bidi_stream")
    max_message_bytes, timeout_seconds = limits.max_message_bytes, limits.transfer_timeout_seconds

    async def serve(messages: AsyncIterator[bytes], context: Context) -> None:
        async def received() -> AsyncIterator[bytes]:
            async for message in messages:
                watch.received.inc()
                try:
                    check_size(message, max_message_bytes)
                except TooLarge as refusal:
                    if method.api is not None:
                        metrics.failed(None, method.api, refusal)
                    raise
                yield message

        async def send(message: bytes) -> None:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await context.write(message)
            except grpc.aio.InternalError:  # the caller has hung up, and the call's cancellation is on its way here
                raise StalledPeer from None
            except TimeoutError:
                logger.warning("Cut off a stream whose caller has read nothing for %s s", timeout_seconds)
                raise StalledPeer from None
            watch.sent.inc()

        limits.under_way.begin(context)
        started = watch.started()
        code = "OK"
        call = GrpcCall(method.name, context, started)
        try:
            await handler(received(), send, call)
            if call.deadline is not None and time.monotonic() >= call.deadline:
                code = "DEADLINE_EXCEEDED"  # its caller has been told so by now, whatever was sent last
        except asyncio.CancelledError:
            code = "DEADLINE_EXCEEDED" if is_late(call.deadline) else "CANCELLED"
            raise
        except StalledPeer:
            # A status would have to wait behind the message that nobody reads. A cancelled call is reset.
            code = "DEADLINE_EXCEEDED" if is_late(call.deadline) else "CANCELLED"
            raise asyncio.CancelledError from None
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
    error = InternalError()
    error.request_id = new_request_id()
    logger.error(
        "%s failed, request %s", method, error.request_id, exc_info=exception, extra={"request_id": error.request_id}
    )
    return error


async def _abort(context: Context, error: RequestError) -> None:
    status = rpc_status.to_status(to_status(error, error.request_id))  # type: ignore[no-untyped-call]
    # Not abort_with_status, whose trailers would replace all that were set before.
    await context.abort(status.code, status.details, (*status.trailing_metadata, *pushback(error)))
