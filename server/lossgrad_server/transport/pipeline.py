"""One request's way through the server, the same for every method: check, queue, compute, answer, count.

All of it but the computing runs in the event loop's thread. What the requests of a message or a batch have in common is
done once for all of them: taking times, counting, encoding the batch's times.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from lossgrad_api.codec import Buffer
from lossgrad_api.raw_bytes import join_without_gil
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.job import BatchFacts, Computed, Job, Outcome
from lossgrad_server.errors import Code, InternalError, Reason, RequestError, Unavailable
from lossgrad_server.jobs import JobPlan
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.alike import count_alike
from lossgrad_server.transport.answer_memory import AnswerMemory
from lossgrad_server.transport.answers import (
    HasNan,
    answer_memory,
    has_nonfinite,
    nonfinite_kind,
    response_head,
    response_parts,
    stats_bytes,
)
from lossgrad_server.transport.call import is_late
from lossgrad_server.transport.checks import RequestChecker
from lossgrad_server.transport.origin import CallOrigin
from lossgrad_server.transport.shared_tensors import Placing, SharedMemoryParts, copy, misplaced
from lossgrad_server.transport.status import log_internal, new_request_id
from lossgrad_server.transport.transfers import Unsent
from lossgrad_server.work import WorkItem

if TYPE_CHECKING:
    from lossgrad_server.tracing import RequestSpan, Tracer

logger = logging.getLogger(__name__)

# Joining more than this takes longer than handing it to a thread, and would hold up every other call meanwhile.
JOIN_IN_THREAD_BYTES: Final = 256 * 1024

# Answers from this size on are computed in the bytes that are sent, if they hold one tensor. Below it joining costs less.
IN_PLACE_BYTES: Final = 64 * 1024

Answer = Sequence[Buffer] | RequestError


class PendingRequest(Job):
    """A request between its check and its answer, which is the parts of a response message or an error.

    What all protocols share is here; what a computed job looks like on the wire is a subclass's `_encode`.
    """

    __slots__ = ("_on_answer", "_pipeline", "_span", "_started_ns", "api")
    _is_sent_later = False  # whether somebody calls `sent` when the answer is handed over

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
        super().__init__(plan, item, pipeline.on_done, deadline)
        self._pipeline = pipeline
        self.api = api
        self._on_answer = on_answer
        self._started_ns = started_ns

    @property
    def started_ns(self) -> int:
        """When its bytes were there, on perf_counter_ns's clock."""
        return self._started_ns

    @property
    def own_id(self) -> str:
        """The caller's name for it, "" without."""
        return ""

    def abandon(self) -> None:
        """Take note that the call has ended before its answer. If that is its deadline's doing, it counts as late."""
        if is_late(self.deadline):
            self.deadline = time.monotonic()
        self.cancelled = True

    def _encode(self, computed: Computed) -> Sequence[Buffer]:
        """Return the parts of the response message. Raises RequestError."""
        raise NotImplementedError

    def _placing(self, computed: Computed) -> Placing | None:
        """Return what copies outputs to where they are wanted, before there is an answer; None where nothing does."""
        return None

    def _failed(self, error: RequestError) -> None:
        """Take note that the answer is an error."""

    def done(self, outcome: Outcome) -> None:
        """Answer the request, once its outputs are where they are wanted. Called once."""
        placing = None if isinstance(outcome, RequestError) else self._placing(outcome)
        if isinstance(outcome, RequestError) or placing is None:
            self._finish(outcome)
            return
        byte_count, place, executor = placing
        if executor is None and byte_count <= JOIN_IN_THREAD_BYTES:
            self._finish(_placed(place, outcome))
            return
        copying = asyncio.get_running_loop().run_in_executor(executor, _placed, place, outcome)
        copying.add_done_callback(lambda done: self._finish(done.result()))

    def sent(self) -> None:
        """Take note that the answer was handed over. To be called only where requests are traced."""
        if self._span is not None:
            self._span.sent()

    def _finish(self, outcome: Outcome) -> None:
        answer: Answer
        tracer = self._pipeline.tracer
        begun_ns = 0 if tracer is None else time.perf_counter_ns()
        if not isinstance(outcome, RequestError):
            try:
                self._pipeline.look(self, outcome)
                answer = self._encode(outcome)
                self._pipeline.count(self, outcome)
            except RequestError as error:
                outcome = error
            except Exception:
                # A bug of ours, such as a worker's outputs that are not the plan's. The caller must learn of it.
                logger.exception("Making an answer failed")
                outcome = InternalError()
        if isinstance(outcome, RequestError):
            outcome.request_id = outcome.request_id or self.own_id or new_request_id()
            self._pipeline.metrics.failed(self.plan, self.api, outcome)
            self._failed(outcome)
            answer = outcome
        self._span = None if tracer is None else self._traced(tracer, outcome, begun_ns)
        if isinstance(outcome, RequestError) and outcome.code is Code.INTERNAL:
            log_internal(outcome, self.origin.caller, None if self._span is None else self._span.trace_id)
        self._on_answer(self, answer)
        if tracer is not None and (answer is outcome or not self._is_sent_later):
            self.sent()

    def _traced(self, tracer: Tracer, outcome: Outcome, begun_ns: int) -> RequestSpan | None:
        origin = self.origin
        if not isinstance(origin, CallOrigin):
            return None
        span = tracer.answered(self, outcome, call=origin.call, own=origin.trace, encoded_from_ns=begun_ns)
        if span is not None and not isinstance(outcome, RequestError):
            seconds = (time.perf_counter_ns() - self._started_ns) * 1e-9
            self._pipeline.metrics.traced(self.plan, self.api, seconds, outcome, span.trace_id)
        return span


