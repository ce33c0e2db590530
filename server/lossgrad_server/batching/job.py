"""One queued request, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import WorkItem, WorkResult


@dataclass(frozen=True, slots=True)
class Computed:
    """A job's result, where its time went in nanoseconds, and the batch that it was part of.

    `batch_number` is the batch's own: the jobs of one batch are handed back one after the other.
    """

    result: WorkResult
    queue_ns: int
    pack_ns: int
    compute_ns: int
    unpack_ns: int
    batch_request_count: int
    batch_element_count: int
    batch_number: int


class Job:
    """A checked request on its way through the queue.

    The transport makes it and gets it back through `on_done`, called exactly once, in the thread that the batcher's
    `post` runs things in, with the job and its outcome. `cancelled` is set by the transport when the caller has gone;
    the batcher only reads it, when it picks the job.
    """

    __slots__ = ("cancelled", "deadline", "item", "on_done", "picked_ns", "plan", "queued_ns")

    def __init__(
        self,
        plan: JobPlan,
        item: WorkItem,
        on_done: Callable[[Job, Computed | RequestError], None],
        deadline: float | None = None,
    ) -> None:
        self.plan = plan
        self.item = item
        self.on_done = on_done
        self.deadline = deadline  # on time.monotonic's clock, in seconds
        self.cancelled = False
        self.queued_ns = 0  # both on time.perf_counter_ns's clock
        self.picked_ns = 0

    @property
    def byte_count(self) -> int:
        """The bytes of tensor data that this job holds, those of its answer included."""
        return self.plan.input_byte_count + self.plan.output_byte_count
