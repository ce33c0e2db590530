"""RequestError -> google.rpc.Status with its details. The one place where errors become statuses."""

from __future__ import annotations

import logging
import uuid

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from lossgrad_server.errors import RequestError

logger = logging.getLogger(__name__)

DOMAIN = "lossgrad"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRFC A6: how long a client's retries wait; gRPC's own clients honour it


def to_status(error: RequestError, request_id: str = "") -> status_pb2.Status:
    """Return the status that the caller gets.

    `request_id` is the caller's idempotency key; where there is none a new one is made, so that an error can be named.
    """
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id or new_request_id()}
    )
    details = [_pack(info)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message, reason=error.reason
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code, message=error.message, details=details)


def new_request_id() -> str:
    """Return a name for a request whose caller gave it none: so that its error can be found in the log."""
    return uuid.uuid4().hex


def pushback(error: RequestError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that tells gRPC's retries when to come back; none where they should not."""
    if error.retry_after_seconds is None:
        return ()
    # Never 0: grpcio 1.85 then loses the next attempt, and the call waits for its deadline.
    return ((PUSHBACK_KEY, str(max(1, round(error.retry_after_seconds * 1e3)))),)


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def log_internal(error: RequestError, caller: str, trace_id: str | None) -> None:
    """Log that a request failed through the server's fault, so that it is found by its id, and whoever sent it."""
    fields = {"request_id": error.request_id, "reason": str(error.reason), "caller": caller}
    if trace_id is not None:
        fields["trace_id"] = trace_id
    logger.error("Request %s of %s was answered INTERNAL, %s", error.request_id, caller, error.reason, extra=fields)
