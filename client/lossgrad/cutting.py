"""Cutting tensors into slices that fit a message, so that their totals and gradients are those of the whole, to the bit.

The engine sums each 4096 elements of a request by themselves (docs/semantics.md). So slices begin at multiples of 4096
elements of the result; slices for per-sample reductions, at any row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from lossgrad.errors import InvalidRequest, RequestTooLarge
from lossgrad.losses import Loss
from lossgrad.sources import Source
from lossgrad.tensors import ITEMSIZES, broadcast_shapes, is_number, promote, weak_operand
from lossgrad_api.codec import WireTensor

CHUNK_ELEMENTS: Final = 4096
# All of a message that is not tensor data: a slice's is far smaller, and so is its answer's.
OVERHEAD_BYTES: Final = 32 * 1024
# Two vectors of a million broadcast to 10^12 elements: nobody wants that computed slice by slice.
_MOST_EXPANSION: Final = 64


@dataclass(frozen=True, slots=True)
class Operands:
    """The arrays of one request that is to be cut."""

    input: Source
    target: Source
    weight: Source | None = None
    mask: Source | None = None

    @classmethod
    def of(cls, input: Any, target: Any, weight: Any = None, mask: Any = None) -> Operands:
        """Return the operands for these arrays. A Python number takes the other's type, a list the other's family."""
        if is_number(input) and not is_number(target):
            second = Source(target, "target")
            first = Source.of_wire(weak_operand(input, second.data_type, "input"), second.family, "input")
        else:
            first = Source(input, "input")
            if is_number(target) and not is_number(input):
                second = Source.of_wire(weak_operand(target, first.data_type, "target"), first.family, "target")
            else:
                second = Source(target, "target")
                if isinstance(input, (list, tuple)):
                    first.family = second.family
        return cls(
            first,
            second,
            None if weight is None else Source(weight, "weight"),
            None if mask is None else Source(mask, "mask"),
        )

    def expanded(self, shape: tuple[int, ...]) -> Operands:
        """Return the operands as large as they are broadcast, without copying them."""
        weight, mask = (None if each is None else each.expanded(shape) for each in (self.weight, self.mask))
        return Operands(self.input.expanded(shape), self.target.expanded(shape), weight, mask)

    def given(self) -> list[Source]:
        """Return those that there are."""
        return [each for each in (self.input, self.target, self.weight, self.mask) if each is not None]


@dataclass(frozen=True, slots=True)
class CutSlice:
    """The operands of one slice: the elements from `start` to before `stop` of the result.

    `input_range` and `target_range` are where the operands' elements are in theirs.
    """

    start: int
    stop: int
    input_range: tuple[int, int]
    target_range: tuple[int, int]
    input: WireTensor
    target: WireTensor
    weight: WireTensor | None
    mask: WireTensor | None


class Cut:
    """How operands are cut. Raises InvalidRequest and RequestTooLarge where they cannot be.

    `slice_bytes` is the size to aim at, for a request and for its answer; slices that must be larger may be, up to
    `max_message_bytes`. `shape` is the result's.
    """

    def __init__(
        self,
        operands: Operands,
        losses: Sequence[Loss],
        *,
        allow_broadcast: bool,
        slice_bytes: int,
        max_message_bytes: int,
    ) -> None:
        self.operands = operands
        self.shape = _result_shape(operands, allow_broadcast)
        self.element_count = math.prod(self.shape)
        self.result_type = promote(operands.input.data_type, operands.target.data_type)
        self._losses = losses
        self._aim_bytes = slice_bytes
        self._limit = max_message_bytes
        is_by_row = any(loss.reduction.startswith("sample") for loss in losses)
        if is_by_row and not self.shape:
            raise InvalidRequest(
                "a per-sample reduction needs at least one dimension, the result has shape []",
                reason="BAD_SHAPE",
                field="reduction",
            )
        is_even = all(each.shape == self.shape for each in operands.given())
        self._is_flat = is_even and not is_by_row
        if self._is_flat:
            self._step = self._flat_step()
            return
        if not is_even:
            self._check_broadcast()
        try:
            self._step = self._row_step()
        except RequestTooLarge:
            pairs_match = operands.input.shape == operands.target.shape == self.shape
            if is_even or is_by_row or not (pairs_match or not any(loss.gradient for loss in losses)):
                raise
            # Rows do not end at multiples of 4096 elements. Sent as large as they are broadcast, the operands can be cut
            # anywhere; the gradients are as large as what was sent, so this is for those whose pairs are not broadcast.
            self.operands = operands.expanded(self.shape)
            self._is_flat = True
            self._step = self._flat_step()

    def _flat_step(self) -> int:
        each_bytes = max(sum(each.itemsize for each in self.operands.given()), self._answer_bytes())
        least = min(CHUNK_ELEMENTS, self.element_count)
        return CHUNK_ELEMENTS * self._units(CHUNK_ELEMENTS * each_bytes, least * each_bytes, 0, f"{least} elements")

    def _row_step(self) -> int:
        row_elements = math.prod(self.shape[1:])
        is_summed = any(not loss.reduction.startswith("sample") for loss in self._losses)
        unit_rows = CHUNK_ELEMENTS // math.gcd(row_elements, CHUNK_ELEMENTS) if is_summed and row_elements else 1
        given = self.operands.given()
        row_bytes = max(
            sum(each.itemsize * math.prod(each.shape[1:]) for each in given if self._has_rows(each)),
            row_elements * self._answer_bytes(),
            row_elements * ITEMSIZES[self.result_type],  # the server bounds this too
        )
        fixed_bytes = sum(each.byte_count for each in given if not self._has_rows(each))
        what = "one row" if unit_rows == 1 else f"{unit_rows} rows"
        least_bytes = min(unit_rows, self.shape[0]) * row_bytes + fixed_bytes
        return self._units(unit_rows * row_bytes, least_bytes, fixed_bytes, what) * unit_rows * row_elements

    def _units(self, unit_bytes: int, least_bytes: int, fixed_bytes: int, what: str) -> int:
        """Return how many units a slice has: as many as fit the size to aim at, at least one. Raises RequestTooLarge."""
        most_bytes = self._limit - OVERHEAD_BYTES
        if least_bytes > most_bytes and self.element_count:
            raise RequestTooLarge(
                f"this request takes {sum(each.byte_count for each in self.operands.given())} bytes, the limit is "
                f"{self._limit}, and its smallest slice ({what} of shape {list(self.shape)}) takes "
                f"{least_bytes}; send fewer losses or elements at a time, or raise max_message_bytes here and "
                "LOSSGRAD_MAX_MESSAGE_BYTES on the server",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "MESSAGE_TOO_LARGE",
            )
        return max(1, (min(self._aim_bytes, most_bytes) - fixed_bytes) // max(1, unit_bytes))

    def slices(self) -> Iterator[CutSlice]:
        """Give the slices one after the other; each is read when it is asked for, and let go of with the next."""
        operands = self.operands
        every = (operands.input, operands.target, operands.weight, operands.mask)
        row_elements = math.prod(self.shape[1:])
        for start in range(0, max(1, self.element_count), max(1, self._step)):
            stop = min(start + self._step, self.element_count)
            ranges = [None if each is None else self._range(each, start, stop, row_elements) for each in every]
            input, target, weight, mask = (
                None if each is None or place is None else self._take(each, *place)
                for each, place in zip(every, ranges, strict=True)
            )
            assert input is not None  # noqa: S101 - for the type checker
            assert target is not None  # noqa: S101
            assert ranges[0] is not None  # noqa: S101
            assert ranges[1] is not None  # noqa: S101
            yield CutSlice(start, stop, ranges[0], ranges[1], input, target, weight, mask)
            # By now it is copied into a message.
            for each, place in zip(every, ranges, strict=True):
                if each is not None and place is not None and each.shape == self.shape:
                    each.release(*place)

    def _range(self, source: Source, start: int, stop: int, row_elements: int) -> tuple[int, int]:
        """Return where a source's elements for a range of the result's are."""
        if source.shape == self.shape:
            return start, stop
        if not self._has_rows(source) or not row_elements:
            return 0, source.element_count
        own_row_elements = math.prod(source.shape[1:])
        return start // row_elements * own_row_elements, stop // row_elements * own_row_elements

    def _take(self, source: Source, start: int, stop: int) -> WireTensor:
        if self._is_flat and self.shape:
            return source.flat(start, stop)
        if not self._has_rows(source) or not self.element_count:
            return source.whole()
        own_row_elements = math.prod(source.shape[1:])
        return source.rows(start // own_row_elements, stop // own_row_elements)

    @property
    def is_whole(self) -> bool:
        """Whether there is one slice only."""
        return self.element_count <= self._step

    def _has_rows(self, source: Source) -> bool:
        return len(source.shape) == len(self.shape) and source.shape[:1] == self.shape[:1]

    def _answer_bytes(self) -> int:
        return answer_bytes(self.operands, self.result_type, self._losses)

    def _check_broadcast(self) -> None:
        operands = self.operands
        if self.element_count > _MOST_EXPANSION * sum(each.element_count for each in operands.given()):
            raise RequestTooLarge(
                f"the tensors broadcast to {list(self.shape)}, {self.element_count} elements, which do not fit one "
                "message; "
                f"with so many from so few (above {_MOST_EXPANSION} times), cut them yourself if it is meant",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RESULT_TOO_LARGE",
            )
        for source, name in ((operands.input, "input"), (operands.target, "target")):
            if any(loss.gradient for loss in self._losses) and not self._has_rows(source):
                raise RequestTooLarge(
                    f"{name} has shape {list(source.shape)} and is broadcast over the first dimension of "
                    f"{list(self.shape)}; the "
                    "request does not fit one message, and the gradient of what is broadcast so cannot be put "
                    "together from "
                    f"slices: expand {name} to {list(self.shape)}, or leave the gradient out",
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "MESSAGE_TOO_LARGE",
                )


def answer_bytes(operands: Operands, result_type: int, losses: Sequence[Loss]) -> int:
    """Return the bytes of an answer for each element of the result, at most."""
    each_gradient = operands.input.itemsize + operands.target.itemsize
    return sum(
        (ITEMSIZES[result_type] if loss.reduction == "none" else 0) + (each_gradient if loss.gradient else 0)
        for loss in losses
    )


def _result_shape(operands: Operands, allow_broadcast: bool) -> tuple[int, ...]:
    input, target = operands.input.shape, operands.target.shape
    if input != target and not allow_broadcast:
        raise InvalidRequest(
            f"target has shape {list(target)}, input {list(input)}; send equal shapes, or set allow_broadcast if "
            "broadcasting "
            "is meant",
            reason="SHAPE_MISMATCH",
            field="target.shape",
        )
    shape = broadcast_shapes(input, target)
    if shape is None:
        raise InvalidRequest(
            f"target has shape {list(target)}, input {list(input)}, which do not broadcast; dimensions, counted from "
            "the last, "
            "must be equal or 1",
            reason="SHAPE_MISMATCH",
            field="target.shape",
        )
    for source in (operands.weight, operands.mask):
        if source is not None and not (
            source.shape == shape or (allow_broadcast and broadcast_shapes(source.shape, shape) == shape)
        ):
            hint = "one that broadcasts to it" if allow_broadcast else "set allow_broadcast if broadcasting is meant"
            raise InvalidRequest(
                f"{source.name} has shape {list(source.shape)}, the result {list(shape)}; send the result's shape, "
                f"or {hint}",
                reason="SHAPE_MISMATCH",
                field=f"{source.name}.shape",
            )
    return shape
