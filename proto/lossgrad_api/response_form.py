"""Writes ComputeLossResponses of one form: all that equal requests' answers have in common is encoded once and kept.

A server gives the same kind of answer again and again: the same losses over tensors of the same shapes. Of such answers
only the scalars, the times and the tensors' data differ, and the counts now and then. What is written is byte for byte
what `encode_compute_response` writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from lossgrad_api.response_codec import counts_fields
from lossgrad_api.wire import Buffer, string_field, tensor_head, varint

# A result's numbers as the caller has them: scalar, element count, sum of weights, non-finite count.
RECORD_BYTES: Final = 32
_COUNTS: Final = struct.Struct("<qdq")
_SCALAR_BYTES: Final = 8

# Answers with less tensor data are joined at once: a second copy costs less than handling parts.
JOINED_BYTES: Final = 8 * 1024
# How many combinations of counts are kept for a result; under a mask every answer may have others.
_MAX_COUNTS: Final = 16


class TensorForm(NamedTuple):
    """A tensor of a result: the number of its field in LossResult, its DataType's number, its shape and its bytes."""

    field: int
    data_type: int
    shape: tuple[int, ...]
    byte_count: int


class ResultForm(NamedTuple):
    """A result: whether its loss is a scalar, and its tensors in the order of their fields."""

    has_scalar: bool
    tensors: tuple[TensorForm, ...]


class _Result:
    """One result of a response."""

    __slots__ = ("_by_counts", "_form", "has_scalar", "tensor_count")

    def __init__(self, form: ResultForm) -> None:
        self._form = form
        self._by_counts: dict[bytes, tuple[bytes, ...]] = {}
        self.has_scalar = form.has_scalar
        self.tensor_count = len(form.tensors)

    def fixed(self, counts: bytes) -> tuple[bytes, ...]:
        """Return the bytes before, between and behind what varies: the scalar, then each tensor's data."""
        fixed = self._by_counts.get(counts)
        if fixed is None:
            if len(self._by_counts) >= _MAX_COUNTS:
                self._by_counts.clear()
            fixed = self._by_counts[counts] = self._encode(counts)
        return fixed

    def head(self, scalar: bytes, counts: bytes) -> bytes:
        """Return all of a result of one tensor but its data, which are to follow."""
        (tensor,) = self._form.tensors
        head = b"\x09" + scalar if self.has_scalar else b""
        head += counts_fields(*_COUNTS.unpack(counts))
        head += tensor_head(tensor.field << 3 | 2, tensor.data_type, tensor.shape, tensor.byte_count)
        return b"\x12" + varint(len(head) + tensor.byte_count) + head

    def _encode(self, counts: bytes) -> tuple[bytes, ...]:
        pieces: list[bytes] = []
        head = b""
        size = 0
        if self.has_scalar:
            pieces.append(b"\x09")
            size += _SCALAR_BYTES
        # The counts are fields 3 to 5: behind the loss, before the gradients.
        is_before_counts = True
        for tensor in self._form.tensors:
            if is_before_counts and tensor.field > 2:
                head += counts_fields(*_COUNTS.unpack(counts))
                is_before_counts = False
            pieces.append(head + tensor_head(tensor.field << 3 | 2, tensor.data_type, tensor.shape, tensor.byte_count))
            size += tensor.byte_count
            head = b""
        pieces.append(head + counts_fields(*_COUNTS.unpack(counts)) if is_before_counts else head)
        pieces[0] = b"\x12" + varint(size + sum(map(len, pieces))) + pieces[0]
        return tuple(pieces)


class ResponseForm:
    """Encodes the responses to requests that differ in nothing but their elements' values."""

    def __init__(self, results: Iterable[ResultForm]) -> None:
        forms = tuple(results)
        self._results = tuple(map(_Result, forms))
        self._is_joined = sum(tensor.byte_count for form in forms for tensor in form.tensors) < JOINED_BYTES
        self._single = self._results[0] if len(forms) == 1 and forms[0].has_scalar and self._is_joined else None
        # The bytes of the one tensor of an answer that can be written in place; 0 where it is small, or one of several.
        self.in_place_bytes = 0
        if len(forms) == 1 and len(forms[0].tensors) == 1 and not self._is_joined:
            self.in_place_bytes = forms[0].tensors[0].byte_count

    def parts(self, stats: bytes, records: bytes, tensors: Sequence[Buffer], idempotency_key: str = "") -> list[Buffer]:
        """Return a response as parts to join; as one part where that is little.

        `stats` is from `encode_stats`. `records` has RECORD_BYTES for each result, little-endian: its scalar (double),
        element count (int64), sum of weights (double), non-finite count (int64). `tensors` are all results' tensors' data.
        """
        if self._single is not None and not idempotency_key:
            fixed = self._single.fixed(records[_SCALAR_BYTES:])
            if len(tensors) == 1:
                return [b"".join((stats, fixed[0], records[:_SCALAR_BYTES], fixed[1], tensors[0], fixed[2]))]
            if not tensors:
                return [b"".join((stats, fixed[0], records[:_SCALAR_BYTES], fixed[1]))]
        parts: list[Buffer] = [stats]
        first = at = 0
        for result in self._results:
            fixed = result.fixed(records[at + _SCALAR_BYTES : at + RECORD_BYTES])
            varying: list[Buffer] = [records[at : at + _SCALAR_BYTES]] if result.has_scalar else []
            varying += tensors[first : first + result.tensor_count]
            for piece, value in zip(fixed, varying, strict=False):
                parts += (piece, value)
            parts.append(fixed[-1])
            first += result.tensor_count
            at += RECORD_BYTES
        if idempotency_key:
            parts.append(string_field(3, idempotency_key))
        return [b"".join(parts)] if self._is_joined else _merged(parts)

    def head(self, stats: bytes, records: bytes, idempotency_key: str = "") -> bytes:
        """Return all of a response but its one tensor's data, which are to follow. The arguments are those of `parts`.

        Fields come in another order than `parts` gives them: all that is not the tensor stands before it.
        """
        (result,) = self._results
        return string_field(3, idempotency_key) + stats + result.head(records[:_SCALAR_BYTES], records[_SCALAR_BYTES:])


def _merged(parts: list[Buffer]) -> list[Buffer]:
    """Return the parts with small ones joined to their neighbours, so that there are few."""
    merged: list[Buffer] = []
    small: list[Buffer] = []
    for part in parts:
        if len(part) < JOINED_BYTES:
            small.append(part)
        else:
            merged += (b"".join(small), part)
            small = []
    merged.append(b"".join(small))
    return merged
