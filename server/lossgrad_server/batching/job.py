"""One queued request, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import WorkItem, WorkResult


class BatchFacts(NamedTuple):
    """What the jobs of a batch have in common: where its time went, in nanoseconds, how large it was, its own number.

    `done_ns` is when its results were there, on perf_counter_ns's clock.
    """

    pack_ns: int
    compute_ns: int
    unpack_ns: int
    request_count: int
    element_count: int
    number: int
    done_ns: int = 0


class Computed(NamedTuple):
    """A job's result, how long it waited to be picked, in nanoseconds, and the batch that it was part of."""

    result: WorkResult
    queue_ns: int
    batch: BatchFacts


Outcome = Computed | RequestError


class Origin(Protocol):
    """Whom a job is for. Looked at only where the job has to wait."""

    @property
    def caller(self) -> str:
        """A name; the jobs of different callers take turns."""

    @property
    def is_bulk(self) -> bool:
        """Whether the job goes after all that is not bulk."""


class KnownOrigin(NamedTuple):
    """An Origin that is known from the start."""

    caller: str = ""
    is_bulk: bool = False


ANYONE: Origin = KnownOrigin()


class Job:
    """A checked request on its way through the queue.

    The transport makes it and gets it back through `on_done`, called exactly once for each job, in the thread that the
    batcher's `post` runs things in. It is given all jobs of a batch that have the same `on_done`, with their outcomes, in
    one call. `cancelled` is set by the transport when the caller has gone; the batcher only reads it, when it picks the
    job. `byte_count` are the bytes of tensor data that the job holds, those of its answer included.
    """

    __slots__ = (
        "byte_count", "cancelled", "deadline", "is_answered", "item", "on_done", "origin", "picked_ns", "plan", "queued_ns",
    )  # fmt: skip

    def __init__(
        self,
        plan: JobPlan,
        item: WorkItem,
        on_done: Callable[[list[tuple[Job, Outcome]]], None],
        deadline: float | None = None,
    ) -> None:
        self.plan = plan
        self.item = item
        self.on_done = on_done
        self.deadline = deadline  # on time.monotonic's clock, in seconds
        self.byte_count = plan.byte_count
        self.cancelled = False
        self.origin = ANYONE
        self.is_answered = False  # the batcher's: it was handed back late, while it was still being computed
        self.queued_ns = 0  # both on time.perf_counter_ns's clock
        self.picked_ns = 0
