"""AccumulateLoss's messages, bytes <-> plain values. What they hold: request_codec.py, response_codec.py, accumulation.py.

Slices' tensor data are views into the received bytes, as everywhere. States stay bytes: AccumulationReader reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from lossgrad_api.request_codec import MAX_HEADER_BYTES, Layout, RequestView, header_too_large, split, without_data
from lossgrad_api.response_codec import ResultView, decode_result, result_parts
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.wire import (
    Buffer,
    CodecError,
    WireTensor,
    read_length,
    read_tag,
    read_varint,
    scalar_field,
    skip,
    string_field,
    tensor_head,
    to_signed,
    varint,
)

# Tags: field number * 8 + wire type. Of AccumulateLossRequest.part and AccumulateLossResponse.part:
_CONFIG: Final = 1 << 3 | 2
_SLICE: Final = 2 << 3 | 2
_RESULT: Final = 1 << 3 | 2
_SNAPSHOT: Final = 2 << 3 | 2
_TOTAL: Final = 3 << 3 | 2
# Of AccumulationConfig:
_RESUME_FROM: Final = 3 << 3 | 2
# Of Slice and SliceResult:
_SEQUENCE: Final = 1 << 3
_GROUP: Final = 2 << 3 | 2
_RESULTS: Final = 2 << 3 | 2
_MASK: Final = 3 << 3 | 2
_WEIGHT: Final = 4 << 3 | 2
_TARGET: Final = 5 << 3 | 2
_INPUT: Final = 6 << 3 | 2

SLICE_LAYOUT: Final = Layout(0, (_INPUT, _TARGET, _WEIGHT, _MASK))

_Span = tuple[bytes, int, int]


class ConfigView(NamedTuple):
    """An AccumulationConfig taken apart: all but `resume_from` as a message, and that as a span of bytes, if it is set."""

    config: pb.AccumulationConfig
    resume_from: _Span | None


class SliceView(NamedTuple):
    """A Slice taken apart: its number, its group, and where its tensors are: in `data[start:end]`, a Slice in itself."""

    sequence: int
    group: str
    data: bytes
    start: int
    end: int


class SliceResultView(NamedTuple):
    """The fields of SliceResult, in order."""

    sequence: int
    results: tuple[ResultView, ...]


class StateView(NamedTuple):
    """A snapshot, or the total: the Accumulation `data[start:end]`."""

    is_total: bool
    data: bytes
    start: int
    end: int


# ---- Writing ----


def encode_config_request(config: pb.AccumulationConfig, resume_from: Sequence[bytes] = ()) -> list[Buffer]:
    """Return an AccumulateLossRequest that holds a config, as parts to join.

    `config` is without `resume_from`, whose parts are those of `Accumulation.encoded_parts`; none where there is no state.
    """
    head = config.SerializeToString(deterministic=True)
    if resume_from:
        head += varint(_RESUME_FROM) + varint(sum(map(len, resume_from)))
    size = len(head) + sum(map(len, resume_from))
    return [varint(_CONFIG) + varint(size) + head, *resume_from]


def encode_slice_request(
    sequence: int,
    input: WireTensor,
    target: WireTensor,
    *,
    group: str = "",
    weight: WireTensor | None = None,
    mask: WireTensor | None = None,
) -> list[Buffer]:
    """Return an AccumulateLossRequest that holds a slice, as parts to join."""
    head = scalar_field(1, sequence) + string_field(2, group)
    parts: list[Buffer] = [b""]
    size = 0
    for tag, tensor in ((_MASK, mask), (_WEIGHT, weight), (_TARGET, target), (_INPUT, input)):
        if tensor is not None:
            head += tensor_head(tag, tensor.data_type, tensor.shape, len(tensor.data))
            parts += (head, tensor.data)
            size += len(head) + len(tensor.data)
            head = b""
    parts[0] = varint(_SLICE) + varint(size)
    return parts


def encode_slice_result(sequence: int, results: Iterable[ResultView]) -> list[Buffer]:
    """Return an AccumulateLossResponse that holds a slice's result, as parts to join."""
    parts: list[Buffer] = [b""]
    for result in results:
        parts += result_parts(result)
    head = scalar_field(1, sequence)
    parts[0] = varint(_RESULT) + varint(len(head) + sum(map(len, parts))) + head
    return parts


def encode_state_response(state: Sequence[bytes], *, is_total: bool) -> list[Buffer]:
    """Return an AccumulateLossResponse that holds a state, given as `Accumulation.encoded_parts`, as parts to join."""
    return [varint(_TOTAL if is_total else _SNAPSHOT) + varint(sum(map(len, state))), *state]


# ---- Reading ----


