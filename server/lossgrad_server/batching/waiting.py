"""The jobs that wait, in two lines: small ones, gathered into batches, and large ones, which run in pieces among them."""

from __future__ import annotations

from collections import deque

from lossgrad_server.batching.forming import Batch, BatchLimits, form_batch, take_alone
from lossgrad_server.batching.job import Job


class WaitingJobs:
    """Not thread-safe: the batcher calls it under its lock."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._small: deque[Job] = deque()
        self._large: deque[Job] = deque()

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._small) + len(self._large)

    @property
    def byte_count(self) -> int:
        """The bytes of tensor data of all that wait, their answers included."""
        return sum(job.byte_count for line in (self._small, self._large) for job in line)

    @property
    def oldest_ns(self) -> int | None:
        """When the job that has waited longest was queued, on time.perf_counter_ns's clock; None where none waits."""
        return min((line[0].queued_ns for line in (self._small, self._large) if line), default=None)

    def add(self, job: Job, *, is_large: bool) -> None:
        """Let a job wait."""
        (self._large if is_large else self._small).append(job)

    def take_all(self) -> list[Job]:
        """Take every job."""
        jobs = [*self._small, *self._large]
        self._small.clear()
        self._large.clear()
        return jobs

    def take_small(self) -> Batch | None:
        """Take the next batch of small jobs; None if none waits."""
        return form_batch(self._small, self._limits) if self._small else None

    def take_large(self) -> Batch | None:
        """Take the next large job, as a batch of its own; None if none waits."""
        return take_alone(self._large) if self._large else None
