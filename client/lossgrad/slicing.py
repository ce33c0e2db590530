"""A part of a batch -> slices to send, and their answers -> exact totals and gradients. No I/O.

The losses that travel are not quite the caller's: what has no gradient is asked for as a sum, the gradient of a mean with
the denominator of the whole, and all with their exact totals, of which every mean and sum is made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError

from lossgrad.batches import Part
from lossgrad.calls import JOINED_BYTES, encode
from lossgrad.cutting import OVERHEAD_BYTES, Cut, CutSlice, Operands
from lossgrad.errors import InvalidRequest, ServerError
from lossgrad.exchange import FRAME_BYTES
from lossgrad.losses import Loss
from lossgrad.sources import let_go_of_pages
from lossgrad.tensor_buffer import TensorBuffer
from lossgrad.tensors import Family, broadcast_shapes
from lossgrad_api.codec import Buffer, ResponseView, ResultView, encode_compute_request
from lossgrad_api.loss_totals import LossTotal, StateError
from lossgrad_api.v1 import loss_service_pb2 as pb

# LossSpec.include_total = true.
INCLUDE_TOTAL: Final = b"\x48\x01"


class Place(NamedTuple):
    """Which part of its part a slice is: all of it, where `cut` is None. The families are the gradients'."""

    input_family: Family
    target_family: Family
    cut: Cut | None = None
    cut_slice: CutSlice | None = None


class EncodedSlice(NamedTuple):
    """A slice to send: the parts of its ComputeLossRequest, its size, its elements (masked ones included), its place."""

    parts: list[Buffer]
    byte_count: int
    element_count: int
    place: Place


@dataclass(slots=True, eq=False)
class PartResult:
    """What has come of a part so far. The gradients are TensorBuffers while a part that was cut is not complete."""

    part: Part
    element_count: int = 0
    totals: Sequence[LossTotal] = ()
    gradients: dict[int, Any] = field(default_factory=dict)  # by the loss's index
    target_gradients: dict[int, Any] = field(default_factory=dict)

    def gradient(self, index: int) -> Any:
        """Return the gradient of a loss with respect to input; None where it was not asked for."""
        return _value(self.gradients.get(index))

    def target_gradient(self, index: int) -> Any:
        """Return that with respect to target; None where it is not part of the answer."""
        return _value(self.target_gradients.get(index))


