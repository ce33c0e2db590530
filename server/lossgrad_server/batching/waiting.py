"""The jobs that wait, in two lines: small ones, gathered into batches, and large ones, which run in pieces among them."""

from __future__ import annotations

import time
from typing import NamedTuple

from lossgrad_server.batching.forming import Batch, BatchLimits, form_batch, reason_to_drop, take_alone
from lossgrad_server.batching.job import Job
from lossgrad_server.batching.line import Line, Priority, work_of
from lossgrad_server.batching.schedule import Schedule
from lossgrad_server.errors import RequestError


class QueueSummary(NamedTuple):
    """What waits: how many jobs, the bytes of their tensors, answers included, and how long the first of them has waited."""

    requests: int
    bytes: int
    oldest_seconds: float  # 0 where none waits


class WaitingJobs:
    """Not thread-safe: the batcher calls it under its lock."""

    def __init__(self, limits: BatchLimits, schedule: Schedule) -> None:
        self._limits = limits
        self._schedule = schedule
        self._small = Line()
        self._large = Line()

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._small) + len(self._large)

    def summary(self, priority: Priority) -> QueueSummary:
        """Return what waits with a priority. Walks it."""
        now_ns = time.perf_counter_ns()
        jobs = [job for line in (self._small, self._large) for job in line.of_priority(priority)]
        oldest_ns = min((job.queued_ns for job in jobs), default=now_ns)
        return QueueSummary(len(jobs), sum(job.byte_count for job in jobs), (now_ns - oldest_ns) * 1e-9)

    def seconds_until_done(self, job: Job, *, is_large: bool) -> float:
        """Return in how many seconds a job that came now would be done."""
        small = self._small.work_before(job)
        if is_large:
            return self._schedule.seconds_until_done(small, self._large.work_before(job) + work_of(job))
        return self._schedule.seconds_until_done(small + work_of(job), 0)

    def add(self, job: Job, *, is_large: bool) -> None:
        """Let a job wait."""
        (self._large if is_large else self._small).append(job)

    def take_all(self) -> list[Job]:
        """Take every job."""
        return self._small.take(_is_any) + self._large.take(_is_any)

    def take_overdue(self, now: float) -> list[tuple[Job, RequestError]]:
        """Take the jobs whose deadline has passed or whose caller has gone, each with why."""
        taken = [job for line in (self._small, self._large) for job in line.take(lambda job: _is_overdue(job, now))]
        return [(job, error) for job in taken if (error := reason_to_drop(job, now)) is not None]

    def take_small(self) -> Batch | None:
        """Take the next batch of small jobs; None if none waits."""
        return form_batch(self._small, self._limits, self._schedule.small) if self._small else None

    def take_large(self) -> Batch | None:
        """Take the next large job, as a batch of its own; None if none waits."""
        return take_alone(self._large, self._schedule.large) if self._large else None


def _is_any(_: Job) -> bool:
    return True


def _is_overdue(job: Job, now: float) -> bool:
    return job.cancelled or (job.deadline is not None and now >= job.deadline)
