"""What becomes of jobs: a worker's failures as errors, and outcomes handed back to those that they are for."""

from __future__ import annotations

import logging
from typing import Final

from lossgrad_server.batching.job import Job, Outcome
from lossgrad_server.errors import Code, InternalError, Reason, RequestError, TooLarge
from lossgrad_server.work import FailureKind, WorkFailure

logger = logging.getLogger(__name__)

LATE: Final = (
    "this request's deadline passed while the device was computing it; allow more time, or send fewer or smaller requests "
    "at a time"
)


def hand_back(outcomes: list[tuple[Job, Outcome]]) -> None:
    """Give jobs back to those that they came from; as many at a time as have the same `on_done`."""
    start = 0
    while start < len(outcomes):
        on_done = outcomes[start][0].on_done
        end = start + 1
        while end < len(outcomes) and outcomes[end][0].on_done is on_done:
            end += 1
        try:
            on_done(outcomes[start:end])
        except Exception:  # one receiver's trouble must not cost the others their answers
            logger.exception("Handing back jobs failed")
        start = end


def failure_of(failure: WorkFailure) -> RequestError:
    """Return what the caller is told of a worker's failure."""
    if failure.kind == FailureKind.OUT_OF_MEMORY:
        return TooLarge(failure.message, reason=Reason.OUT_OF_DEVICE_MEMORY)
    if failure.kind == FailureKind.DEVICE_LOST:
        return RequestError(
            failure.message, code=Code.UNAVAILABLE, reason=Reason.DEVICE_FAILED, retry_after_seconds=1.0
        )
    if failure.kind == FailureKind.WORKER_CRASHED:
        return RequestError(failure.message, code=Code.INTERNAL, reason=Reason.WORKER_CRASHED)
    return InternalError()