class Slicer:
    """Makes slices of parts, and reads their answers. `denominator` is what the gradient of a mean divides by."""

    def __init__(
        self,
        losses: Sequence[Loss],
        *,
        denominator: float | None,
        allow_broadcast: bool,
        slice_bytes: int,
        max_message_bytes: int,
    ) -> None:
        self._sent = [_sent_loss(loss, denominator) for loss in losses]
        self._specs = [loss.serialized + INCLUDE_TOTAL for loss in self._sent]
        self._gradients = [index for index, loss in enumerate(losses) if loss.gradient]
        self._needs_plain_mean = any(
            loss.gradient and loss.reduction == "mean" and loss.denominator is None for loss in losses
        )
        self._allow_broadcast = allow_broadcast
        self._max_message_bytes = max_message_bytes - FRAME_BYTES
        self._slice_bytes = max(1, min(slice_bytes, self._max_message_bytes - OVERHEAD_BYTES))

    def slices(self, part: Part) -> Iterator[EncodedSlice]:
        """Give a part's slices. Raises InvalidRequest and RequestTooLarge."""
        input, target, weight, mask = part[:4]
        if self._needs_plain_mean and (weight is not None or mask is not None):
            raise InvalidRequest(
                "the gradient of a mean over a data set with weights or masks divides by what is not known before "
                "its end; set "
                "the loss's denominator, or use reduction='sum'",
                reason="BAD_PARAMETER",
                field="denominator",
            )
        if self._is_small(part):
            parts, byte_count, element_count, input_family, target_family, _ = encode(
                input,
                target,
                self._specs,
                max_message_bytes=self._max_message_bytes,
                weight=weight,
                mask=mask,
                allow_broadcast=self._allow_broadcast,
            )
            yield EncodedSlice(parts, byte_count, element_count, Place(input_family, target_family))
            let_go_of_pages(input, target, weight, mask)  # by now it is copied into a message
            return
        operands = Operands.of(input, target, weight, mask)
        cut = Cut(
            operands,
            self._sent,
            allow_broadcast=self._allow_broadcast,
            slice_bytes=self._slice_bytes,
            max_message_bytes=self._max_message_bytes,
        )
        for each in cut.slices():
            parts = encode_compute_request(
                self._specs,
                each.input,
                each.target,
                weight=each.weight,
                mask=each.mask,
                allow_broadcast=self._allow_broadcast,
            )
            byte_count = sum(map(len, parts))
            if byte_count < JOINED_BYTES:
                parts = [b"".join(parts)]
            place = Place(operands.input.family, operands.target.family, cut, each)
            yield EncodedSlice(parts, byte_count, each.stop - each.start, place)

    def take(self, result: PartResult, slice: EncodedSlice, view: ResponseView) -> None:
        """Add a slice's answer to what has come of its part. Raises ServerError for one that makes no sense."""
        answers = view.results
        if len(answers) != len(self._specs):
            raise ServerError(f"the server gave {len(answers)} results for {len(self._specs)} losses")
        totals = [read_total(answer) for answer in answers]
        result.totals = list(map(LossTotal.__add__, result.totals, totals)) if result.totals else totals
        result.element_count += slice.element_count
        for index in self._gradients:
            answer = answers[index]
            if answer.input_gradient is None:
                raise ServerError(f"the server's answer has no gradient for {self._sent[index]!r}")
            self._take_gradient(result, slice.place, index, answer)

    def _take_gradient(self, result: PartResult, place: Place, index: int, answer: ResultView) -> None:
        cut, cut_slice = place.cut, place.cut_slice
        if cut is None or cut_slice is None:
            result.gradients[index] = place.input_family.tensor(answer.input_gradient)  # type: ignore[arg-type]
            if answer.target_gradient is not None:
                result.target_gradients[index] = place.target_family.tensor(answer.target_gradient)
            return
        for buffers, source, wire, where in (
            (result.gradients, cut.operands.input, answer.input_gradient, cut_slice.input_range),
            (result.target_gradients, cut.operands.target, answer.target_gradient, cut_slice.target_range),
        ):
            if wire is not None:
                if index not in buffers:
                    buffers[index] = TensorBuffer(source.data_type, source.shape, source.family)
                buffers[index].put(*where, wire)

    def _is_small(self, part: Part) -> bool:
        """Whether a part goes as it is. One without `nbytes` is numbers in lists, which nobody writes by the million."""
        input, target, weight, mask = part[:4]
        byte_count = getattr(input, "nbytes", 0) + getattr(target, "nbytes", 0)
        if weight is not None:
            byte_count += getattr(weight, "nbytes", 0)
        if mask is not None:
            byte_count += getattr(mask, "nbytes", 0)
        shapes = tuple(getattr(input, "shape", ())), tuple(getattr(target, "shape", ()))
        if self._allow_broadcast and shapes[0] != shapes[1]:
            byte_count += 8 * math.prod(broadcast_shapes(*shapes) or ())  # what it is broadcast to
        return byte_count * max(1, len(self._gradients)) <= self._slice_bytes


def _sent_loss(loss: Loss, denominator: float | None) -> Loss:
    if not loss.gradient:
        return dataclasses.replace(loss, reduction="sum", denominator=None, gradient_scale=None)
    if loss.reduction == "mean" and loss.denominator is None:
        return dataclasses.replace(loss, denominator=denominator)
    return loss


def read_total(answer: ResultView) -> LossTotal:
    """Return the exact total that an answer holds. Raises ServerError."""
    if answer.total is None:
        raise ServerError("the server gives no exact totals: it is older than this client; install the same version")
    try:
        return LossTotal.from_message(pb.LossState.FromString(answer.total))
    except (DecodeError, StateError) as error:
        raise ServerError(f"the server's answer has a total that cannot be one: {error}") from error


def _value(gradient: Any) -> Any:
    return gradient.value() if isinstance(gradient, TensorBuffer) else gradient
