"""Calls that do not fit one message: cut into slices, and their answers put together as if there had been one.

The scalars, gradients and unreduced losses are, to the bit, those of one message without a limit (cutting.py says why).
What the gradient of a weighted mean divides by is known before the first slice: it comes from a pass of its own, with the
weights and mask alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from lossgrad.calls import Answer, deadline_seconds
from lossgrad.channel import ChannelSettings
from lossgrad.cutting import Cut, CutSlice, Operands, answer_bytes
from lossgrad.errors import InvalidRequest, LossgradError, RequestTooLarge, ServerError
from lossgrad.losses import L1, Loss
from lossgrad.results import LossResult, Timing
from lossgrad.slice_window import Outcome, SliceRequest, SliceWindow
from lossgrad.slicing import INCLUDE_TOTAL, read_total
from lossgrad.sources import Source
from lossgrad.task_lanes import TaskLanes
from lossgrad.tensor_buffer import TensorBuffer, check_out
from lossgrad.tensors import FLOAT16, NAMES, broadcast_shapes, promote
from lossgrad.thread_lanes import OpenStream, ThreadLanes
from lossgrad_api.codec import StatsView, WireTensor, encode_compute_request
from lossgrad_api.loss_totals import LossTotal

SLICE_BYTES: Final = 4 * 1024 * 1024
IN_FLIGHT_BYTES: Final = 4 * SLICE_BYTES
_UINT8: Final = next(number for number, name in NAMES.items() if name == "uint8")
_COUNTED_ELEMENTS: Final = 1 << 24
_SERVERS_REASONS: Final = frozenset(("", "MESSAGE_TOO_LARGE", "RESULT_TOO_LARGE"))
# For how long a slice is sent again, for each retry that a call has.
_PATIENCE_SECONDS: Final = 5.0


def is_too_large(input: Any, target: Any, losses: Sequence[Loss], limit: int, *, weight: Any, mask: Any) -> bool:
    """Whether a call's message, or its answer, is surely beyond the limit. Cheap where it is far from it."""
    byte_count = getattr(input, "nbytes", 0) + getattr(target, "nbytes", 0)
    if byte_count * 64 < limit and weight is None and mask is None:
        return False  # 16 losses with gradients and unreduced losses would fit
    given = [input, target, *(each for each in (weight, mask) if each is not None)]
    if not all(hasattr(each, "nbytes") for each in given):
        return False
    if sum(each.nbytes for each in given) > limit:
        return True
    outputs = sum(loss.gradient + (loss.reduction == "none") for loss in losses)
    if byte_count * 4 * outputs <= limit:  # 4: a half next to a double is answered with a double
        return False
    operands = Operands.of(input, target)
    shape = broadcast_shapes(operands.input.shape, operands.target.shape)
    if shape is None:
        return False  # the error for that is elsewhere
    each_bytes = answer_bytes(operands, promote(operands.input.data_type, operands.target.data_type), losses)
    return math.prod(shape) * each_bytes > limit


def may_be_cut(error: RequestTooLarge) -> bool:
    """Whether what a server found too large may pass in slices."""
    return error.reason in _SERVERS_REASONS


@dataclass(slots=True, eq=False)
class _Output:
    """What has come of one loss so far."""

    total: LossTotal = field(default_factory=LossTotal)
    element_count: int = 0
    nonfinite_count: int = 0
    loss: TensorBuffer | None = None
    gradient: TensorBuffer | None = None
    target_gradient: TensorBuffer | None = None


