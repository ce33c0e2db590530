"""Jobs without tensors, and a worker that does what a test tells it: the parts that the batcher's tests are made of."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from lossgrad_server.batching.admission import AdmissionLimits
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.forming import Batch, BatchLimits
from lossgrad_server.batching.job import Computed, Job, Outcome
from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import BatchResult, DeviceWorker, Done, WorkFailure, WorkItem, WorkResult

PATIENCE_SECONDS = 30.0  # only a failing test waits so long
PLENTY = 1 << 40
SPEC = SpecPlan(LossKind.L1, 0.0, Reduction.SUM)


class Answers:
    """What became of jobs: a place for `on_done`, which notes every call."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[Outcome]] = {}
        self.order: list[str] = []
        self._arrived: queue.SimpleQueue[str] = queue.SimpleQueue()

    def job(self, name: str, elements: int = 1, *, deadline: float | None = None) -> Job:
        """Return a job that sums `elements` float32 pairs: 8 bytes each."""
        tensor = TensorPlan(DataType.FLOAT32, (elements,))
        self.outcomes[name] = []

        def on_done(outcomes: list[tuple[Job, Outcome]]) -> None:
            ((_, outcome),) = outcomes
            self.outcomes[name].append(outcome)
            self.order.append(name)
            self._arrived.put(name)

        # The name travels as the item's header, so that the worker can tell the jobs apart.
        return Job(JobPlan((SPEC,), tensor, tensor), WorkItem(name.encode(), ()), on_done, deadline)

    def wait_for(self, count: int) -> None:
        """Wait until so many more answers have come."""
        for _ in range(count):
            self._arrived.get(timeout=PATIENCE_SECONDS)

    def computed(self, name: str) -> Computed:
        """Return the one outcome of a job that was computed."""
        (outcome,) = self.outcomes[name]
        assert isinstance(outcome, Computed), outcome
        return outcome

    def error(self, name: str) -> RequestError:
        """Return the one outcome of a job that failed."""
        (outcome,) = self.outcomes[name]
        assert isinstance(outcome, RequestError), outcome
        return outcome


class FakeWorker:
    """A worker that holds each batch until the test lets it go, if it is told to, and can be made to fail."""

    device = "cpu"
    inline_work = 0

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[threading.Thread] = set()
        self.closed = threading.Event()
        self.warm_up_error: Exception | None = None
        self.outcome: Callable[[str], WorkResult | WorkFailure] = lambda name: WorkResult(name.encode(), ())
        self.outcome_count: int | None = None  # how many outcomes it gives, if not one for each item
        self._may_run = threading.Event()
        self._may_run.set()
        self._begun: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def hold(self) -> None:
        self._may_run.clear()

    def release(self) -> None:
        self._may_run.set()

    def wait_for_batch(self) -> list[str]:
        """Wait until the next batch has begun; return the names of its jobs."""
        return self._begun.get(timeout=PATIENCE_SECONDS)

    def warm_up(self) -> None:
        self.threads.add(threading.current_thread())
        if self.warm_up_error is not None:
            raise self.warm_up_error

    @property
    def slots(self) -> int:
        return 1

    @property
    def is_lost(self) -> bool:
        return False

    def is_large(self, plan: JobPlan) -> bool:
        return False

    def submit(self, items: Sequence[WorkItem]) -> Done:
        return Done(self.run(items))

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        self.threads.add(threading.current_thread())
        names = [item.header.decode() for item in items]
        self.batches.append(names)
        self._begun.put(names)
        assert self._may_run.wait(PATIENCE_SECONDS)
        return BatchResult([self.outcome(name) for name in names][: self.outcome_count], 10, 20, 30)

    def close(self) -> None:
        self.threads.add(threading.current_thread())
        self.closed.set()


class Observed:
    """A BatchObserver that notes the batches that ran."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def batch_done(self, batch: Batch, result: BatchResult, busy_ns: int) -> None:
        assert busy_ns >= 0
        self.batches.append(batch)


def batcher(
    worker: DeviceWorker,
    *,
    requests: int = 256,
    elements: int = PLENTY,
    byte_count: int = PLENTY,
    admitted_requests: int = PLENTY,
    admitted_bytes: int = PLENTY,
    observer: Observed | None = None,
    post: Callable[[Callable[[], None]], None] = lambda callback: callback(),
    on_lost: Callable[[], None] = lambda: None,
) -> Batcher:
    """Return a batcher, not started, that hands outcomes back in the worker's thread."""
    return Batcher(
        worker,
        batch_limits=BatchLimits(requests, elements, byte_count),
        admission_limits=AdmissionLimits(admitted_requests, admitted_bytes),
        post=post,
        observer=observer or Observed(),
        on_lost=on_lost,
    )
