"""Which waiting jobs make the next batch: all, up to the caps. There is no timer: a lone request never waits."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lossgrad_server.batching.job import Job
from lossgrad_server.batching.line import work_of
from lossgrad_server.batching.schedule import Pace, is_too_long
from lossgrad_server.errors import Cancelled, DeadlinePassed, RequestError


class ClosedBy(StrEnum):
    """Why a batch took no more jobs."""

    IDLE = "idle"  # nothing more waited
    MAX_REQUESTS = "max_requests"
    MAX_ELEMENTS = "max_elements"
    MAX_BYTES = "max_bytes"
    INLINE = "inline"  # little enough to be computed at once, in the transport's thread
    ALONE = "alone"  # the job by itself reaches a cap
    DEADLINE = "deadline"  # with one more, one in it would be late: a batch is answered when all of it is done


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The caps of one batch. A job that exceeds one by itself makes a batch alone."""

    requests: int
    elements: int
    bytes: int


@dataclass(slots=True)
class Batch:
    """The jobs of one run on the device, and the jobs that were dropped while it was formed."""

    jobs: list[Job] = field(default_factory=list)
    dropped: list[tuple[Job, RequestError]] = field(default_factory=list)
    element_count: int = 0
    byte_count: int = 0
    work: int = 0  # the sum of `work_of`
    closed_by: ClosedBy = ClosedBy.IDLE


class Waiting(Protocol):
    """Jobs in the order in which they are to be taken."""

    def __len__(self) -> int:
        """Return how many there are."""

    @property
    def first(self) -> Job:
        """The next."""

    def popleft(self) -> Job:
        """Take the next."""


class InOrder:
    """Jobs that came together, to be taken in their order."""

    __slots__ = ("_jobs",)

    def __init__(self, jobs: deque[Job]) -> None:
        self._jobs = jobs

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._jobs)

    @property
    def first(self) -> Job:
        """The next."""
        return self._jobs[0]

    def popleft(self) -> Job:
        """Take the next."""
        return self._jobs.popleft()


def form_batch(waiting: Waiting, limits: BatchLimits, pace: Pace) -> Batch:
    """Take the next batch's jobs. Cancelled ones, and those that cannot be done in time, are dropped, not computed."""
    batch = Batch()
    now = time.monotonic()
    now_ns = time.perf_counter_ns()
    jobs = batch.jobs
    elements = size = 0
    due: float | None = None  # when the most urgent job must be done, and the batch with it
    while waiting:
        job = waiting.first
        # Asked here first, because a call for each of thousands of jobs a second costs more than the question.
        if job.cancelled or job.deadline is not None or due is not None:
            # A job is answered with its batch, so all that is in there counts.
            seconds = pace.seconds(batch.work + work_of(job))
            if due is not None and is_too_long(seconds, due - now):
                batch.closed_by = ClosedBy.DEADLINE
                break
            error = reason_to_drop(job, now, _believed(seconds, pace, is_first=not jobs))
            if error is not None:
                batch.dropped.append((waiting.popleft(), error))
                continue
        elements += job.plan.element_count
        size += job.byte_count
        if jobs and (elements > limits.elements or size > limits.bytes or len(jobs) >= limits.requests):
            batch.closed_by = _cap_reached(limits, len(jobs), elements)
            break
        job.picked_ns = now_ns
        jobs.append(waiting.popleft())
        if job.deadline is not None and (due is None or job.deadline < due):
            due = job.deadline
        batch.element_count = elements
        batch.byte_count = size
        batch.work += work_of(job)
        if len(jobs) == 1 and (elements >= limits.elements or size >= limits.bytes):
            batch.closed_by = ClosedBy.ALONE
            break
    return batch


def take_alone(waiting: Waiting, pace: Pace) -> Batch:
    """Take one job as a batch of its own. Cancelled ones, and those that cannot be done in time, are dropped."""
    batch = Batch(closed_by=ClosedBy.ALONE)
    while waiting and not batch.jobs:
        job = waiting.popleft()
        if (error := reason_to_drop(job, time.monotonic(), _believed(pace.seconds(work_of(job)), pace))) is not None:
            batch.dropped.append((job, error))
        else:
            job.picked_ns = time.perf_counter_ns()
            batch.jobs.append(job)
            batch.element_count = job.plan.element_count
            batch.byte_count = job.byte_count
            batch.work = work_of(job)
    return batch


def _believed(seconds: float, pace: Pace, *, is_first: bool = True) -> float:
    """Return what a job is expected to take; 0 where that would keep the device idle for a belief that may be wrong."""
    return 0.0 if is_first and pace.is_stale else seconds


def _cap_reached(limits: BatchLimits, requests: int, elements: int) -> ClosedBy:
    if requests >= limits.requests:
        return ClosedBy.MAX_REQUESTS
    return ClosedBy.MAX_ELEMENTS if elements > limits.elements else ClosedBy.MAX_BYTES


def reason_to_drop(job: Job, now: float, service_seconds: float = 0.0) -> RequestError | None:
    """Return why a job that would now take `service_seconds` is not computed; None if it is."""
    # First: a transport cancels the calls whose deadline passes, and late is what they are counted as.
    if job.deadline is not None and now >= job.deadline:
        late_ms = (now - job.deadline) * 1e3
        return DeadlinePassed(
            f"this request's deadline passed {late_ms:.1f} ms before the device was free for it; "
            "allow more time, or send fewer requests at a time"
        )
    if job.deadline is not None and is_too_long(service_seconds, job.deadline - now):
        left_ms = (job.deadline - now) * 1e3
        return DeadlinePassed(
            f"this request's deadline was {left_ms:.1f} ms away when the device was free for it, and computing its batch "
            f"takes about {service_seconds * 1e3:.1f} ms; allow more time, or send fewer requests at a time"
        )
    if job.cancelled:
        return Cancelled("the caller cancelled this request while it waited")
    return None
