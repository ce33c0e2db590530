"""One request's way through the server, the same for every method: check, queue, compute, answer, count.

All of it but the computing runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from lossgrad_api.codec import Buffer
from lossgrad_server.batching.batcher import Batcher, Outcome
from lossgrad_server.batching.job import Computed, Job
from lossgrad_server.errors import InternalError, Reason, RequestError, Unavailable
from lossgrad_server.jobs import JobPlan
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.answers import response_parts, results
from lossgrad_server.transport.checks import RequestChecker
from lossgrad_server.work import WorkItem

logger = logging.getLogger(__name__)

# Joining more than this takes longer than handing it to a thread, and would hold up every other call meanwhile.
JOIN_IN_THREAD_BYTES: Final = 256 * 1024

Answer = Sequence[Buffer] | RequestError


class PendingRequest:
    """A request between its check and its answer, which is the parts of a response message or an error.

    What all protocols share is here; what a computed job looks like on the wire is a subclass's `_encode`.
    """

    __slots__ = ("_api", "_on_answer", "_pipeline", "_started_ns", "job")

    def __init__(
        self,
        pipeline: RequestPipeline,
        plan: JobPlan,
        item: WorkItem,
        *,
        started_ns: int,
        api: str,
        deadline: float | None,
        on_answer: Callable[[Any, Answer], None],
    ) -> None:
        """Make a request of what its check established; `started_ns` is when its bytes were there."""
        self._pipeline = pipeline
        self._api = api
        self._on_answer = on_answer
        self._started_ns = started_ns
        self.job = Job(plan, item, self._done, deadline)
        pipeline.metrics.stage("decode", time.perf_counter_ns() - started_ns)

    def _encode(self, computed: Computed) -> Sequence[Buffer]:
        """Return the parts of the response message. Raises RequestError."""
        raise NotImplementedError

    def _failed(self) -> None:
        """Take note that the answer is an error."""

    def refuse(self, error: RequestError) -> None:
        """Answer with an error instead of queueing."""
        self._done(self.job, error)

    def _done(self, job: Job, outcome: Outcome) -> None:
        answer: Answer
        if not isinstance(outcome, RequestError):
            try:
                answer = self._answer(job, outcome)
            except RequestError as error:
                outcome = error
            except Exception:
                # A bug of ours, such as a worker's outputs that are not the plan's. The caller must learn of it.
                logger.exception("Making an answer failed")
                outcome = InternalError()
        if isinstance(outcome, RequestError):
            self._pipeline.metrics.failed(job.plan, self._api, outcome)
            self._failed()
            answer = outcome
        # The job holds this request through `on_done`, and this request the job: a cycle that would keep every request's
        # bytes until the next full garbage collection.
        job.on_done = _answered
        self._on_answer(self, answer)

    def _answer(self, job: Job, computed: Computed) -> Answer:
        metrics = self._pipeline.metrics
        encode_ns = time.perf_counter_ns()
        answer = self._encode(computed)
        now_ns = time.perf_counter_ns()
        metrics.stage("queue", computed.queue_ns)
        metrics.stage("encode", now_ns - encode_ns)
        seconds = (now_ns - self._started_ns) * 1e-9
        metrics.of_request(job.plan, self._api).done(seconds, job.plan.element_count, computed.result)
        return answer


class PendingComputeLoss(PendingRequest):
    """A ComputeLossRequest, answered with the parts of a ComputeLossResponse."""

    __slots__ = ("idempotency_key",)

    def __init__(
        self,
        pipeline: RequestPipeline,
        data: bytes,
        start: int,
        end: int | None,
        *,
        api: str,
        deadline: float | None,
        on_answer: Callable[[PendingComputeLoss, Answer], None],
    ) -> None:
        started_ns = time.perf_counter_ns()
        plan, item, self.idempotency_key = pipeline.checker.check(data, start, end)
        super().__init__(pipeline, plan, item, started_ns=started_ns, api=api, deadline=deadline, on_answer=on_answer)

    def _encode(self, computed: Computed) -> Sequence[Buffer]:
        device = self._pipeline.metrics.device
        return response_parts(computed, results(self.job, computed), device, self.idempotency_key)


def _answered(job: Job, outcome: Outcome) -> None:
    """Stand in for the `on_done` of a job that has been answered."""
    logger.error("A job was handed back twice")


class RequestPipeline:
    """Takes requests' bytes, and sees to it that each is answered exactly once."""

    def __init__(self, batcher: Batcher, metrics: Metrics, max_message_bytes: int) -> None:
        self.batcher = batcher
        self.metrics = metrics
        self.checker = RequestChecker(max_message_bytes)
        self.is_warm = False  # set once the worker is; requests before that are told to come back
        self._on_drain: set[Callable[[RequestError], None]] = set()
        self._is_draining = False

    def open(
        self,
        data: bytes,
        start: int,
        end: int | None,
        *,
        api: str,
        deadline: float | None,
        on_answer: Callable[[PendingComputeLoss, Answer], None],
    ) -> PendingComputeLoss:
        """Check the ComputeLossRequest `data[start:end]`. Raises RequestError; then nothing is pending."""
        try:
            return PendingComputeLoss(self, data, start, end, api=api, deadline=deadline, on_answer=on_answer)
        except RequestError as error:
            self.metrics.failed(None, api, error)
            raise

    def submit(self, requests: Sequence[PendingRequest]) -> None:
        """Queue opened requests. Those that are refused are answered at once."""
        if not self.is_warm:
            for request in requests:
                request.refuse(_warming_up())
            return
        owners = {request.job: request for request in requests}
        for job, error in self.batcher.submit(list(owners)):
            owners[job].refuse(error)

    def submit_job(self, job: Job) -> RequestError | None:
        """Queue a job; return why it was refused, if it was. Its `on_done` is not called then."""
        if not self.is_warm:
            return _warming_up()
        refused = self.batcher.submit([job])
        return refused[0][1] if refused else None

    @contextmanager
    def draining(self, on_drain: Callable[[RequestError], None]) -> Iterator[None]:
        """Call `on_drain` when the server goes down while the block runs: for calls that would not end by themselves.

        It is given the error to end with. Raises that where the server goes down already.
        """
        if self._is_draining:
            raise _going_down()
        self._on_drain.add(on_drain)
        try:
            yield
        finally:
            self._on_drain.discard(on_drain)

    def drain(self) -> None:
        """End the calls that would not end by themselves, and refuse new ones."""
        self._is_draining = True
        for on_drain in list(self._on_drain):
            on_drain(_going_down())


def _going_down() -> Unavailable:
    return Unavailable(
        "this server is shutting down; go on from the last state, on another one if there is one",
        reason=Reason.DRAINING,
        retry_after_seconds=0.0,
    )


def _warming_up() -> Unavailable:
    return Unavailable(
        "this server is warming up; try again in a moment", reason=Reason.WARMING_UP, retry_after_seconds=0.5
    )


async def joined(parts: Sequence[Buffer], api: str, metrics: Metrics) -> bytes:
    """Return a message's parts as one `bytes`: the one copy on the way out."""
    size = sum(map(len, parts))
    metrics.response_bytes.labels(api).observe(size)
    if size <= JOIN_IN_THREAD_BYTES:
        return b"".join(parts)
    return await asyncio.get_running_loop().run_in_executor(None, b"".join, parts)
