"""Answers whose layout was seen before: read with few calls instead of a walk over their fields.

A server answers the same kind of request again and again. Of such answers all bytes but the numbers and the tensors' data
are equal and in the same places, as with requests (KnownRequests). A result is taken for known only if all those bytes
are compared and equal, so what is read is what the walk would have read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import count
from operator import itemgetter
from typing import Any, Final, NamedTuple

from lossgrad_api.wire import TENSOR_DATA, WireTensor, read_length, read_tag, read_varint, skip, to_signed

# Scalar, tensor, element count, sum of weights, non-finite count, gradients of target and of input: a ResultView's.
Fields = tuple[float | None, WireTensor | None, int, float, int, WireTensor | None, WireTensor | None]

_MAX_LENGTHS: Final = 1024
_MAX_OF_ONE_LENGTH: Final = 4
_MAX_FIXED_BYTES: Final = 512
_MISSES_TO_REPLACE: Final = 32

# Tags: field number * 8 + wire type. Of TaggedResponse and ComputeLossResponse:
_RESPONSE: Final = 2 << 3 | 2
_STATS: Final = 1 << 3 | 2
_RESULT: Final = 2 << 3 | 2
# Of LossResult:
_SCALAR: Final = 1 << 3 | 1
_TENSOR: Final = 2 << 3 | 2
_ELEMENT_COUNT: Final = 3 << 3
_WEIGHT_SUM: Final = 4 << 3 | 1
_NONFINITE_COUNT: Final = 5 << 3
_TARGET_GRADIENT: Final = 6 << 3 | 2
_INPUT_GRADIENT: Final = 7 << 3 | 2
_TENSORS: Final = (_TENSOR, _TARGET_GRADIENT, _INPUT_GRADIENT)

_new: Final = tuple.__new__  # a NamedTuple's own constructor takes three times as long


class Frame(NamedTuple):
    """Where things are in a TaggedResponse with stats and one result, from behind its tag."""

    stats_begin: int
    stats_end: int
    result_head: bytes
    result_begin: int


# By the length of all behind the tag, and the bytes up to the length of the stats.
_frames: dict[tuple[int, bytes], Frame] = {}


def known_frame(data: bytes, position: int, end: int) -> Frame | None:
    """Return the frame of the TaggedResponse whose part behind its tag is `data[position:end]`, at least five bytes.

    None if it is anything else than a response of stats and one result. Raises CodecError.
    """
    key = (end - position, data[position : position + 5])
    frame = _frames.get(key)
    if frame is None:
        frame = _frame(data, position, end)
        if frame is None:
            return None
        if len(_frames) >= _MAX_LENGTHS:
            _frames.clear()
        _frames[key] = frame
    return frame if data.startswith(frame.result_head, position + frame.stats_end) else None


def _frame(data: bytes, position: int, end: int) -> Frame | None:
    begin = position
    if data[position] != _RESPONSE:
        return None
    position, behind = read_length(data, position + 1, end)
    # The key must hold all that is read here but the result's head, so the stats' length has to be one byte.
    if behind != end or position + 2 > min(end, begin + 5) or data[position] != _STATS or data[position + 1] >= 0x80:
        return None
    stats_begin = position + 2
    stats_end = stats_begin + data[position + 1]
    if stats_end >= end or data[stats_end] != _RESULT:
        return None
    result_begin, behind = read_length(data, stats_end + 1, end)
    if behind != end:
        return None
    return Frame(stats_begin - begin, stats_end - begin, data[stats_end:result_begin], result_begin - begin)


class _TensorAt(NamedTuple):
    data_type: int
    shape: tuple[int, ...]
    begin: int  # of its data, from the result's start
    behind: int


class _Layout(NamedTuple):
    """Where things are in a result. `unpack` gives its numbers and the bytes between them; `fixed` picks the latter."""

    unpack: Callable[[bytes, int], tuple[Any, ...]]
    fixed: Callable[[tuple[Any, ...]], Any]
    expected: Any
    scalar_at: int | None
    weight_sum_at: int | None
    element_count: int
    nonfinite_count: int
    tensors: tuple[_TensorAt | None, ...]  # in the order of _TENSORS


# By length. Every value is replaced as a whole, so that threads may read while one writes.
_layouts: dict[int, tuple[_Layout, ...]] = {}
_misses: Final = count()


def known_result(data: bytes, view: memoryview, start: int, end: int) -> Fields | None:
    """Return the fields of the LossResult `data[start:end]` if its layout is known. `view` is a view of `data`."""
    for layout in _layouts.get(end - start, ()):
        unpack, fixed, expected, scalar_at, weight_sum_at, element_count, nonfinite_count, tensors = layout
        values = unpack(data, start)
        if fixed(values) == expected:
            tensor, target_gradient, input_gradient = tensors
            return (
                None if scalar_at is None else values[scalar_at],
                None if tensor is None else _tensor(view, start, tensor),
                element_count,
                0.0 if weight_sum_at is None else values[weight_sum_at],
                nonfinite_count,
                None if target_gradient is None else _tensor(view, start, target_gradient),
                None if input_gradient is None else _tensor(view, start, input_gradient),
            )
    return None


def remember_result(data: bytes, start: int, end: int) -> None:
    """Remember the layout of a LossResult that was read without an error, if it is one that servers send."""
    alike = _layouts.get(end - start, ())
    # Where counts differ from answer to answer, remembering each would cost more than it saves.
    if len(alike) == _MAX_OF_ONE_LENGTH and next(_misses) % _MISSES_TO_REPLACE:
        return
    layout = _layout(data, start, end)
    if layout is None:
        return
    if len(_layouts) >= _MAX_LENGTHS:  # rare enough that starting over is the simplest bound
        _layouts.clear()
    _layouts[end - start] = (layout, *alike[: _MAX_OF_ONE_LENGTH - 1])


def _tensor(view: memoryview, start: int, tensor: _TensorAt) -> WireTensor:
    data_type, shape, begin, behind = tensor
    return _new(WireTensor, (data_type, shape, view[start + begin : start + behind]))


def _layout(data: bytes, start: int, end: int) -> _Layout | None:
    """Return the layout; None where a field is unknown, comes twice, or is not in the order that servers write."""
    form = "<"
    kept = start  # the bytes up to here are in `form`
    kinds = ""  # of the values that `form` gives: f(ixed) or n(umber)
    numbers: dict[int, int] = {}
    counts = {_ELEMENT_COUNT: 0, _NONFINITE_COUNT: 0}
    tensors: dict[int, _TensorAt] = {}
    position = start
    last = 0
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag <= last:
            return None
        last = tag
        if tag in (_SCALAR, _WEIGHT_SUM):
            form += f"{position - kept}sd"
            kinds += "fn"
            numbers[tag] = len(kinds) - 1
            kept = position = skip(data, tag, position, end)
        elif tag in counts:
            value, position = read_varint(data, position, end)
            counts[tag] = to_signed(value)
        elif tag in _TENSORS:
            body, position = read_length(data, position, end)
            tensor = _tensor_at(data, start, body, position)
            if tensor is None:
                return None
            form += f"{start + tensor.begin - kept}s{tensor.behind - tensor.begin}x"
            kinds += "f"
            kept = position
            tensors[tag] = tensor
        else:
            return None
    if _SCALAR in numbers and _TENSOR in tensors:  # of a oneof; a server sets one
        return None
    form += f"{end - kept}s"
    kinds += "f"
    reader = struct.Struct(form)
    if sum(map(len, _fixed_values(kinds, reader.unpack_from(data, start)))) > _MAX_FIXED_BYTES:
        return None
    fixed = itemgetter(*(index for index, kind in enumerate(kinds) if kind == "f"))
    return _Layout(
        reader.unpack_from,
        fixed,
        fixed(reader.unpack_from(data, start)),
        numbers.get(_SCALAR),
        numbers.get(_WEIGHT_SUM),
        counts[_ELEMENT_COUNT],
        counts[_NONFINITE_COUNT],
        tuple(tensors.get(tag) for tag in _TENSORS),
    )


def _fixed_values(kinds: str, values: tuple[Any, ...]) -> list[bytes]:
    return [value for kind, value in zip(kinds, values, strict=True) if kind == "f"]


def _tensor_at(data: bytes, start: int, position: int, end: int) -> _TensorAt | None:
    """Return a tensor's place; None unless it is written as servers do: type, packed shape, data."""
    data_type = 0
    shape: tuple[int, ...] = ()
    last = 0
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag <= last:
            return None
        last = tag
        if tag == 1 << 3:
            data_type, position = read_varint(data, position, end)
            if data_type >= 1 << 31:
                return None
        elif tag == (2 << 3 | 2):
            body, position = read_length(data, position, end)
            shape = struct.unpack_from(f"<{(position - body) // 8}Q", data, body)
        elif tag == TENSOR_DATA:
            body, position = read_length(data, position, end)
            return _TensorAt(data_type, shape, body - start, position - start) if position == end else None
        else:
            return None
    return _TensorAt(data_type, shape, end - start, end - start)
