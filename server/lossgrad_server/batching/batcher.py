"""The batcher: takes jobs from the transport, gives batches to one device's worker, hands outcomes back.

Threads. `submit` is called from any thread (in practice the event loop's). One thread of the batcher's own owns the
worker: it warms it up, runs every batch and closes it. The queue and admission are shared under `_lock`, held for
microseconds and never while the worker runs. Outcomes leave through `post`, once per batch, so that the transport's
thread is woken once however many jobs a batch held. While the worker computes, the next batch gathers by itself.

A few small jobs that find the worker's thread asleep are computed at once by the thread that submits them, which takes
less time than waking another one and being woken. `_device` sees to it that only one thread uses the worker.

Large jobs are computed in pieces, one job at a time, and between two pieces the worker takes a batch of small ones: so a
small job behind a large one waits for a piece and not for the whole. A device with several slots has as many batches
under way, and the batcher waits for the oldest only when there is nothing to submit.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from lossgrad_server.batching.admission import Admission, AdmissionLimits
from lossgrad_server.batching.forming import Batch, BatchLimits, ClosedBy, InOrder, form_batch
from lossgrad_server.batching.job import BatchFacts, Computed, Job, Outcome
from lossgrad_server.batching.line import Priority
from lossgrad_server.batching.outcomes import LATE, failure_of, hand_back
from lossgrad_server.batching.run import BatchObserver, Run
from lossgrad_server.batching.schedule import ADMITTED_PART, Schedule
from lossgrad_server.batching.waiting import QueueSummary, WaitingJobs
from lossgrad_server.errors import DeadlinePassed, InternalError, Reason, RequestError, Unavailable
from lossgrad_server.work import BatchResult, DeviceWorker, WorkFailure

logger = logging.getLogger(__name__)

# How long after its deadline a job that is being computed is given up for its caller. Most are done in that time.
LATE_SECONDS: Final = 0.1


class Batcher:
    """Runs what is submitted on one worker, as greedily as it can: no timer, no waiting for a fuller batch."""

    def __init__(
        self,
        worker: DeviceWorker,
        *,
        batch_limits: BatchLimits,
        admission_limits: AdmissionLimits,
        post: Callable[[Callable[[], None]], None],
        observer: BatchObserver,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a batcher; `start` starts it. `on_lost` is posted once, when the worker's device has failed for good."""
        self._worker = worker
        self._admission = Admission(admission_limits)
        self._post = post
        self._observer = observer
        self._lock = threading.Lock()
        # Held by whoever uses the worker: its thread, except while that sleeps, or a submitter that computes inline.
        self._device = threading.Lock()
        self._schedule = Schedule()
        self._batch_limits = batch_limits
        self._waiting = WaitingJobs(batch_limits, self._schedule)
        self._begun: list[Run] = []  # by the worker's thread, which may be inside the worker with the last
        self._left_over: deque[Run] = deque()  # begun by who submitted them, for the worker's thread to finish
        self._is_any_late = False
        self._on_lost = on_lost
        self._is_lost = False
        # Rung only when the worker's thread sleeps: a put and a wake-up cost 40 us, a look at a flag nothing.
        self._doorbell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = False
        self._is_stopping = False
        self._suspended: Callable[[], RequestError] | None = None
        self._is_warm = threading.Event()
        self._warm_up_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"lossgrad-{worker.device}", daemon=True)

    @property
    def waiting_requests(self) -> int:
        """How many jobs wait to be picked."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether the worker's thread sleeps."""
        return self._is_asleep

    @property
    def admitted_requests(self) -> int:
        """How many jobs are inside: waiting, running, or on their way back."""
        return self._admission.requests

    @property
    def total_admitted(self) -> int:
        """How many jobs were ever admitted."""
        return self._admission.total

    @property
    def admitted_bytes(self) -> int:
        """The bytes of tensor data of all jobs inside, their answers included."""
        return self._admission.bytes

    def waiting(self, priority: Priority) -> QueueSummary:
        """Return what waits with a priority. A snapshot for metrics; walks the queue."""
        with self._lock:
            return self._waiting.summary(priority)

    def start(self) -> None:
        """Start the worker's thread; it warms up first. `wait_until_warm` tells when it is done."""
        self._thread.start()

    def wait_until_warm(self) -> None:
        """Block until the worker is warm. Raises what its warm-up raised."""
        self._is_warm.wait()
        if self._warm_up_error is not None:
            raise self._warm_up_error

    def submit(self, jobs: Sequence[Job]) -> list[tuple[Job, RequestError]]:
        """Queue jobs; return those that were refused, each with its error. Their `on_done` is not called."""
        refused: list[tuple[Job, RequestError]] = []
        now_ns = time.perf_counter_ns()
        with self._lock:
            may_be_inline = self._is_asleep and not self._waiting
            admitted: deque[Job] = deque()
            for job in jobs:
                try:
                    if self._is_stopping:
                        raise Unavailable(
                            "this server is shutting down; try again, on another one if there is one",
                            reason=Reason.DRAINING,
                            retry_after_seconds=0.0,
                        )
                    if self._suspended is not None:
                        raise self._suspended()
                    is_large = self._worker.is_large(job.plan)
                    if job.deadline is not None and not may_be_inline:
                        self._refuse_if_late(job, job.deadline, is_large)
                    self._admission.admit(job)
                except RequestError as error:
                    refused.append((job, error))
                else:
                    job.queued_ns = now_ns
                    may_be_inline = may_be_inline and not is_large
                    admitted.append(job)
            inline = self._take_inline(admitted) if may_be_inline else None
            for job in admitted:  # what is left
                self._waiting.add(job, is_large=self._worker.is_large(job.plan))
            must_ring = inline is None and self._is_asleep and len(self._waiting) > 0
            if must_ring:
                self._is_asleep = False
        if must_ring:
            self._doorbell.put(None)
        if inline is not None:
            self._run_inline(inline)
        return refused

    def _refuse_if_late(self, job: Job, deadline: float, is_large: bool) -> None:
        """Refuse a job that would only be dropped when its turn comes: its caller can try elsewhere at once."""
        left = deadline - time.monotonic()
        seconds = self._waiting.seconds_until_done(job, is_large=is_large)
        if seconds > left * ADMITTED_PART > 0:
            self._admission.refuse(
                Reason.PREDICTED_LATE,
                f"this request's deadline is {left * 1e3:.0f} ms away, and with what waits before it its answer would take "
                f"about {seconds * 1e3:.0f} ms, too close to it; allow more time, or try again when less is waiting",
            )

    def _take_inline(self, jobs: deque[Job]) -> Batch | None:
        """Take jobs from the left, if the device is free and they are little: computing them at once is the shortest way."""
        if not jobs or sum([job.plan.work for job in jobs]) > self._worker.inline_work:
            return None
        if not self._device.acquire(blocking=False):
            return None
        batch = form_batch(InOrder(jobs), self._batch_limits, self._schedule.small)
        if batch.closed_by is ClosedBy.IDLE:
            batch.closed_by = ClosedBy.INLINE
        return batch

    def expire(self) -> None:
        """Hand back what is late: waiting jobs whose deadline has passed, and running ones that passed it a while ago.

        To be called every now and then, by the thread that outcomes are posted to, so that nobody is answered much later
        than they wait, however long the device takes.
        """
        now = time.monotonic()
        with self._lock:
            overdue = self._waiting.take_overdue(now)
            late: list[tuple[Job, Outcome]] = []
            for run in list(self._begun):
                for job in run.batch.jobs:
                    if job.deadline is not None and now > job.deadline + LATE_SECONDS and not job.is_answered:
                        job.is_answered = self._is_any_late = True
                        late.append((job, DeadlinePassed(LATE)))
        if overdue:
            self._deliver([*overdue])
        hand_back(late)

    def suspend(self, error: Callable[[], RequestError]) -> None:
        """Refuse what comes and hand back what waits, each with an error of its own, until `resume`: in any thread."""
        with self._lock:
            self._suspended = error
            left = self._waiting.take_all()
        self._deliver([(job, error()) for job in left])

    def resume(self) -> None:
        """Take jobs again."""
        with self._lock:
            self._suspended = None

    def _run_inline(self, batch: Batch) -> None:
        try:
            outcomes: list[tuple[Job, Outcome]] = list(batch.dropped)
            if batch.jobs:
                outcomes += self._compute(Run(batch, time.perf_counter_ns(), is_large=False))
        finally:
            self._device.release()
        hand_back(self._release(outcomes))
        with self._lock:
            must_ring = self._is_asleep and (len(self._waiting) > 0 or len(self._left_over) > 0)
            if must_ring:
                self._is_asleep = False
        if must_ring:
            self._doorbell.put(None)

    def _compute(self, run: Run) -> list[tuple[Job, Outcome]]:
        try:
            run.pending = self._worker.submit([job.item for job in run.batch.jobs])
            is_done = not run.pending.advance() and run.pending.is_done()
        except Exception as error:
            return self._failed(run, error)
        if is_done:
            return self._result(run)
        # A worker elsewhere takes longer than it should: its thread may wait for it, and this one may not.
        self._schedule.begin(run.batch.work, is_large=False)
        self._begun.append(run)
        self._left_over.append(run)
        return []

    def close(self, timeout_seconds: float) -> None:
        """Refuse what comes and what waits, let the running batch finish, close the worker and end its thread."""
        with self._lock:
            self._is_stopping = True
            left = self._waiting.take_all()
            must_ring = self._is_asleep
            self._is_asleep = False
        if must_ring:
            self._doorbell.put(None)
        error = Unavailable(
            "this server shut down before it came to this request; try again",
            reason=Reason.DRAINING,
            retry_after_seconds=0.0,
        )
        self._deliver([(job, error) for job in left])
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    # --- the worker's thread ---

    def _run(self) -> None:
        try:
            self._worker.warm_up()
        except Exception as error:
            logger.exception("The worker of %s failed to warm up", self._worker.device)
            self._warm_up_error = error
            return
        finally:
            self._is_warm.set()
        try:
            under_way: list[Run] = []
            while self._begin_batches(under_way) or under_way:
                with self._device:
                    self._go_on(under_way)
        except Exception:
            # A bug of ours. Nothing is computed any more, so the server must not go on as if it were.
            logger.critical("The batcher of %s failed", self._worker.device, exc_info=True)
            self._give_up()
        finally:
            with self._device:
                self._worker.close()

    def _give_up(self) -> None:
        with self._lock:
            self._is_stopping = True
            left = self._waiting.take_all()
        self._deliver([(job, InternalError()) for job in left])
        self._post(self._on_lost)

    def _begin_batches(self, under_way: list[Run]) -> bool:
        """Submit what waits, as far as there are slots. Sleeps where there is nothing to do; False: for ever."""
        while True:
            with self._lock:
                while self._left_over:
                    under_way.append(self._left_over.popleft())
                small = self._waiting.take_small() if len(under_way) < self._worker.slots else None
                has_large = any(run.is_large for run in under_way)
                large = None if has_large or len(under_way) >= self._worker.slots else self._waiting.take_large()
                if small is None and large is None and not under_way:
                    if self._is_stopping:
                        return False
                    self._is_asleep = True
            if small is not None or large is not None or under_way:
                break
            self._doorbell.get()
        with self._device:
            for batch in (small, large):
                if batch is not None:
                    self._begin(batch, under_way, is_large=batch is large)
        return True

    def _begin(self, batch: Batch, under_way: list[Run], *, is_large: bool) -> None:
        self._deliver(list(batch.dropped))
        if not batch.jobs:
            return
        run = Run(batch, time.perf_counter_ns(), is_large)
        self._schedule.begin(batch.work, is_large=is_large)
        self._begun.append(run)
        try:
            run.pending = self._worker.submit([job.item for job in batch.jobs])
        except Exception as error:
            self._fail(run, error)
        else:
            under_way.append(run)

    def _go_on(self, under_way: list[Run]) -> None:
        """Do one piece of what is large, and hand back what is done; wait only where nothing else is to be done."""
        must_wait = True
        for run in sorted(under_way, key=lambda run: run.is_large):  # what is done must not wait for another piece
            try:
                has_more = run.is_large and run.pending.advance()
                if has_more or not run.pending.is_done():
                    must_wait = must_wait and not has_more
                    continue
            except Exception as error:
                self._fail(run, error)
            else:
                self._finish(run)
            under_way.remove(run)
            must_wait = False
        if must_wait and under_way and not (len(under_way) < self._worker.slots and self._waiting):
            self._finish(under_way.pop(0))

    def _finish(self, run: Run) -> None:
        outcomes = self._result(run)
        self._end(run)
        self._deliver(outcomes)

    def _result(self, run: Run) -> list[tuple[Job, Outcome]]:
        try:
            result = run.pending.result()
            outcomes = self._outcomes(run, result)
        except Exception as error:
            return self._failed(run, error)
        busy_ns = time.perf_counter_ns() - run.started_ns
        self._schedule.note(run.batch.work, busy_ns * 1e-9, is_large=run.is_large)
        self._observer.batch_done(run.batch, result, busy_ns)
        if self._worker.is_lost and not self._is_lost:
            self._is_lost = True
            self._post(self._on_lost)
        return outcomes

    def _end(self, run: Run) -> None:
        self._begun.remove(run)
        self._schedule.end(run.batch.work, is_large=run.is_large)

    def _fail(self, run: Run, error: Exception) -> None:
        self._end(run)
        self._deliver(self._failed(run, error))

    def _failed(self, run: Run, error: Exception) -> list[tuple[Job, Outcome]]:
        # A worker answers for its items itself, so this is a bug of its own; the server goes on all the same.
        logger.error("The worker of %s failed %s jobs", self._worker.device, len(run.batch.jobs), exc_info=error)
        return [(job, InternalError()) for job in run.batch.jobs]

    def _outcomes(self, run: Run, result: BatchResult) -> list[tuple[Job, Outcome]]:
        batch = run.batch
        facts = BatchFacts(
            result.pack_ns,
            result.compute_ns,
            result.unpack_ns,
            len(batch.jobs),
            batch.element_count,
            run.number,
            time.perf_counter_ns(),
        )
        return [
            (
                job,
                failure_of(outcome)
                if isinstance(outcome, WorkFailure)
                else Computed(outcome, job.picked_ns - job.queued_ns, facts),
            )
            for job, outcome in zip(batch.jobs, result.outcomes, strict=True)
        ]

    def _deliver(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        if outcomes:
            unanswered = self._release(outcomes)
            self._post(lambda: hand_back(unanswered))

    def _release(self, outcomes: list[tuple[Job, Outcome]]) -> list[tuple[Job, Outcome]]:
        """Count jobs out; return those that `expire` has not answered meanwhile."""
        with self._lock:
            for job, _ in outcomes:
                self._admission.release(job)
            if self._is_any_late:
                outcomes = [(job, outcome) for job, outcome in outcomes if not job.is_answered]
        return outcomes
