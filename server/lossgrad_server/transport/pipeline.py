"""One request's way through the server, the same for every method: check, queue, compute, answer, count.

All of it but the computing runs in the event loop's thread. What requests of a message or a batch have in common is done
once for all of them: taking times, counting, encoding the batch's times.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from lossgrad_api.codec import Buffer
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.job import BatchFacts, Job, Outcome
from lossgrad_server.errors import InternalError, Reason, RequestError, Unavailable
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.answers import has_nonfinite, response_parts, stats_bytes
from lossgrad_server.transport.checks import RequestChecker

logger = logging.getLogger(__name__)

# Joining more than this takes longer than handing it to a thread, and would hold up every other call meanwhile.
JOIN_IN_THREAD_BYTES: Final = 256 * 1024

Answer = Sequence[Buffer] | RequestError


class PendingRequest(Job):
    """A request between its check and its answer, which is the parts of a ComputeLossResponse or an error."""

    __slots__ = ("api", "idempotency_key", "on_answer", "started_ns", "tag")

    api: str
    idempotency_key: str
    on_answer: Callable[[PendingRequest, Answer], None]
    started_ns: int
    tag: int  # whatever the receiver of the answer knows it by


class RequestPipeline:
    """Takes requests' bytes, and sees to it that each is answered exactly once."""

    def __init__(self, batcher: Batcher, metrics: Metrics, max_message_bytes: int) -> None:
        self.batcher = batcher
        self.metrics = metrics
        self.checker = RequestChecker(max_message_bytes)
        self.is_warm = False  # set once the worker is; requests before that are told to come back
        self._on_done = self._answer  # the same object for every job: so the batcher hands them back together

    def open(
        self,
        data: bytes,
        start: int,
        end: int | None,
        *,
        api: str,
        deadline: float | None,
        on_answer: Callable[[PendingRequest, Answer], None],
        tag: int = 0,
        started_ns: int = 0,
    ) -> PendingRequest:
        """Check the ComputeLossRequest `data[start:end]`. Raises RequestError; then nothing is pending.

        `started_ns` is when the request came, on perf_counter_ns's clock: now, unless it is given.
        """
        started_ns = started_ns or time.perf_counter_ns()
        try:
            plan, item, idempotency_key = self.checker.check(data, start, end)
        except RequestError as error:
            self.metrics.failed(None, api, error)
            raise
        request = PendingRequest(plan, item, self._on_done, deadline)
        request.api = api
        request.idempotency_key = idempotency_key
        request.on_answer = on_answer
        request.started_ns = started_ns
        request.tag = tag
        return request

    def submit(self, requests: Sequence[PendingRequest]) -> None:
        """Queue opened requests that came together. Those that are refused are answered at once."""
        if not requests:
            return
        count = len(requests)
        self.metrics.stage("decode", (time.perf_counter_ns() - requests[0].started_ns) / count, count)
        if self.is_warm:
            refused = self.batcher.submit(requests)
        else:
            refused = [
                (
                    request,
                    Unavailable(
                        "this server is warming up; try again in a moment",
                        reason=Reason.WARMING_UP,
                        retry_after_seconds=0.5,
                    ),
                )
                for request in requests
            ]
        if refused:
            self._answer(cast(list[tuple[Job, Outcome]], refused))

    def _answer(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        """Answer requests that the batcher hands back, or did not take."""
        begun_ns = time.perf_counter_ns()
        answers: list[tuple[PendingRequest, Answer]] = []
        counts = _Counts()
        facts: BatchFacts | None = None
        queue_ns = -1
        stats = b""
        for job, outcome in outcomes:
            request = cast(PendingRequest, job)
            answer: Answer
            try:
                if isinstance(outcome, RequestError):
                    answer = outcome
                else:
                    if outcome.batch is not facts or outcome.queue_ns != queue_ns:
                        facts, queue_ns = outcome.batch, outcome.queue_ns
                        stats = stats_bytes(outcome, self.metrics.device)
                    answer = response_parts(request.item.header, outcome, stats, request.idempotency_key)
                    counts.add(request, queue_ns, has_nonfinite(outcome))
            except Exception:
                # A bug of ours, such as a worker's outputs that are not the plan's. The caller must learn of it.
                logger.exception("Making an answer failed")
                answer = InternalError()
            if isinstance(answer, RequestError):
                self.metrics.failed(request.plan, request.api, answer)
            answers.append((request, answer))
        counts.write(self.metrics, begun_ns)
        for request, answer in answers:
            try:
                request.on_answer(request, answer)
            except Exception:  # one caller's trouble must not cost the others their answers
                logger.exception("Handing over an answer failed")


class _Alike:
    """Requests of one message that were answered together: equal in all that metrics tell apart."""

    __slots__ = ("count", "nonfinite", "queue_ns", "request")

    def __init__(self, request: PendingRequest, queue_ns: int) -> None:
        self.request = request
        self.queue_ns = queue_ns
        self.count = 0
        self.nonfinite = 0


class _Counts:
    """Counts answered requests: those that are alike and follow one another, as one message's do, all at once."""

    def __init__(self) -> None:
        self._found: list[_Alike] = []

    def add(self, request: PendingRequest, queue_ns: int, is_nonfinite: bool) -> None:
        """Count a request that was computed."""
        if self._found:
            alike = self._found[-1]
            other = alike.request
            if (
                other.plan is request.plan
                and other.started_ns == request.started_ns
                and other.api == request.api
                and alike.queue_ns == queue_ns
            ):
                alike.count += 1
                alike.nonfinite += is_nonfinite
                return
        alike = _Alike(request, queue_ns)
        alike.count = 1
        alike.nonfinite = int(is_nonfinite)
        self._found.append(alike)

    def write(self, metrics: Metrics, begun_ns: int) -> None:
        """Write to the metrics; the answers have been encoded since `begun_ns`."""
        total = sum([alike.count for alike in self._found])
        if not total:
            return
        now_ns = time.perf_counter_ns()
        metrics.stage("encode", (now_ns - begun_ns) / total, total)
        for alike in self._found:
            request = alike.request
            metrics.stage("queue", alike.queue_ns, alike.count)
            metrics.of_request(request.plan, request.api).done(
                (now_ns - request.started_ns) * 1e-9, request.plan.element_count, alike.count, alike.nonfinite
            )


async def joined(parts: Sequence[Buffer], api: str, metrics: Metrics) -> bytes:
    """Return a message's parts as one `bytes`: the one copy on the way out."""
    if len(parts) == 1 and isinstance(parts[0], bytes):
        metrics.response_bytes.labels(api).observe(len(parts[0]))
        return parts[0]
    size = sum(map(len, parts))
    metrics.response_bytes.labels(api).observe(size)
    if size <= JOIN_IN_THREAD_BYTES:
        return b"".join(parts)
    return await asyncio.get_running_loop().run_in_executor(None, b"".join, parts)
