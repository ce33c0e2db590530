"""The device worker that computes in another process: what the batcher has in place of the engine's own.

Used by one thread at a time, as every worker is: the batcher's, or for a moment the one that submits a little. The operands
of a batch are copied into a slot of shared memory, its answers out of it; while one batch computes, the next is copied in.
So the server's own memory holds all that is needed to compute a batch again, and a process that dies costs nobody an answer.

Losses. A process that dies, that takes longer for a batch than the limit, or whose device has failed for good, is replaced
(keeper.py). What it held is computed again by the next one, one request at a time, because one of them may be what killed
it: a request with which a process dies twice, the second time alone, is refused (WORKER_CRASHED), and the others are
answered. Halving the batch would find it too, but every half that holds it costs another process, and a process costs more
than all the requests of a batch. Where no process comes in time, what was lost is answered DEVICE_LOST, to be tried again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Final

from lossgrad_server.errors import InternalError
from lossgrad_server.isolation.keeper import Keeper, KeeperObserver, ProcessSettings
from lossgrad_server.isolation.link import Batch, Link, ProcessLost
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.isolation.records import BlockLayout, Facts, layout_of
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import BatchResult, FailureKind, Retry, WorkFailure, WorkItem, WorkResult

logger = logging.getLogger(__name__)

# How long what was lost with a process waits for the next one.
_REPLACEMENT_SECONDS: Final = 10.0
# A large request goes on by itself: this is how long the batcher waits before it looks for small ones that have come.
_LOOK_SECONDS: Final = 0.001
# How long callers are told to wait for another process.
_LEAST_RETRY_SECONDS: Final = 0.15
_MOST_RETRY_SECONDS: Final = 5.0
# Up to here a hand-over to another thread costs more than waiting; above, the copies are better made beside the event loop.
_INLINE_WORK: Final = 1 << 14
# A batch may take the limit, and as much again for each of so many bytes.
_BYTES_PER_LIMIT: Final = 256 << 20
# With this many deaths a request is what killed the process.
_MOST_DEATHS: Final = 2

_CRASHED: Final = (
    "the server's worker process ended while it computed this request, twice, and then computed others; do not send it "
    "again as it is, and tell the server's operator"
)
_NO_MEMORY: Final = (
    "this request takes about {} bytes of shared memory, which the server cannot have now; send it in smaller parts, or "
    "again when the server is less busy"
)

Outcome = WorkResult | WorkFailure


class IsolatedWorker:
    """Computes batches in another process. Implements work.DeviceWorker."""

    def __init__(self, settings: ProcessSettings, limit_seconds: float) -> None:
        """Start a process. ValueError where there is no such device, RuntimeError where it does not start.

        `limit_seconds` is how long a batch may take, before the process is taken for hung.
        """
        self._limit_seconds = limit_seconds
        self.keeper = Keeper(settings, least_slots=2)
        self.on_crash: Callable[[], None] = lambda: None  # called when a request is refused for killing its process
        self._under_way: list[_Run] = []  # what the process has, the oldest first

    @property
    def facts(self) -> Facts:
        """What the process says of itself."""
        return self.keeper.facts

    @property
    def device(self) -> str:
        """The device's name, as torch writes it."""
        return self.keeper.facts.device

    @property
    def slots(self) -> int:
        """One more than the process computes at a time: one is filled meanwhile."""
        return max(2, self.keeper.facts.slots + 1)

    @property
    def inline_work(self) -> int:
        """Little: who submits waits for a moment, and leaves to the batcher's thread what takes longer."""
        return min(self.keeper.facts.inline_work, _INLINE_WORK)

    @property
    def is_lost(self) -> bool:
        """Whether no process can be had any more."""
        return self.keeper.is_lost

    @property
    def retry_after_seconds(self) -> float:
        """When to come back: when there is likely a process again, and the later the longer there has been none.

        Callers try a few times. What a start took the last time says little on a machine that is busy now; with this the
        default of three attempts outlasts a start of 0.7 s, and those who come later wait longer.
        """
        keeper = self.keeper
        return min(max(keeper.restart_seconds, _LEAST_RETRY_SECONDS, 4 * keeper.seconds_without), _MOST_RETRY_SECONDS)

    @property
    def memory(self) -> Mapping[str, int]:
        """The device's memory that the process has, in bytes by kind, as it last said; nothing where it has not."""
        link = self.keeper.link
        return {} if link is None or link.memory is None else link.memory._asdict()

    def is_large(self, plan: JobPlan) -> bool:
        """Return whether a request is computed in pieces."""
        return self.keeper.facts.large.is_above(plan)

    def watch(self, observer: KeeperObserver) -> None:
        """Tell an observer when processes are lost and replaced."""
        self.keeper.watch(observer)

    def warm_up(self) -> None:
        """Warm the process up."""
        self.keeper.warm_up()

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        """Begin to compute the items: copy them to where the process reads them."""
        outcomes: list[Outcome | None] = [None] * len(items)
        layouts: list[BlockLayout] = []
        sent: list[int] = []
        for index, item in enumerate(items):
            try:
                layouts.append(_checked_layout(item))
            except Exception as error:
                logger.error("A request failed with an unexpected error", exc_info=error)
                outcomes[index] = WorkFailure(FailureKind.INTERNAL, InternalError().message)
            else:
                sent.append(index)
        run = self._begin([items[index] for index in sent], layouts) if sent else None
        return Pending(self, outcomes, sent, run)

    def close(self) -> None:
        """End the process."""
        self.keeper.close()

    # ---- What Pending asks for ----

    def wait(self, run: _Run, timeout_seconds: float) -> bool:
        """Wait up to so long until a run is done or lost; return whether it is."""
        until = time.monotonic() + timeout_seconds
        while not run.is_over:
            link = run.link
            now = time.monotonic()
            left = link.seconds_left(
                run.batch, self._limit_seconds * (1 + run.batch.byte_count / _BYTES_PER_LIMIT), now
            )
            patience = max(0.0, min(until - now, left))
            try:
                has_any = link.poll(patience)
            except ProcessLost as error:
                logger.debug("The device's process is gone: %s", error)
                self._lose(link)
                continue
            if has_any:
                self._take_done(link)
            elif patience == left:
                logger.error("The device's process %d has hung for too long; killing it", link.process_id)
                self._lose(link, Loss.HUNG)
            elif patience == 0 or time.monotonic() >= until:
                return False
        return True

    def compute_again(self, item: WorkItem, retries: list[Retry]) -> Outcome:
        """Compute an item, with which a process was lost, alone; say so in `retries`."""
        layout = _checked_layout(item)
        for _ in range(_MOST_DEATHS - 1):
            if self.keeper.wait_for_link(_REPLACEMENT_SECONDS) is None:
                return self._unavailable()
            retries.append(Retry.WORKER_LOST)
            run = self._begin([item], [layout])
            self.wait(run, math.inf)
            retries += run.retries
            (outcome,) = run.outcomes
            if outcome is not None:
                return outcome
        logger.error("A request is refused: the device's process was lost with it twice, the second time with it alone")
        self.on_crash()
        return WorkFailure(FailureKind.WORKER_CRASHED, _CRASHED)

    def _unavailable(self) -> WorkFailure:
        message = f"the process of device {self.device} ended while it held this request, and there is no other yet"
        return WorkFailure(FailureKind.DEVICE_LOST, f"{message}; try again")

    # ---- Inside ----

    def _begin(self, items: list[WorkItem], layouts: list[BlockLayout]) -> _Run:
        """Give the process items, if there is one: otherwise they are lost already, and wait for it."""
        run = _Run(items)
        link = self.keeper.link
        if not self._under_way or self._under_way[0].link is not link:
            self.keeper.close_retired()
        if link is None:
            run.is_over = True
            return run
        while not link.has_free_slot() and self._under_way:
            self.wait(self._under_way[0], math.inf)
        try:
            run.batch, run.link = link.begin(items, layouts), link
        except ProcessLost:
            self._lose(link)
            run.is_over = True
        except (OSError, MemoryError) as error:
            required = sum(layout.byte_count for layout in layouts)
            logger.warning("No %d bytes of shared memory for %d requests: %s", required, len(items), error)
            run.end([WorkFailure(FailureKind.OUT_OF_MEMORY, _NO_MEMORY.format(required))] * len(items))
        else:
            self._under_way.append(run)
        return run

    def _take_done(self, link: Link) -> None:
        """Take the answers of all that the process has done."""
        is_lost = False
        for run in [run for run in self._under_way if run.batch.done is not None]:
            done = run.batch.done
            assert done is not None  # noqa: S101
            started = perf_counter_ns()
            outcomes: list[Outcome | None] = [*link.outcomes(run.batch)]
            if done.is_lost:
                is_lost = True  # those that the device failed with are computed again
                outcomes = [None if _is_device_lost(outcome) else outcome for outcome in outcomes]
            self._under_way.remove(run)
            run.end(outcomes)
            run.pack_ns = run.batch.pack_ns + done.pack_ns
            run.compute_ns = done.compute_ns
            run.retries = [Retry.OUT_OF_MEMORY] * done.memory_retries + [Retry.ERROR] * done.error_retries
            run.unpack_ns = done.unpack_ns + perf_counter_ns() - started
        if is_lost:
            logger.error("Device %s has failed; ending its process", self.device)
            self._lose(link, Loss.DEVICE)

    def _lose(self, link: Link, loss: Loss | None = None) -> None:
        """Give the process up, and with it what it has not answered."""
        self.keeper.lose(link, loss)
        for run in self._under_way:
            run.is_over = True
        self._under_way.clear()