class PendingComputeLoss(PendingRequest):
    """A ComputeLossRequest, answered with the parts of a ComputeLossResponse."""

    __slots__ = ("_is_placed", "_memory", "idempotency_key", "tag")
    _is_sent_later = True

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
        started_ns: int,
        tag: int,
    ) -> None:
        """Check `data[start:end]`. Raises RequestError. `tag` is for whoever takes the answer."""
        plan, item, self.idempotency_key = pipeline.checker.check(data, start, end)
        self.tag = tag
        # Where the caller wants the tensors, in memory that it shares with the server; otherwise they are in the answer.
        self._is_placed = bool(item.destinations)
        self._memory: AnswerMemory | None = None
        if plan.output_byte_count >= IN_PLACE_BYTES and not self._is_placed and not plan.wants_totals:
            self._memory = answer_memory(item.header)
            if self._memory is not None:
                item = WorkItem(item.header, item.operands, (self._memory.data,))
        super().__init__(pipeline, plan, item, started_ns=started_ns, api=api, deadline=deadline, on_answer=on_answer)

    @property
    def own_id(self) -> str:
        """The idempotency key."""
        return self.idempotency_key

    def _placing(self, computed: Computed) -> Placing | None:
        if not self._is_placed:
            return None
        copies = misplaced(self.item, computed.result)
        return Placing(sum(len(output) for output, _ in copies), partial(copy, copies))

    def _encode(self, computed: Computed) -> Sequence[Buffer]:
        header, stats, key = self.item.header, self._pipeline.stats_of(computed), self.idempotency_key
        if self._memory is not None and computed.result.outputs[0] is self._memory.data:
            message = self._memory.finish(response_head(header, computed, stats, key))
            if message is not None:
                return [message]
        return response_parts(header, computed, stats, key, is_placed=self._is_placed)


def _placed(place: Callable[[], None], computed: Computed) -> Outcome:
    """Copy outputs to where they are wanted; return what became of the job."""
    try:
        place()
    except RequestError as error:
        return error
    except Exception:
        logger.exception("Copying outputs failed")
        return InternalError()
    return computed


