"""The ways in which a call fails, as exceptions, and the one place where gRPC's errors become them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY: Final = "grpc-status-details-bin"
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_QUEUE_REASONS: Final = frozenset(("QUEUE_FULL", "QUEUE_BYTES_FULL", "PREDICTED_LATE"))
_SIZE_REASONS: Final = frozenset(
    (
        "MESSAGE_TOO_LARGE",
        "RESULT_TOO_LARGE",
        "HEADER_TOO_LARGE",
        "OUT_OF_DEVICE_MEMORY",
        "TOO_MANY_REQUESTS_IN_MESSAGE",
    )
)


class LossgradError(Exception):
    """A call that failed.

    `code` is the canonical status code. `reason` is the server's word for the cause (docs/protocol.md), "" where it gave
    none. `field` names what the caller must change. `request_id` is what the server's log calls the request.
    `retry_after` is after how many seconds the same call may succeed. The gRPC error, if there was one, is `__cause__`.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        field: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.field = field
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.message, self.code, self.reason, self.field, self.request_id, self.retry_after)
        return type(self), values


class InvalidRequest(LossgradError, ValueError):
    """A request that the caller must change: a shape, a data type, a parameter. `field` says which."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        reason: str = "",
        field: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code, reason, field, request_id, retry_after)


class Overloaded(LossgradError):
    """The server has too much waiting to take this request now. Try again after `retry_after` seconds."""


class Unavailable(LossgradError):
    """The server cannot be reached, or takes no requests now: it starts, drains, or is gone."""


class TLSError(Unavailable):
    """The server cannot be reached because the two sides do not agree on TLS: a name, an authority, or TLS itself."""


class DeadlineExceeded(LossgradError, TimeoutError):
    """No answer came within the timeout."""


class Unauthenticated(LossgradError):
    """The server does not know the caller, or does not let it do this."""


class RequestTooLarge(LossgradError):
    """The request, or its answer, is beyond a hard limit; trying again does not help."""


class Cancelled(LossgradError):
    """The call was cancelled before its answer came."""


class ServerError(LossgradError):
    """The server failed, or gave an answer that cannot be understood. The fault is not the caller's."""


_CLASSES: Final[dict[grpc.StatusCode, type[LossgradError]]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


# What gRPC's text holds where no server answered -> what that means. The last fits every text.
_UNREACHABLE: Final[tuple[tuple[str, type[Unavailable], str], ...]] = (
    (
        "Hostname Verification Check failed",
        TLSError,
        "the server's certificate is for another name than {target!r}; call the server by a name that its certificate has",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        TLSError,
        "the certificate of {target!r} is not of an authority that this client trusts; give the authority's PEM file: "
        "ca=..., or LOSSGRAD_CA",
    ),
    (
        "WRONG_VERSION_NUMBER",
        TLSError,
        "this client speaks TLS and {target!r} does not; leave TLS out here (tls=False), or turn it on there",
    ),
    (
        "Socket closed",
        Unavailable,
        "{target!r} closed the connection at once: does it want TLS (ca=..., or tls=True), or a client certificate "
        "(cert=... and key=...)? See: lossgrad ping --target {target}",
    ),
    (
        "backend unhealthy",  # grpc's health checking: it asks the server whether it serves
        Unavailable,
        "{target!r} is there and does not serve now: it is starting, stopping, or without its device, which its log says; "
        "try again in a moment",
    ),
    ("", Unavailable, "no answer from {target!r}: is a server running there? See: lossgrad ping --target {target}"),
)


def from_rpc_error(error: grpc.RpcError, target: str) -> LossgradError:
    """Return what a failed call (of grpc or grpc.aio) means. The caller raises it `from` the error.

    Where no server answered, the message gets a line that says what to look at; `target` is whom the call was for.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    trailers = _trailers(error)
    status = status_pb2.Status(code=code.value[0], message=message)
    details = trailers.get(_DETAILS_KEY)
    if isinstance(details, bytes):
        with suppress(DecodeError):  # a proxy's, or cut short: the code and message still stand
            status.details.MergeFrom(status_pb2.Status.FromString(details).details)
    pushback = trailers.get(_PUSHBACK_KEY)
    retry_after = int(pushback) / 1000 if pushback is not None and str(pushback).isdecimal() else None
    result = from_status(status, retry_after=retry_after)
    if type(result) is Unavailable and not result.reason:
        for sign, kind, hint in _UNREACHABLE:
            if sign in message:
                text = hint.format(target=target)
                return kind(
                    f"{message}\n{text}", result.code, request_id=result.request_id, retry_after=result.retry_after
                )
    return result


def from_status(status: status_pb2.Status, *, retry_after: float | None = None) -> LossgradError:
    """Return what a google.rpc.Status means: the error of one request of a stream, or the details of a failed call."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = error_details_pb2.ErrorInfo()
    violations = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, violations, retry):
            with suppress(DecodeError):
                detail.Unpack(message)  # does nothing where the type is another
    if retry.HasField("retry_delay"):
        retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    field = violations.field_violations[0].field if violations.field_violations else None
    return _class_of(code, info.reason, status.message)(
        status.message or f"the call failed with {code.name}",
        code,
        info.reason,
        field or None,
        info.metadata.get("request_id"),
        retry_after,
    )


def _class_of(code: grpc.StatusCode, reason: str, message: str) -> type[LossgradError]:
    if code is grpc.StatusCode.UNAVAILABLE and reason in _QUEUE_REASONS:
        return Overloaded
    # gRPC's own limit has no reason, only this text.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (
        reason in _SIZE_REASONS or "message larger than max" in message.lower()
    ):
        return RequestTooLarge
    return _CLASSES.get(code, ServerError)


def _trailers(error: grpc.RpcError) -> dict[str, str | bytes]:
    pairs: Iterable[Any] = error.trailing_metadata() or ()
    return dict(pairs)