def split_accumulate_request(data: bytes) -> ConfigView | SliceView | None:
    """Take an AccumulateLossRequest apart without copying tensor data; None where its part is not set. Raises CodecError.

    All of it but tensors and the state is at most 64 KiB. The state is not looked into.
    """
    member, spans = _members(data, (_CONFIG, _SLICE))
    if not spans:
        return None
    body, start, end = _joined(data, spans)
    return _split_config(body, start, end) if member == _CONFIG else _split_slice(body, start, end)


def split_slice(data: bytes, start: int, end: int) -> RequestView:
    """Take the Slice `data[start:end]` apart without copying tensor data. Raises CodecError."""
    return split(data, start, end, SLICE_LAYOUT)


def parse_slice_header(data: bytes, start: int, end: int) -> pb.Slice:
    """Return the Slice `data[start:end]` as a message whose tensors have no data. Raises CodecError.

    Call it on bytes that `split_slice` took, which bounds what there is to parse.
    """
    try:
        return pb.Slice.FromString(without_data(data, start, end, SLICE_LAYOUT))
    except DecodeError:
        raise CodecError("the bytes are not a lossgrad_api.v1.Slice") from None


def decode_accumulate_response(data: bytes) -> SliceResultView | StateView:
    """Return the part that an AccumulateLossResponse holds. Tensors' data are views into `data`. Raises CodecError."""
    member, spans = _members(data, (_RESULT, _SNAPSHOT, _TOTAL))
    if not spans:
        raise CodecError("the answer holds neither a slice's result nor a state")
    body, start, end = _joined(data, spans)
    if member == _RESULT:
        return _decode_slice_result(body, start, end)
    return StateView(member == _TOTAL, body, start, end)


def _members(data: bytes, tags: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """Return which member of a message's oneof is set, and where it is: several places where it came several times."""
    member = 0
    spans: list[tuple[int, int]] = []
    position = 0
    end = len(data)
    limit = MAX_HEADER_BYTES  # of `position`; grows with every byte of a member
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag not in tags:
            position = skip(data, tag, position, end)
        else:
            start, position = read_length(data, position, end)
            if tag != member:
                spans.clear()  # the last one set wins
                member = tag
            spans.append((start, position))
            limit += position - start
        if position > limit:
            raise header_too_large(position - limit)
    return member, spans


def _joined(data: bytes, spans: list[tuple[int, int]]) -> _Span:
    """Return one span for all: where a field comes twice protobuf merges it, as parsing the concatenation does."""
    if len(spans) == 1:
        return data, *spans[0]
    data = b"".join(data[start:end] for start, end in spans)
    return data, 0, len(data)


def _split_config(data: bytes, position: int, end: int) -> ConfigView:
    head: list[bytes] = []
    spans: list[tuple[int, int]] = []
    limit = position + MAX_HEADER_BYTES  # grows with every byte of the state
    while position < end:
        begin = position
        tag, position = read_tag(data, position, end)
        if tag == _RESUME_FROM:
            start, position = read_length(data, position, end)
            spans.append((start, position))
            limit += position - start
        else:
            position = skip(data, tag, position, end)
            head.append(data[begin:position])
        if position > limit:
            raise header_too_large(position - limit)
    try:
        config = pb.AccumulationConfig.FromString(b"".join(head))
    except DecodeError:
        raise CodecError("the bytes are not a lossgrad_api.v1.AccumulationConfig") from None
    return ConfigView(config, _joined(data, spans) if spans else None)


def _split_slice(data: bytes, start: int, end: int) -> SliceView:
    sequence = 0
    group = b""
    position = start
    limit = start + MAX_HEADER_BYTES  # grows with every byte of a tensor; `split_slice` looks into those
    is_leading = True
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag == _SEQUENCE:
            sequence, position = read_varint(data, position, end)
        elif tag == _GROUP:
            begin, position = read_length(data, position, end)
            group = data[begin:position]
        else:
            is_leading = False
            begin = position
            position = skip(data, tag, position, end)
            if tag in SLICE_LAYOUT.operands:
                limit += position - begin
        if position > limit:
            raise header_too_large(position - limit)
        if is_leading:  # so that what follows is alike for slices that differ in these two
            start = position
    try:
        return SliceView(to_signed(sequence), group.decode(), data, start, end)
    except UnicodeDecodeError:
        raise CodecError("group is not UTF-8") from None


def _decode_slice_result(data: bytes, position: int, end: int) -> SliceResultView:
    sequence = 0
    results: list[ResultView] = []
    view = memoryview(data)
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag == _SEQUENCE:
            sequence, position = read_varint(data, position, end)
        elif tag == _RESULTS:
            start, position = read_length(data, position, end)
            results.append(decode_result(data, view, start, position))
        else:
            position = skip(data, tag, position, end)
    return SliceResultView(to_signed(sequence), tuple(results))
