"""One ModelInferRequest's way: bytes to a job, the job's result to the parts of a ModelInferResponse.

All of it runs in the event loop's thread, save counting the rows of a large mask. Requests join the same queue, and the
same batches, as those of the native service.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Final

from lossgrad_api.wire import Buffer, CodecError, HeaderTooLarge
from lossgrad_server.batching.job import Computed, Outcome
from lossgrad_server.errors import Cancelled, InvalidRequest, Reason, RequestError
from lossgrad_server.transport.call import Call
from lossgrad_server.transport.open_inference.codec import (
    InferRequestView,
    KnownInferRequests,
    Span,
    split_infer_request,
)
from lossgrad_server.transport.open_inference.models import LOSS, find_model
from lossgrad_server.transport.open_inference.numbers import pack_number
from lossgrad_server.transport.open_inference.planning import InferPlan, RegionPlace, length_mismatch, make_plan
from lossgrad_server.transport.open_inference.regions import RegionView, SharedMemoryRegions
from lossgrad_server.transport.open_inference.statistics import Statistics
from lossgrad_server.transport.open_inference.typed_contents import elements_of
from lossgrad_server.transport.origin import CallOrigin
from lossgrad_server.transport.pipeline import (
    JOIN_IN_THREAD_BYTES,
    Answer,
    PendingRequest,
    RequestPipeline,
)
from lossgrad_server.transport.shared_tensors import Placing
from lossgrad_server.work import SPEC_RESULT, WorkItem

# Counting a mask's rows takes longer than handing it to a thread beyond this, and would hold up every other call.
_COUNT_IN_THREAD_BYTES: Final = 64 * 1024


class InferRequests:
    """Turns ModelInferRequests into pending requests."""

    def __init__(
        self,
        pipeline: RequestPipeline,
        regions: SharedMemoryRegions,
        statistics: Statistics,
        max_message_bytes: int,
    ) -> None:
        self.pipeline = pipeline
        self.statistics = statistics
        self._regions = regions
        self._max_message_bytes = max_message_bytes
        self._known: KnownInferRequests[InferPlan] = KnownInferRequests()

    def open(
        self, data: bytes, call: Call, *, api: str, on_answer: Callable[[PendingInfer, Answer], None]
    ) -> PendingInfer:
        """Check a ModelInferRequest. Raises RequestError; then nothing is pending."""
        started_ns = time.perf_counter_ns()
        self.pipeline.metrics.request_bytes.labels(api).observe(len(data))
        try:
            operands: tuple[Buffer, ...]
            if (known := self._known.find(data)) is not None:
                plan, request_id, operands = known
                check_id(request_id)
            else:
                plan, request_id, operands = self._check(data, started_ns)
            views = None if not plan.uses_regions else self._views(plan, call)
        except RequestError as error:
            self.pipeline.metrics.failed(None, api, error)
            raise
        pending = PendingInfer(
            self, plan, request_id, operands, views, started_ns=started_ns, call=call, api=api, on_answer=on_answer
        )
        pending.origin = CallOrigin(call, is_bulk=plan.is_bulk)
        return pending

    def _check(self, data: bytes, started_ns: int) -> tuple[InferPlan, bytes, tuple[Buffer, ...]]:
        try:
            view = split_infer_request(data)
            request = view.parse()
        except CodecError as error:
            raise malformed(error) from None
        model = None
        try:
            model = find_model(request.model_name, request.model_version)
            plan = make_plan(model, request, len(view.raw), view.typed, self._max_message_bytes)
            operands = self._operands(plan, view, request)
        except RequestError as error:
            error.request_id = request.id
            if model is not None:
                self.statistics.of(model).failed(error, time.perf_counter_ns() - started_ns)
            raise
        return plan, request.id.encode(), operands

    def _operands(self, plan: InferPlan, view: InferRequestView, request: Any) -> tuple[Buffer, ...]:
        """Return the bytes of the operands that came in the message, of the length that the plan says."""
        data = memoryview(view.data)
        operands: list[Buffer] = []
        spans: list[Span] = []
        for one in plan.inputs:
            if one.place is not None:
                continue
            elements: Buffer
            if one.raw_index is not None:
                spans.append(view.raw[one.raw_index])
                elements = data[slice(*spans[-1])]
            else:
                chunks = [(tag, data[slice(*span)]) for tag, span in view.typed.get(one.index, ())]
                elements = elements_of(one, request.inputs[one.index].contents, chunks)
            if len(elements) != one.tensor.byte_count:
                raise length_mismatch(one.name, one.tensor, len(elements))
            operands.append(elements)
        if len(spans) == len(operands):  # typed contents are read anew every time
            self._known.remember(view, spans, plan)
        return tuple(operands)

    def _views(self, plan: InferPlan, call: Call) -> Views:
        """Take the views of all tensors that are in shared memory, or none."""
        owner = self._regions.owner(call)
        views = Views([], [])
        try:
            for places, are_outputs in ((plan.inputs, False), (plan.outputs, True)):
                for one in places:
                    place = one.place
                    view = None
                    if place is not None:
                        size = one.tensor.byte_count
                        view = self._regions.view(owner, place.region, place.offset, size, writable=are_outputs)
                    (views.outputs if are_outputs else views.inputs).append(view)
        except RequestError:
            views.release_quietly()
            raise
        return views


class Views:
    """The views of shared memory that one request holds: one, or None, for each input and output of its plan."""

    __slots__ = ("inputs", "outputs")

    def __init__(self, inputs: list[RegionView | None], outputs: list[RegionView | None]) -> None:
        self.inputs = inputs
        self.outputs = outputs

    @property
    def executor(self) -> Executor | None:
        """Where they are read and written, if they are not to be so anywhere."""
        return next((view.executor for view in (*self.inputs, *self.outputs) if view and view.executor), None)

    def read(self) -> None:
        """Read the inputs. In any thread; raises RequestError."""
        for view in self.inputs:
            if view is not None:
                view.memory  # noqa: B018 - it is read when it is first asked for

    def operands(self, in_message: Sequence[Buffer]) -> tuple[Buffer, ...]:
        """Return the bytes of all operands: those in shared memory, and the others from `in_message`, in their order."""
        others = iter(in_message)
        return tuple(next(others) if view is None else view.memory for view in self.inputs)

    def destinations(self, plan: InferPlan) -> tuple[Buffer | None, ...]:
        """Return where the worker is to write each output of the job, as far as WorkItem allows."""
        destinations: list[Buffer | None] = [None] * len(plan.job.outputs)
        taken: list[RegionPlace] = []
        inputs = [one.place for one in plan.inputs if one.place is not None]
        for one, view in zip(plan.outputs, self.outputs, strict=True):
            if view is None or not view.is_direct or one.place is None or one.job_output is None:
                continue
            place = RegionPlace(one.place.region, one.place.offset, one.tensor.byte_count)
            if any(place.overlaps(other) and place != other for other in inputs) or any(map(place.overlaps, taken)):
                continue
            destinations[one.job_output] = view.memory
            taken.append(place)
        return tuple(destinations) if taken else ()

    def release(self) -> None:
        """Release all. Raises RequestError where the memory of one went away, but releases all the same."""
        error: RequestError | None = None
        for view in (*self.inputs, *self.outputs):
            if view is not None:
                try:
                    view.release()
                except RequestError as failure:
                    error = error or failure
        self.inputs, self.outputs = [], []
        if error is not None:
            raise error

    def release_quietly(self) -> None:
        """Release all of a request that failed anyway."""
        try:
            self.release()
        except RequestError:
            return


class PendingInfer(PendingRequest):
    """A ModelInferRequest, answered with the parts of a ModelInferResponse."""

    @property
    def own_id(self) -> str:
        """The request's id."""
        return self.request_id.decode()

    __slots__ = ("_in_message", "_row_counts", "_statistics", "_views", "infer_plan", "request_id")

    def __init__(
        self,
        requests: InferRequests,
        plan: InferPlan,
        request_id: bytes,
        operands: tuple[Buffer, ...],
        views: Views | None,
        *,
        started_ns: int,
        call: Call,
        api: str,
        on_answer: Callable[[PendingInfer, Answer], None],
    ) -> None:
        self.infer_plan = plan
        self.request_id = request_id
        self._statistics = requests.statistics.of(plan.model)
        self._views = views
        self._row_counts: bytes = b""
        self._in_message = operands
        job = plan.job
        item = WorkItem(job.header, operands)  # `prepare` puts in what is in shared memory
        deadline = call.deadline
        if plan.timeout_seconds is not None:
            own = time.monotonic() + plan.timeout_seconds
            deadline = own if deadline is None else min(own, deadline)
        super().__init__(
            requests.pipeline, job, item, started_ns=started_ns, api=api, deadline=deadline, on_answer=on_answer
        )
        self._statistics.begun()

    async def prepare(self) -> bool:
        """Do what must be done before the request is queued; return whether it is to be. Otherwise, and where this is
        cancelled, it is answered.
        """
        if self._views is not None:
            try:
                await self._read(self._views)
            except RequestError as error:
                self.done(error)
                return False
        if not self.infer_plan.counts_rows:
            return True
        mask, rows = self.item.operands[-1], self.infer_plan.row_count
        # A mask of one element a row stands for all of the row's.
        times = self.plan.element_count // max(1, len(mask))
        try:
            if len(mask) <= _COUNT_IN_THREAD_BYTES:
                self._row_counts = count_rows(mask, rows, times)
            else:
                loop = asyncio.get_running_loop()
                self._row_counts = await loop.run_in_executor(None, count_rows, mask, rows, times)
        except asyncio.CancelledError:
            self.done(Cancelled("the caller cancelled this request before it was queued"))
            raise
        return True

    async def _read(self, views: Views) -> None:
        """Put the operands that are in shared memory into the job: reading may mean copying. Raises RequestError."""
        byte_count = sum(one.tensor.byte_count for one in self.infer_plan.inputs if one.place is not None)
        try:
            executor = views.executor
            if executor is None and byte_count <= JOIN_IN_THREAD_BYTES:
                views.read()
            else:
                await asyncio.get_running_loop().run_in_executor(executor, views.read)
        except asyncio.CancelledError:
            self.done(Cancelled("the caller cancelled this request before it was queued"))
            raise
        operands = views.operands(self._in_message)
        self.item = WorkItem(self.plan.header, operands, views.destinations(self.infer_plan))

    def _placing(self, computed: Computed) -> Placing | None:
        if self._views is None or not any(self._views.outputs):
            return None
        writes = [
            (view, data)
            for view, data in zip(self._views.outputs, self._outputs(computed), strict=True)
            if view is not None and not (view.is_direct and data is view.memory)
        ]

        def place() -> None:
            for view, data in writes:
                view.write(data)

        return Placing(sum(len(data) for _, data in writes), place, self._views.executor)

    def _finish(self, outcome: Outcome) -> None:
        self._statistics.ended()
        super()._finish(outcome)
        if self._views is not None:
            self._views.release_quietly()  # of a request that failed: otherwise `_encode` has done it

    def _failed(self, error: RequestError) -> None:
        self._statistics.failed(error, time.perf_counter_ns() - self._started_ns)

    def _outputs(self, computed: Computed) -> list[Buffer]:
        """Return the bytes of each output."""
        tensors = computed.result.outputs
        scalar, element_count, _, _ = SPEC_RESULT.unpack_from(computed.result.scalars)
        outputs: list[Buffer] = []
        for output in self.infer_plan.outputs:
            if output.job_output is not None:
                outputs.append(tensors[output.job_output])
            elif output.name == LOSS:
                outputs.append(pack_number(scalar, output.tensor.data_type))
            else:
                outputs.append(self._counts(element_count))
        return outputs

    def _encode(self, computed: Computed) -> Sequence[Buffer]:
        raw = self._outputs(computed)
        if self._views is not None:
            raw = [data if view is None else b"" for data, view in zip(raw, self._views.outputs, strict=True)]
            self._views.release()
        parts = self.infer_plan.form.parts(self.request_id, raw)
        self._statistics.computed(self.infer_plan.row_count, computed, time.perf_counter_ns() - self._started_ns)
        return parts

    def _counts(self, element_count: int) -> bytes:
        """Return COUNT: of all elements, or of each row's."""
        job = self.infer_plan.job
        if not job.specs[0].reduction.is_per_sample:
            return struct.pack("<q", element_count)
        if job.mask is not None:
            return self._row_counts
        rows = self.infer_plan.row_count
        return struct.pack("<q", job.element_count // rows) * rows if rows else b""


def count_rows(mask: Buffer, rows: int, times: int = 1) -> bytes:
    """Return how many bytes of each of a mask's rows are not zero, each counted `times` times, as int64."""
    if not rows:
        return b""
    length = len(mask) // rows
    view = memoryview(mask)
    counts = [
        times * (length - bytes(view[begin : begin + length]).count(0))
        for begin in range(0, rows * length, length or 1)
    ]
    return struct.pack(f"<{rows}q", *(counts or [0] * rows))


def check_id(request_id: bytes) -> None:
    """Check that an id, which the answer echoes, is text. Raises RequestError."""
    try:
        request_id.decode()
    except UnicodeDecodeError:
        raise malformed(CodecError("the id is not UTF-8")) from None


def malformed(error: CodecError) -> InvalidRequest:
    """Return what a caller is told whose bytes are not the message that they should be."""
    if isinstance(error, HeaderTooLarge):
        return InvalidRequest(str(error), reason=Reason.HEADER_TOO_LARGE)
    return InvalidRequest(
        f"the message cannot be read: {error}; send what grpc_service.proto of the Open Inference Protocol describes",
        reason=Reason.MALFORMED_MESSAGE,
    )
