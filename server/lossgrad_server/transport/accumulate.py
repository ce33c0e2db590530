"""AccumulateLoss: slices come in, one at a time is computed, and their exact total goes out. The server keeps nothing.

A session belongs to one call and runs in the event loop's thread. Its reading task receives and checks a slice while the
one before it is computed; an answer that comes back from the queue is counted in and put into the outbox; the writing task
sends it. So inside are at most one slice that is received, one that is computed, and two answers. Beyond that the stream is
not read from, and backpressure reaches the caller through HTTP/2's flow control.

What ends a stream early ends it behind the slice that is being computed: its answer, then the state if it changed, then
the error. So the caller goes on from there, on any server, and nothing that was computed is computed again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation, AccumulationReader, LossTotal, StateError
from lossgrad_api.exact_sums import ExactSum
from lossgrad_server.batching.job import ANYONE, Computed, Origin
from lossgrad_server.errors import InvalidRequest, Reason, RequestError
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
from lossgrad_server.transport.answers import answer_memory, result_fields, result_head
from lossgrad_server.transport.call import Call, Send
from lossgrad_server.transport.checks import malformed
from lossgrad_server.transport.origin import CallOrigin
from lossgrad_server.transport.pipeline import IN_PLACE_BYTES, Answer, PendingRequest, RequestPipeline, joined
from lossgrad_server.work import SPEC_RESULT, WorkItem, WorkResult, unpack_totals

API: Final = "accumulate"

# Answers that may be unsent when the next slice begins to be computed: one is on its way, one waits.
_MAX_UNSENT: Final = 2

# How long the groups of a state are read or written before everybody else has a turn.
_TURN_SECONDS: Final = 0.001

# How long a slice waits for room in a full queue before its stream is ended. It holds its memory meanwhile.
_QUEUE_PATIENCE_SECONDS: Final = 5.0
# Why a slice may be refused that waits for better times.
_PASSING: Final = (Reason.QUEUE_FULL, Reason.QUEUE_BYTES_FULL, Reason.WORKER_RESTARTING)


@dataclass(frozen=True, slots=True)
class _StateToSend:
    """A state as it was when it was put into the outbox."""

    state: Accumulation
    is_total: bool


_Unsent = Sequence[codec.Buffer] | _StateToSend


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
        self._computing: _PendingSlice | None = None  # or about to be
        self._origin: Origin = ANYONE
        self._outbox: deque[_Unsent] = deque()  # the first one is being sent
        self._is_finished = False
        self._error: RequestError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()  # a slice was computed, or an answer sent
        self._has_answers = asyncio.Event()

    async def run(self, messages: AsyncIterator[bytes], call: Call) -> None:
        """Serve the call to its end. Raises RequestError."""
        self._origin = CallOrigin(call)
        try:
            with self._metrics.accumulations.track_inprogress(), self._pipeline.draining(self._drain):
                # Where reading or writing fails, the other must not wait for it.
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write())
                    self._reader = tasks.create_task(self._read(messages, call))
                    await asyncio.wait((self._reader,))
                    await self._until(lambda: self._computing is None)
                    self._close()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            if self._computing is not None:
                self._computing.abandon()
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
            self._put(_StateToSend(self._state.copy(), is_total=True))
        elif self._uncovered:
            self._put(_StateToSend(self._state.copy(), is_total=False))
        self._is_finished = True
        self._has_answers.set()

    def _fail(self, error: RequestError) -> None:
        """End the stream behind the slice that is being computed."""
        self._error = error
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
            self._error = self._error or error

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
            memory=self._pipeline.memory,
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
            self._metrics.failed(None, API, error)
            self._metrics.slices[SliceOutcome.FAILED].inc()
            raise
        if is_held:
            await self._until(lambda: len(self._outbox) < _MAX_UNSENT)
            self._metrics.slices[SliceOutcome.REPEATED].inc()
            self._put(codec.encode_slice_result(part.sequence, ()))
            return
        request = _PendingSlice(self, self._pipeline, part, plan, item, started_ns, call.deadline)
        request.origin = self._origin
        await self._until(lambda: self._computing is None and len(self._outbox) < _MAX_UNSENT)
        self._computing = request
        try:
            await self._offer(request)
        except asyncio.CancelledError:  # it was not queued yet, so it never will be
            self._computing = None
            self._progress.set()
            raise

    async def _offer(self, request: _PendingSlice) -> None:
        """Queue a slice. Where it cannot be taken now it waits: for its caller that is backpressure, and no error yet."""
        patience = time.monotonic() + _QUEUE_PATIENCE_SECONDS
        while (refusal := self._pipeline.offer(request)) is not None:
            if refusal.reason not in _PASSING or time.monotonic() > patience:
                request.done(refusal)
                return
            await asyncio.sleep(refusal.retry_after_seconds or 0.0)

    # ---- Counting ----

    def count(self, request: _PendingSlice, computed: Computed) -> list[codec.Buffer]:
        """Add a computed slice to the state; return the parts of its answer."""
        part, result = request.part, computed.result
        answer = request.encoded(result)
        self._state.add(part.sequence, part.group, request.plan.element_count, _totals(result))
        return answer

    def take_answer(self, request: _PendingSlice, answer: Answer) -> None:
        """Send a slice's answer; or end the stream, where it failed."""
        self._computing = None
        self._progress.set()
        if isinstance(answer, RequestError):
            self._metrics.slices[SliceOutcome.FAILED].inc()
            answer.message = f"slice {request.part.sequence}: {answer.message}"
            self._fail(answer)
            return
        self._metrics.slices[SliceOutcome.COUNTED].inc()
        self._put(answer)
        self._uncovered += 1
        if self._uncovered == self._config.snapshot_every_slices:
            self._put(_StateToSend(self._state.copy(), is_total=False))
            self._uncovered = 0

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
            parts = await _encoded(answer) if isinstance(answer, _StateToSend) else answer
            await self._send(await joined(parts, API, self._metrics))
            self._outbox.popleft()
            self._progress.set()