class LargeCall:
    """One call that is cut. Send `weight_slices` and wait for them, then the same with `slices`; then take `answer`.

    Raises InvalidRequest and RequestTooLarge where it cannot be cut.
    """

    def __init__(
        self,
        input: Any,
        target: Any,
        losses: tuple[Loss, ...],
        *,
        is_single: bool,
        max_message_bytes: int,
        weight: Any = None,
        mask: Any = None,
        allow_broadcast: bool = False,
        idempotency_key: str = "",
        gradient_out: Sequence[Any] | None = None,
    ) -> None:
        self._losses = losses
        self._is_single = is_single
        self._limit = max_message_bytes
        self._allow_broadcast = allow_broadcast
        self._idempotency_key = idempotency_key
        self._operands = Operands.of(input, target, weight, mask)
        self._outs = [None] * len(losses) if gradient_out is None else list(gradient_out)
        source = self._operands.input
        for out in self._outs:
            if out is not None:
                check_out(out, source.data_type, source.shape)
        self._passes = self._cut_in_passes()
        self._outputs = [_Output() for _ in losses]
        self._weights = LossTotal()
        self._stats: list[StatsView] = []
        self._needs_denominator = any(
            loss.gradient and loss.reduction == "mean" and loss.denominator is None for loss in losses
        )
        self._has_samples = any(loss.reduction.startswith("sample") for loss in losses)

    @property
    def is_whole(self) -> bool:
        """Whether it fits one message after all, so that there is nothing to gain."""
        return len(self._passes) == 1 and self._passes[0][1].is_whole

    def weight_slices(self) -> Iterator[SliceRequest]:
        """Give what finds out the sum of the weights, where it must be known beforehand, or comes from nowhere else."""
        operands = self._operands
        if operands.weight is None or not (self._needs_denominator or self._has_samples):
            return
        shape = self._passes[0][1].shape
        weighed = Operands(
            Source.zeros(shape, FLOAT16, "input"),
            Source.zeros(shape, _UINT8, "target"),
            operands.weight,
            operands.mask,
        )
        spec = L1(reduction="sum")
        for each in self._cut(weighed, [spec]).slices():
            yield self._request([spec.serialized + INCLUDE_TOTAL], each, partial(self._weigh))

    def slices(self) -> Iterator[SliceRequest]:
        """Give the slices of the call itself."""
        denominator = self._denominator() if self._needs_denominator else None
        for indices, cut in self._passes:
            specs = [self._spec(self._losses[index], denominator) for index in indices]
            for each in cut.slices():
                yield self._request(specs, each, partial(self._take, indices, cut, each))

    def answer(self, round_trip_seconds: float) -> Answer:
        """Return the results, once every slice is answered."""
        timing = _timing(self._stats, round_trip_seconds)
        results = tuple(self._result(index, timing) for index in range(len(self._losses)))
        return results[0] if self._is_single else results

    def _cut(self, operands: Operands, losses: Sequence[Loss]) -> Cut:
        return Cut(
            operands,
            losses,
            allow_broadcast=self._allow_broadcast,
            slice_bytes=SLICE_BYTES,
            max_message_bytes=self._limit,
        )

    def _cut_in_passes(self) -> list[tuple[list[int], Cut]]:
        """Return which losses go together, and how they are cut: all of them, if one way of cutting suits all."""
        every = list(range(len(self._losses)))
        by_sample = [index for index in every if self._losses[index].reduction.startswith("sample")]
        try:
            return [(every, self._cut(self._operands, self._losses))]
        except RequestTooLarge:
            rest = [index for index in every if index not in by_sample]
            if not by_sample or not rest:
                raise
        return [
            (indices, self._cut(self._operands, [self._losses[index] for index in indices]))
            for indices in (rest, by_sample)
        ]

    def _spec(self, loss: Loss, denominator: float | None) -> bytes:
        if loss.reduction.startswith("sample"):
            return loss.serialized
        if loss.reduction == "mean":
            if not loss.gradient:
                loss = dataclasses.replace(loss, reduction="sum", denominator=None)
            elif loss.denominator is None:
                loss = dataclasses.replace(loss, denominator=denominator)
        return loss.serialized + INCLUDE_TOTAL

    def _request(self, specs: Sequence[bytes], each: CutSlice, deliver: Any) -> SliceRequest:
        parts = encode_compute_request(
            specs,
            each.input,
            each.target,
            weight=each.weight,
            mask=each.mask,
            allow_broadcast=self._allow_broadcast,
            idempotency_key=self._idempotency_key,
        )
        return SliceRequest(parts, sum(map(len, parts)), deliver)

    def _weigh(self, outcome: Outcome) -> None:
        if isinstance(outcome, LossgradError):
            raise outcome
        self._weights += read_total(outcome.results[0])

    def _denominator(self) -> float:
        """Return what the mean divides by: the sum of the weights of the unmasked elements."""
        operands, shape = self._operands, self._passes[0][1].shape
        if operands.weight is not None:
            weight_sum = self._weights.weight_sum
            if not 0 < weight_sum < math.inf:
                raise InvalidRequest(
                    f"the weights sum to {weight_sum!r}; the gradient of a mean over tensors that do not fit one message "
                    "needs a finite sum above 0: set denominator, or leave the gradient out",
                    reason="BAD_PARAMETER",
                    field="weight",
                )
            return weight_sum
        count = math.prod(shape)
        if operands.mask is not None and operands.mask.element_count:
            mask = operands.mask
            starts = range(0, mask.element_count, _COUNTED_ELEMENTS)
            ranges = ((start, min(start + _COUNTED_ELEMENTS, mask.element_count)) for start in starts)
            unmasked = sum(int(np.count_nonzero(np.frombuffer(mask.elements(*each), np.uint8))) for each in ranges)
            count = unmasked * (count // mask.element_count)
        return float(count) or 1.0  # of nothing, all gradients are 0

    def _take(self, indices: list[int], cut: Cut, each: CutSlice, outcome: Outcome) -> None:
        if isinstance(outcome, LossgradError):
            raise outcome
        if len(outcome.results) != len(indices):
            raise ServerError(f"the server gave {len(outcome.results)} results for {len(indices)} losses")
        self._stats.append(outcome.stats)
        for index, answer in zip(indices, outcome.results, strict=True):
            loss, output = self._losses[index], self._outputs[index]
            if loss.reduction.startswith("sample"):
                output.element_count += answer.element_count
                output.nonfinite_count += answer.nonfinite_count
                row_elements = max(1, math.prod(cut.shape[1:]))
                output.loss = self._put(
                    output.loss,
                    answer.tensor,
                    cut.result_type,
                    cut.shape[:1],
                    (each.start // row_elements, each.stop // row_elements) if cut.element_count else (0, cut.shape[0]),
                )
            else:
                output.total += read_total(answer)
                if loss.reduction == "none":
                    place = (each.start, each.stop)
                    output.loss = self._put(output.loss, answer.tensor, cut.result_type, cut.shape, place)
            if loss.gradient:
                self._take_gradients(index, each, answer.input_gradient, answer.target_gradient)

    def _put(
        self,
        buffer: TensorBuffer | None,
        wire: WireTensor | None,
        data_type: int,
        shape: tuple[int, ...],
        place: tuple[int, int],
    ) -> TensorBuffer:
        if wire is None:
            raise ServerError("the server's answer lacks an unreduced loss")
        buffer = buffer or TensorBuffer(data_type, shape, self._operands.input.family)
        buffer.put(*place, wire)
        return buffer

    def _take_gradients(
        self, index: int, each: CutSlice, gradient: WireTensor | None, target_gradient: WireTensor | None
    ) -> None:
        output, input, target = self._outputs[index], self._operands.input, self._operands.target
        if gradient is None:
            raise ServerError(f"the server's answer has no gradient for {self._losses[index]!r}")
        if output.gradient is None:
            output.gradient = TensorBuffer(input.data_type, input.shape, input.family, self._outs[index])
        output.gradient.put(*each.input_range, gradient)
        if target_gradient is not None:
            if output.target_gradient is None:
                output.target_gradient = TensorBuffer(target.data_type, target.shape, target.family)
            output.target_gradient.put(*each.target_range, target_gradient)

    def _result(self, index: int, timing: Timing) -> LossResult:
        loss, output, total = self._losses[index], self._outputs[index], self._outputs[index].total
        value: float | None = None
        if loss.reduction == "sum":
            value = total.sum
        elif loss.reduction == "mean":
            value = total.mean if loss.denominator is None else total.mean_over(loss.denominator)
        is_sample = loss.reduction.startswith("sample")
        weights = self._weights if is_sample and self._operands.weight is not None else total
        result_type = self._passes[0][1].result_type
        return LossResult(
            loss=_value(output.loss) if value is None else self._operands.input.family.scalar(value, result_type),
            value=value,
            gradient=_value(output.gradient),
            target_gradient=_value(output.target_gradient),
            element_count=output.element_count if is_sample else total.element_count,
            weight_sum=weights.weight_sum if weights.element_count or not is_sample else float(output.element_count),
            nonfinite_count=output.nonfinite_count if is_sample else total.nonfinite_count,
            timing=timing,
            spec=loss,
            idempotency_key=self._idempotency_key,
        )


def compute_in_threads(
    call: LargeCall, open_stream: OpenStream, settings: ChannelSettings, limit: int, timeout: float | None
) -> Answer:
    """Compute a call that is cut, over a stream of its own."""
    start = time.perf_counter()
    lanes = ThreadLanes(_window(settings, limit, timeout), [open_stream], [settings.target])
    try:
        for slices in (call.weight_slices, call.slices):
            for request in slices():
                lanes.send(request)
            lanes.drain()
    finally:
        lanes.close()
    return call.answer(time.perf_counter() - start)


async def compute_in_tasks(
    call: LargeCall,
    open_stream: Callable[[], Any],
    settings: ChannelSettings,
    limit: int,
    timeout: float | None,  # noqa: ASYNC109 - for each answer, not the whole call's
) -> Answer:
    """Compute a call that is cut, over a stream of its own."""
    start = time.perf_counter()
    lanes = TaskLanes(_window(settings, limit, timeout), [open_stream], [settings.target])
    try:
        for slices in (call.weight_slices, call.slices):
            for request in slices():
                await lanes.send(request)
            await lanes.drain()
    finally:
        await lanes.close()
    return call.answer(time.perf_counter() - start)


def _window(settings: ChannelSettings, limit: int, timeout: float | None) -> SliceWindow:
    silence_seconds = deadline_seconds(timeout, settings.timeout)
    return SliceWindow(
        1,
        max_bytes=IN_FLIGHT_BYTES,
        max_message_bytes=limit,
        silence_seconds=math.inf if silence_seconds is None else silence_seconds,
        patience_seconds=_PATIENCE_SECONDS * settings.retries,
        clock=time.perf_counter,
        metrics=settings.metrics_of("compute"),
        are_requests=False,
    )


def _value(buffer: TensorBuffer | None) -> Any:
    return None if buffer is None else buffer.value()


def _timing(stats: Sequence[StatsView], round_trip_seconds: float) -> Timing:
    """Return the slices' times added up."""
    numbers: list[tuple[int, ...]] = [each[:6] for each in stats]
    sums = [sum(column) for column in zip(*numbers, strict=True)]
    return Timing(
        sums[0] / 1e9,
        sums[1] / 1e9,
        sums[2] / 1e9,
        sums[3] / 1e9,
        sums[4],
        sums[5],
        stats[-1].device,
        round_trip_seconds,
    )
