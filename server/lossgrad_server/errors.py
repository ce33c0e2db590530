"""The ways in which a request fails, as exceptions. Where they become gRPC statuses: transport/status.py.

Raised where the fault is seen. This module knows no gRPC: `Code` repeats the canonical codes' numbers.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Code(IntEnum):
    """The canonical status codes that lossgrad answers with; the numbers are google.rpc.Code's."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(StrEnum):
    """Why a request failed, as ErrorInfo.reason says it. Documented in docs/protocol.md; changes only by addition."""

    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    HEADER_TOO_LARGE = "HEADER_TOO_LARGE"
    MISSING_FIELD = "MISSING_FIELD"
    SPEC_COUNT = "SPEC_COUNT"
    UNKNOWN_LOSS = "UNKNOWN_LOSS"
    UNKNOWN_REDUCTION = "UNKNOWN_REDUCTION"
    BAD_PARAMETER = "BAD_PARAMETER"
    UNKNOWN_DATA_TYPE = "UNKNOWN_DATA_TYPE"
    UNSUPPORTED_DATA_TYPE = "UNSUPPORTED_DATA_TYPE"
    BAD_SHAPE = "BAD_SHAPE"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    DATA_LENGTH_MISMATCH = "DATA_LENGTH_MISMATCH"
    BAD_TIMEOUT = "BAD_TIMEOUT"
    TOO_MANY_REQUESTS_IN_MESSAGE = "TOO_MANY_REQUESTS_IN_MESSAGE"
    UNEXPECTED_PART = "UNEXPECTED_PART"
    BAD_SEQUENCE = "BAD_SEQUENCE"
    BAD_STATE = "BAD_STATE"
    ELEMENT_COUNT_MISMATCH = "ELEMENT_COUNT_MISMATCH"
    TOO_MANY_GROUPS = "TOO_MANY_GROUPS"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    RESULT_TOO_LARGE = "RESULT_TOO_LARGE"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_TENSOR = "UNKNOWN_TENSOR"
    UNKNOWN_REGION = "UNKNOWN_REGION"
    REGION_EXISTS = "REGION_EXISTS"
    BAD_REGION = "BAD_REGION"
    REGIONS_FULL = "REGIONS_FULL"
    SHARED_MEMORY_OFF = "SHARED_MEMORY_OFF"
    QUEUE_FULL = "QUEUE_FULL"
    QUEUE_BYTES_FULL = "QUEUE_BYTES_FULL"
    PREDICTED_LATE = "PREDICTED_LATE"
    DRAINING = "DRAINING"
    WARMING_UP = "WARMING_UP"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    CANCELLED = "CANCELLED"
    OUT_OF_DEVICE_MEMORY = "OUT_OF_DEVICE_MEMORY"
    DEVICE_FAILED = "DEVICE_FAILED"
    WORKER_RESTARTING = "WORKER_RESTARTING"
    WORKER_CRASHED = "WORKER_CRASHED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"


class RequestError(Exception):
    """A request that fails, and what its caller is told.

    `message` gives both values and says what to change. `field` is the path of the request's field that the caller must
    change, if there is one. `retry_after_seconds` is set where the same request may succeed later.
    """

    def __init__(
        self,
        message: str,
        *,
        code: Code = Code.INVALID_ARGUMENT,
        reason: Reason,
        field: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.request_id = ""  # the caller's idempotency key, set where it is known


class InvalidRequest(RequestError):
    """A request that its caller must change. INVALID_ARGUMENT."""

    def __init__(self, message: str, *, reason: Reason, field: str | None = None) -> None:
        super().__init__(message, code=Code.INVALID_ARGUMENT, reason=reason, field=field)


class TooLarge(RequestError):
    """A request beyond a hard cap; trying again does not help. RESOURCE_EXHAUSTED."""

    def __init__(self, message: str, *, reason: Reason, field: str | None = None) -> None:
        super().__init__(message, code=Code.RESOURCE_EXHAUSTED, reason=reason, field=field)


class Unavailable(RequestError):
    """A request that this server cannot take now, but it or another soon can. UNAVAILABLE."""

    def __init__(self, message: str, *, reason: Reason, retry_after_seconds: float) -> None:
        super().__init__(message, code=Code.UNAVAILABLE, reason=reason, retry_after_seconds=retry_after_seconds)


class DeadlinePassed(RequestError):
    """A request whose deadline passed before it was computed. DEADLINE_EXCEEDED."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.DEADLINE_EXCEEDED, reason=Reason.DEADLINE_PASSED)


class Cancelled(RequestError):
    """A request whose caller went away before it was computed. CANCELLED."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.CANCELLED, reason=Reason.CANCELLED)


class InternalError(RequestError):
    """A bug of ours, logged where it was caught; its caller learns nothing of our insides. INTERNAL."""

    def __init__(self) -> None:
        super().__init__(
            "the server failed to compute this request; its log says why. Trying again may not help",
            code=Code.INTERNAL,
            reason=Reason.INTERNAL,
        )