class _PendingSlice(PendingRequest):
    """A slice on its way through the queue."""

    __slots__ = ("_memory", "_session", "part")

    def __init__(
        self,
        session: AccumulationSession,
        pipeline: RequestPipeline,
        part: codec.SliceView,
        plan: JobPlan,
        item: WorkItem,
        started_ns: int,
        deadline: float | None,
    ) -> None:
        self._memory = answer_memory(item.header) if plan.output_byte_count >= IN_PLACE_BYTES else None
        if self._memory is not None:
            item = WorkItem(item.header, item.operands, (self._memory.data,))
        super().__init__(
            pipeline, plan, item, started_ns=started_ns, api=API, deadline=deadline, on_answer=session.take_answer
        )
        self._session = session
        self.part = part

    def _encode(self, computed: Computed) -> Sequence[codec.Buffer]:
        return self._session.count(self, computed)

    def encoded(self, result: WorkResult) -> list[codec.Buffer]:
        """Return the answer as parts to join; as one part where the worker wrote its tensor in place."""
        header, sequence = self.item.header, self.part.sequence
        if self._memory is not None and result.outputs[0] is self._memory.data:
            head = result_head(header, result)
            outer = codec.slice_result_head(sequence, len(head) + len(self._memory.data))
            message = self._memory.finish(outer + head)
            if message is not None:
                return [message]
        return codec.encode_slice_result(sequence, result_fields(header, result))


async def _encoded(unsent: _StateToSend) -> list[codec.Buffer]:
    """Return a state's message as parts. A group is encoded once for all snapshots in which it is the same."""
    parts: list[bytes] = []
    turn_started = time.perf_counter()
    for part in unsent.state.encoded_parts():
        parts.append(part)
        if time.perf_counter() - turn_started > _TURN_SECONDS:
            await asyncio.sleep(0)
            turn_started = time.perf_counter()
    return codec.encode_state_response(parts, is_total=unsent.is_total)


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
