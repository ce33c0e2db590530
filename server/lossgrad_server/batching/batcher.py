"""The batcher: takes jobs from the transport, gives batches to one device's worker, hands outcomes back.

Threads. `submit` is called from any thread (in practice the event loop's). One thread of the batcher's own owns the
worker: it warms it up, runs every batch and closes it. The queue and admission are shared under `_lock`, held for
microseconds and never while the worker runs. Outcomes leave through `post`, once per batch, so that the transport's
thread is woken once however many jobs a batch held. While the worker computes, the next batch gathers by itself.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from lossgrad_server.batching.admission import Admission, AdmissionLimits
from lossgrad_server.batching.forming import Batch, BatchLimits, form_batch
from lossgrad_server.batching.job import Computed, Job
from lossgrad_server.errors import Code, InternalError, Reason, RequestError, TooLarge, Unavailable
from lossgrad_server.work import BatchResult, DeviceWorker, FailureKind, WorkFailure

logger = logging.getLogger(__name__)

Outcome = Computed | RequestError


class BatchObserver(Protocol):
    """What watches the batcher: metrics.py. Called from the batcher's thread, once per batch."""

    def batch_done(self, batch: Batch, result: BatchResult, busy_ns: int) -> None:
        """Take note of a batch that ran; the device was busy with it for `busy_ns`."""


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
    ) -> None:
        self._worker = worker
        self._batch_limits = batch_limits
        self._admission = Admission(admission_limits)
        self._post = post
        self._observer = observer
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        # Rung only when the worker's thread sleeps: a put and a wake-up cost 40 us, a look at a flag nothing.
        self._doorbell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = False
        self._is_stopping = False
        self._is_warm = threading.Event()
        self._warm_up_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"lossgrad-{worker.device}", daemon=True)

    @property
    def waiting_requests(self) -> int:
        """How many jobs wait to be picked."""
        return len(self._waiting)

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

    @property
    def waiting_bytes(self) -> int:
        """The bytes of tensor data of the jobs that wait. A snapshot for metrics; walks the queue."""
        with self._lock:
            return sum(job.byte_count for job in self._waiting)

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
            for job in jobs:
                try:
                    if self._is_stopping:
                        raise Unavailable(
                            "this server is shutting down; try again, on another one if there is one",
                            reason=Reason.DRAINING,
                            retry_after_seconds=0.0,
                        )
                    self._admission.admit(job)
                except RequestError as error:
                    refused.append((job, error))
                else:
                    job.queued_ns = now_ns
                    self._waiting.append(job)
            must_ring = self._is_asleep and bool(self._waiting)
            if must_ring:
                self._is_asleep = False
        if must_ring:
            self._doorbell.put(None)
        return refused

    def close(self, timeout_seconds: float) -> None:
        """Refuse what comes and what waits, let the running batch finish, close the worker and end its thread."""
        with self._lock:
            self._is_stopping = True
            left = list(self._waiting)
            self._waiting.clear()
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
            while (batch := self._next_batch()) is not None:
                self._run_batch(batch)
        finally:
            self._worker.close()

    def _next_batch(self) -> Batch | None:
        while True:
            with self._lock:
                if self._waiting:
                    return form_batch(self._waiting, self._batch_limits)
                if self._is_stopping:
                    return None
                self._is_asleep = True
            self._doorbell.get()

    def _run_batch(self, batch: Batch) -> None:
        outcomes: list[tuple[Job, Outcome]] = list(batch.dropped)
        if batch.jobs:
            started_ns = time.perf_counter_ns()
            try:
                result = self._worker.run([job.item for job in batch.jobs])
                computed = self._outcomes(batch, result)
            except Exception:
                # A worker answers for its items itself, so this is a bug of its own; the server goes on all the same.
                logger.exception("The worker of %s failed a batch of %s", self._worker.device, len(batch.jobs))
                outcomes += [(job, InternalError()) for job in batch.jobs]
            else:
                outcomes += computed
                self._observer.batch_done(batch, result, time.perf_counter_ns() - started_ns)
        self._deliver(outcomes)

    def _outcomes(self, batch: Batch, result: BatchResult) -> list[tuple[Job, Outcome]]:
        outcomes: list[tuple[Job, Outcome]] = []
        for job, outcome in zip(batch.jobs, result.outcomes, strict=True):
            if isinstance(outcome, WorkFailure):
                outcomes.append((job, _failure(outcome)))
            else:
                computed = Computed(
                    result=outcome,
                    queue_ns=job.picked_ns - job.queued_ns,
                    pack_ns=result.pack_ns,
                    compute_ns=result.compute_ns,
                    unpack_ns=result.unpack_ns,
                    batch_request_count=len(batch.jobs),
                    batch_element_count=batch.element_count,
                )
                outcomes.append((job, computed))
        return outcomes

    def _deliver(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        if not outcomes:
            return
        with self._lock:
            for job, _ in outcomes:
                self._admission.release(job)

        def hand_back() -> None:
            for job, outcome in outcomes:
                try:
                    job.on_done(job, outcome)
                except Exception:  # one caller's trouble must not cost the others their answers
                    logger.exception("Handing back a job failed")

        self._post(hand_back)


def _failure(failure: WorkFailure) -> RequestError:
    if failure.kind == FailureKind.OUT_OF_MEMORY:
        return TooLarge(failure.message, reason=Reason.OUT_OF_DEVICE_MEMORY)
    if failure.kind == FailureKind.DEVICE_LOST:
        return RequestError(
            failure.message, code=Code.UNAVAILABLE, reason=Reason.DEVICE_FAILED, retry_after_seconds=1.0
        )
    return InternalError()