class _Run:
    """Items that were given to a process together. Over when there is an outcome, or none to come, for each."""

    __slots__ = ("batch", "compute_ns", "is_over", "items", "link", "outcomes", "pack_ns", "retries", "unpack_ns")

    batch: Batch
    link: Link

    def __init__(self, items: list[WorkItem]) -> None:
        self.items = items
        self.outcomes: list[Outcome | None] = [None] * len(items)
        self.is_over = False
        self.pack_ns = self.compute_ns = self.unpack_ns = 0
        self.retries: list[Retry] = []

    def end(self, outcomes: Sequence[Outcome | None]) -> None:
        self.outcomes[:] = outcomes
        self.is_over = True


class Pending:
    """A batch under way. Implements work.Pending."""

    def __init__(
        self, worker: IsolatedWorker, outcomes: list[Outcome | None], sent: list[int], run: _Run | None
    ) -> None:
        """`outcomes` has those that are known; the others are those of the run, which has the items numbered in `sent`."""
        self._worker = worker
        self._outcomes = outcomes
        self._sent = sent
        self._run = run

    def advance(self) -> bool:
        """Give the process a little time, in which it does pieces of a large request; return whether it needs more."""
        return self._run is not None and not self._worker.wait(self._run, _LOOK_SECONDS)

    def is_done(self) -> bool:
        """Return whether `result` would not wait."""
        run = self._run
        return run is None or (self._worker.wait(run, 0.0) and None not in run.outcomes)

    def result(self) -> BatchResult:
        """Wait for the process, and for the next one where it is lost, and return what became of the items."""
        run = self._run
        pack_ns = compute_ns = unpack_ns = 0
        retries: list[Retry] = []
        if run is not None:
            self._worker.wait(run, math.inf)
            retries += run.retries
            for index, item, outcome in zip(self._sent, run.items, run.outcomes, strict=True):
                self._outcomes[index] = self._worker.compute_again(item, retries) if outcome is None else outcome
            pack_ns, compute_ns, unpack_ns = run.pack_ns, run.compute_ns, run.unpack_ns
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        return BatchResult(outcomes, pack_ns, compute_ns, unpack_ns, tuple(retries))


def _checked_layout(item: WorkItem) -> BlockLayout:
    """Return the layout of an item's block. ValueError where its operands are not what its plan says."""
    layout = layout_of(item.header)
    for operand, (_, size) in zip(item.operands, layout.operands, strict=True):
        if len(operand) != size:
            raise ValueError(f"an operand has {len(operand)} bytes, its plan says {size}")
    return layout


def _is_device_lost(outcome: Outcome | None) -> bool:
    return isinstance(outcome, WorkFailure) and outcome.kind == FailureKind.DEVICE_LOST