class RequestPipeline:
    """Takes requests' bytes, and sees to it that each is answered exactly once."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        max_message_bytes: int,
        memory: SharedMemoryParts | None = None,
        unsent: Unsent | None = None,
        tracer: Tracer | None = None,
        *,
        has_nan: HasNan,
    ) -> None:
        """`memory` is what the server shares with its callers, if it shares any; `unsent` counts what they do not read.

        `tracer` makes the requests' spans, if any are wanted. `has_nan` is the engine's.
        """
        self._has_nan = has_nan
        self.tracer = tracer
        self.batcher = batcher
        self.metrics = metrics
        self.memory = memory
        self.checker = RequestChecker(max_message_bytes, memory)
        self.unsent = unsent or Unsent(max_message_bytes)
        self.is_warm = False  # set once the worker is; requests before that are told to come back
        self._on_drain: set[Callable[[RequestError], None]] = set()
        self._is_draining = False
        self.on_done = self._done  # the same object for every request: so the batcher hands them back together
        # What ends the reading of each stream: a server that drains must not wait for callers who keep one open.
        self.end_reading: set[Callable[[], object]] = set()
        self._answered: list[tuple[PendingRequest, Computed]] = []  # and not yet counted
        self._is_answering = False
        # The last batch's stats, for requests that waited this long.
        self._stats: tuple[BatchFacts | None, int, bytes] = (None, 0, b"")

    def open(
        self,
        data: bytes,
        start: int,
        end: int | None,
        *,
        api: str,
        deadline: float | None,
        on_answer: Callable[[PendingComputeLoss, Answer], None],
        started_ns: int = 0,
        tag: int = 0,
    ) -> PendingComputeLoss:
        """Check the ComputeLossRequest `data[start:end]`. Raises RequestError; then nothing is pending.

        `started_ns` is when its bytes were there, on perf_counter_ns's clock: now, unless it is given. `tag` is for whoever
        takes the answer.
        """
        try:
            return PendingComputeLoss(
                self,
                data,
                start,
                end,
                api=api,
                deadline=deadline,
                on_answer=on_answer,
                started_ns=started_ns or time.perf_counter_ns(),
                tag=tag,
            )
        except RequestError as error:
            self.metrics.failed(None, api, error)
            raise

    def submit(self, requests: Sequence[PendingRequest]) -> None:
        """Queue opened requests whose bytes came together. Those that are refused are answered at once."""
        if not requests:
            return
        if self.is_warm:
            for job, error in self.batcher.submit(requests):
                cast(PendingRequest, job).done(error)
            return
        for request in requests:
            request.done(_warming_up())

    def offer(self, request: PendingRequest) -> RequestError | None:
        """Queue an opened request. Return why it is refused, if it is: it may be offered again, or be told so by `done`."""
        if not self.is_warm:
            return _warming_up()
        for _, error in self.batcher.submit([request]):
            return error
        return None

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

    def end_streams(self) -> None:
        """Let every stream end once it has answered what it has taken."""
        for end in list(self.end_reading):
            end()

    def stats_of(self, computed: Computed) -> bytes:
        """Return the ComputeStats of an answer, encoded."""
        facts, queue_ns, stats = self._stats
        if computed.batch is not facts or computed.queue_ns != queue_ns:
            stats = stats_bytes(computed, self.metrics.device)
            self._stats = computed.batch, computed.queue_ns, stats
        return stats

    def look(self, request: PendingRequest, computed: Computed) -> None:
        """Count a request whose losses are not all finite. Before it is answered: its outputs may go with the answer."""
        if has_nonfinite(computed):
            kind = nonfinite_kind(request.plan, computed.result, self._has_nan)
            self.metrics.of_request(request.plan, request.api).nonfinite(kind)

    def count(self, request: PendingRequest, computed: Computed) -> None:
        """Count a request that is answered with numbers; those of one message that come one after another, together."""
        self._answered.append((request, computed))
        if not self._is_answering:
            self._count_all()

    def _done(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        self._is_answering = True
        for job, outcome in outcomes:
            try:
                cast(PendingRequest, job).done(outcome)
            except Exception:  # one caller's trouble must not cost the others their answers
                logger.exception("Handing over an answer failed")
        self._is_answering = False
        self._count_all()

    def _count_all(self) -> None:
        """Write what was counted since the last time."""
        answered, self._answered = self._answered, []
        now_ns = time.perf_counter_ns()
        # All of a message's requests with one plan that were in one batch are alike: one look at each, and no more.
        first: tuple[PendingRequest, Computed] | None = None
        plan = batch = None
        started_ns = times = 0
        for one in answered:
            request, computed = one
            if request.plan is not plan or computed.batch is not batch or request._started_ns != started_ns:
                if first is not None:
                    count_alike(self.metrics, *first, now_ns, times)
                first, plan, batch, started_ns = one, request.plan, computed.batch, request.started_ns
                times = 0
            times += 1
        if first is not None:
            count_alike(self.metrics, *first, now_ns, times)


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
    if len(parts) == 1 and isinstance(parts[0], bytes):
        metrics.response_bytes.labels(api).observe(len(parts[0]))
        return parts[0]
    size = sum(map(len, parts))
    metrics.response_bytes.labels(api).observe(size)
    if size <= JOIN_IN_THREAD_BYTES:
        return b"".join(parts)
    return await asyncio.get_running_loop().run_in_executor(None, join_without_gil, parts)
