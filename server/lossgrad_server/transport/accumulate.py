"""AccumulateLoss: slices come in, one at a time is computed, and their exact total goes out. The server keeps nothing.

A session belongs to one call and runs in the event loop's thread, in three places: the reading task receives and checks a
slice while the one before it is computed; `_on_done` counts a computed slice in and puts its answer into the outbox; the
writing task sends. So inside are at most one slice that is received, one that is computed, and two answers. Beyond that
the stream is not read from, and backpressure reaches the caller through HTTP/2's flow control.

What ends a stream early ends it behind the slice that is being computed: its answer, then the state if it changed, then
the error. So the caller goes on from there, on any server, and nothing that was computed is computed again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation, AccumulationReader, LossTotal, StateError
from lossgrad_api.exact_sums import ExactSum
from lossgrad_server.batching.job import Computed, Job
from lossgrad_server.errors import InternalError, InvalidRequest, Reason, RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.metrics import SliceOutcome
from lossgrad_server.transport.accumulate_checks import (
    CheckedConfig,
    GroupChecker,
    SliceChecker,
    bad_state,
    check_config,
    check_losses,
)
from lossgrad_server.transport.answers import results
from lossgrad_server.transport.call import Call, Send
from lossgrad_server.transport.checks import malformed
from lossgrad_server.transport.pipeline import RequestPipeline, joined
from lossgrad_server.work import SPEC_RESULT, WorkItem, WorkResult, unpack_totals

logger = logging.getLogger(__name__)

API: Final = "accumulate"

# Answers that may be unsent when the next slice begins to be computed: one is on its way, one waits.
_MAX_UNSENT: Final = 2

# How long the groups of a state are read or written before everybody else has a turn.
_TURN_SECONDS: Final = 0.001

# How long a slice waits for room in a full queue before its stream is ended. It holds its memory meanwhile.
_QUEUE_PATIENCE_SECONDS: Final = 5.0

_Unsent = list[codec.Buffer] | tuple[Accumulation, bool]  # a slice's answer; or a state, and whether it is the total


class AccumulationSession:
    """One AccumulateLoss call."""

    def __init__(self, pipeline: RequestPipeline, send: Send, *, max_groups: int, max_message_bytes: int) -> None:
        self._pipeline = pipeline
        self._metrics = pipeline.metrics
        self._send = send
        self._max_groups = max_groups
        self._max_message_bytes = max_message_bytes
        self._config: CheckedConfig  # these four are set by `_open`
        self._state: Accumulation
        self._slices: SliceChecker
        self._groups: GroupChecker
        self._is_open = False
        self._uncovered = 0  # slices that were counted since the last state was sent
        self._computing: _SliceJob | None = None
        self._outbox: deque[_Unsent] = deque()  # the first one is being sent
        self._is_finished = False
        self._error: RequestError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()  # a slice was computed, or an answer sent
        self._has_answers = asyncio.Event()

    async def run(self, messages: AsyncIterator[bytes], call: Call) -> None:
        """Serve the call to its end. Raises RequestError."""
        try:
            with self._metrics.accumulations.track_inprogress(), self._pipeline.draining(self._drain):
                async with (
                    asyncio.TaskGroup() as tasks
                ):  # where reading or writing fails, the other must not wait for it
                    tasks.create_task(self._write())
                    self._reader = tasks.create_task(self._read(messages, call))
                    await asyncio.wait((self._reader,))
                    await self._until(lambda: self._computing is None)
                    self._close()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            if self._computing is not None:
                self._computing.cancelled = True
        if self._error is not None:
            raise self._error

    def _close(self) -> None:
        """Put what comes last: the total, or where the stream ends early what is not covered by a snapshot yet."""
        if self._error is None:
            try:
                self._slices.check_end()
            except RequestError as error:
                self._error = error
        if self._error is None:
            self._put((self._state.copy(), True))
        elif self._uncovered:
            self._put((self._state.copy(), False))
        self._is_finished = True
        self._has_answers.set()

    def _fail(self, error: RequestError) -> None:
        """End the stream behind the slice that is being computed."""
        self._error = self._error or error
        assert self._reader is not None  # noqa: S101 - for the type checker
        self._reader.cancel()

    def _drain(self, error: RequestError) -> None:
        """End the stream because the server goes down, unless it ends by itself."""
        if self._reader is not None and not self._reader.done():
            self._fail(error)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress.clear()
            await self._progress.wait()

    # ---- Reading ----

    async def _read(self, messages: AsyncIterator[bytes], call: Call) -> None:
        try:
            async for message in messages:
                self._metrics.request_bytes.labels(API).observe(len(message))
                started_ns = time.perf_counter_ns()
                try:
                    part = codec.split_accumulate_request(message)
                except codec.CodecError as error:
                    raise malformed(error) from None
                if not self._is_open:
                    await self._open(part)
                elif isinstance(part, codec.SliceView):
                    await self._take(part, call, started_ns)
                else:
                    what = "has no part" if part is None else "is a second config"
                    raise InvalidRequest(
                        f"the message {what}; send one config, and then slices",
                        reason=Reason.UNEXPECTED_PART,
                        field="slice",
                    )
            if not self._is_open:
                raise InvalidRequest(
                    "the stream ended before its config; send one first", reason=Reason.UNEXPECTED_PART, field="config"
                )
        except RequestError as error:
            self._error = error

    async def _open(self, part: codec.ConfigView | codec.SliceView | None) -> None:
        if not isinstance(part, codec.ConfigView):
            what = "has no part" if part is None else f"is slice {part.sequence}"
            raise InvalidRequest(
                f"the first message {what}; send the config first", reason=Reason.UNEXPECTED_PART, field="config"
            )
        config = check_config(part.config)
        self._state = Accumulation(config.losses)
        if part.resume_from is not None and part.resume_from[1] < part.resume_from[2]:
            self._state = await self._read_state(*part.resume_from)
            check_losses(config, self._state.losses)
        self._slices = SliceChecker(
            config,
            last_sequence=self._state.last_sequence,
            element_count=self._state.element_count,
            max_message_bytes=self._max_message_bytes,
        )
        self._groups = GroupChecker(
            list(self._state.groups),
            len(config.losses),
            max_groups=self._max_groups,
            max_message_bytes=self._max_message_bytes,
        )
        self._config = config
        self._is_open = True

    async def _read_state(self, data: bytes, start: int, end: int) -> Accumulation:
        reader = AccumulationReader(data, start, end, max_groups=self._max_groups)
        turn_started = time.perf_counter()
        try:
            for _ in reader.read():
                if time.perf_counter() - turn_started > _TURN_SECONDS:
                    await asyncio.sleep(0)
                    turn_started = time.perf_counter()
            return reader.state()
        except StateError as error:
            raise bad_state(error) from None

    async def _take(self, part: codec.SliceView, call: Call, started_ns: int) -> None:
        try:
            is_held = self._slices.is_held(part)
            if not is_held:
                self._groups.check(part)
                plan, item = self._slices.check(part)
        except RequestError as error:
            self._count_failed(None, error)
            raise
        if is_held:
            await self._until(lambda: len(self._outbox) < _MAX_UNSENT)
            self._metrics.slices[SliceOutcome.REPEATED].inc()
            self._put(codec.encode_slice_result(part.sequence, ()))
            return
        self._metrics.stage("decode", time.perf_counter_ns() - started_ns)
        await self._until(lambda: self._computing is None and len(self._outbox) < _MAX_UNSENT)
        patience = time.monotonic() + _QUEUE_PATIENCE_SECONDS
        while (
            refusal := self._submit(_SliceJob(part, plan, item, self._on_done, call.deadline, started_ns))
        ) is not None:
            is_full = refusal.reason in (Reason.QUEUE_FULL, Reason.QUEUE_BYTES_FULL)
            if not is_full or time.monotonic() > patience:
                self._count_failed(plan, refusal)
                raise refusal
            # One slice waits here, and nothing is read meanwhile: for its caller that is backpressure, not an error.
            await asyncio.sleep(refusal.retry_after_seconds or 0.0)

    def _count_failed(self, plan: JobPlan | None, error: RequestError) -> None:
        self._metrics.failed(plan, API, error)
        self._metrics.slices[SliceOutcome.FAILED].inc()

    def _submit(self, job: _SliceJob) -> RequestError | None:
        self._computing = job
        error = self._pipeline.submit_job(job)
        if error is not None:
            self._computing = None
        return error

    # ---- Counting ----

    def _on_done(self, job: Job, outcome: Computed | RequestError) -> None:
        assert isinstance(job, _SliceJob)  # noqa: S101 - for the type checker
        self._computing = None
        self._progress.set()
        if not isinstance(outcome, RequestError):
            try:
                self._count(job, outcome)
                return
            except Exception:
                # A bug of ours, such as a worker without totals. The caller must learn of it.
                logger.exception("Counting slice %d failed", job.part.sequence)
                outcome = InternalError()
        self._count_failed(job.plan, outcome)
        outcome.message = f"slice {job.part.sequence}: {outcome.message}"
        self._fail(outcome)

    def _count(self, job: _SliceJob, computed: Computed) -> None:
        begun_ns = time.perf_counter_ns()
        part = job.part
        answer = codec.encode_slice_result(part.sequence, results(job, computed))
        self._state.add(part.sequence, part.group, job.plan.element_count, _totals(computed.result))
        self._put(answer)
        self._uncovered += 1
        if self._uncovered == self._config.snapshot_every_slices:
            self._put((self._state.copy(), False))
            self._uncovered = 0
        now_ns = time.perf_counter_ns()
        metrics = self._metrics
        metrics.slices[SliceOutcome.COUNTED].inc()
        metrics.stage("queue", computed.queue_ns)
        metrics.stage("encode", now_ns - begun_ns)
        seconds = (now_ns - job.started_ns) * 1e-9
        metrics.of_request(job.plan, API).done(seconds, job.plan.element_count, computed.result)

    # ---- Writing ----

    def _put(self, answer: _Unsent) -> None:
        self._outbox.append(answer)
        self._has_answers.set()

    async def _write(self) -> None:
        while True:
            if not self._outbox:
                if self._is_finished:
                    return
                self._has_answers.clear()
                await self._has_answers.wait()
                continue
            answer = self._outbox[0]
            parts = answer if isinstance(answer, list) else await _encoded(*answer)
            await self._send(await joined(parts, API, self._metrics))
            self._outbox.popleft()
            self._progress.set()


class _SliceJob(Job):
    """A slice on its way through the queue."""

    __slots__ = ("part", "started_ns")

    def __init__(
        self,
        part: codec.SliceView,
        plan: JobPlan,
        item: WorkItem,
        on_done: Callable[[Job, Computed | RequestError], None],
        deadline: float | None,
        started_ns: int,
    ) -> None:
        super().__init__(plan, item, on_done, deadline)
        self.part = part
        self.started_ns = started_ns


async def _encoded(state: Accumulation, is_total: bool) -> list[codec.Buffer]:
    """Return a state's message as parts. A group is encoded once for all snapshots in which it is the same."""
    parts: list[bytes] = []
    turn_started = time.perf_counter()
    for part in state.encoded_parts():
        parts.append(part)
        if time.perf_counter() - turn_started > _TURN_SECONDS:
            await asyncio.sleep(0)
            turn_started = time.perf_counter()
    return codec.encode_state_response(parts, is_total=is_total)


def _totals(result: WorkResult) -> list[LossTotal]:
    """Return a slice's total of each loss."""
    totals: list[LossTotal] = []
    weights: tuple[float, ...] = ()
    weight_sum = ExactSum()
    for total, (_, element_count, _, nonfinite_count) in zip(
        unpack_totals(result.totals), SPEC_RESULT.iter_unpack(result.scalars), strict=True
    ):
        if total.weight_partials != weights:  # they are the same for all losses
            weights = total.weight_partials
            weight_sum = ExactSum(weights)
        totals.append(
            LossTotal(
                ExactSum(total.partials),
                weight_sum,
                element_count,
                nonfinite_count,
                total.minimum + 0.0,
                total.maximum + 0.0,
            )
        )
    return totals
