"""Who may queue: bounds on the requests and bytes that are between admission and answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from lossgrad_server.batching.job import Job
from lossgrad_server.errors import Reason, Unavailable

logger = logging.getLogger(__name__)

# A full queue empties in milliseconds; a caller that comes back much sooner would only be refused again.
RETRY_AFTER_SECONDS = 0.05

# Under overload requests are taken and refused by turns, many times a second. One line says it for so long.
LOG_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The most requests, and the most bytes of their tensors (answers included), that wait or run at a time."""

    requests: int
    bytes: int


class Admission:
    """Counts what is inside. Not thread-safe: the batcher calls it under its lock."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self.requests = 0
        self.bytes = 0
        self.total = 0  # ever admitted
        self._said_at = -LOG_SECONDS

    def admit(self, job: Job) -> None:
        """Count a job in, or raise Unavailable. When nothing is inside, any job is admitted, however large."""
        size = self.bytes + job.byte_count
        if self.requests and self.requests >= self.limits.requests:
            self.refuse(
                Reason.QUEUE_FULL,
                f"the server holds {self.requests} requests, its limit is {self.limits.requests}; "
                "try again shortly, or send fewer at a time",
            )
        if self.requests and size > self.limits.bytes:
            self.refuse(
                Reason.QUEUE_BYTES_FULL,
                f"this request needs {job.byte_count} bytes, {self.bytes} of the server's {self.limits.bytes} "
                "are taken; try again shortly, or send fewer or smaller tensors at a time",
            )
        self.requests += 1
        self.total += 1
        self.bytes = size

    def release(self, job: Job) -> None:
        """Count a job out."""
        self.requests -= 1
        self.bytes -= job.byte_count

    def refuse(self, reason: Reason, message: str) -> NoReturn:
        """Raise Unavailable."""
        now = self._clock()
        if now - self._said_at >= LOG_SECONDS:  # how many, metrics count
            self._said_at = now
            logger.warning("Refusing requests (%s): %s requests, %s bytes inside", reason, self.requests, self.bytes)
        raise Unavailable(message, reason=reason, retry_after_seconds=RETRY_AFTER_SECONDS)
