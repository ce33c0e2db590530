"""Responses, bytes <-> plain values: ComputeLossResponse and StreamComputeLossResponse. Requests: request_codec.py."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from lossgrad_api.known_results import known_frame, known_result, remember_result
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.wire import (
    EMPTY,
    TENSOR_DATA,
    Buffer,
    CodecError,
    WireTensor,
    read_length,
    read_tag,
    read_varint,
    scalar_field,
    signed_varint,
    skip,
    string_field,
    tensor_head,
    to_signed,
    varint,
)

_DOUBLE: Final = struct.Struct("<d")
_ZERO: Final = bytes(8)

_new: Final = tuple.__new__  # a NamedTuple's own constructor takes three times as long

# Tags: field number * 8 + wire type. Of ComputeLossResponse:
_STATS: Final = 1 << 3 | 2
_RESULT: Final = 2 << 3 | 2
_IDEMPOTENCY_KEY: Final = 3 << 3 | 2
_RESPONSE_FIELDS: Final = frozenset((_STATS, _RESULT, _IDEMPOTENCY_KEY))
# Of TaggedResponse.outcome:
_RESPONSE: Final = 2 << 3 | 2
_ERROR: Final = 3 << 3 | 2


class StatsView(NamedTuple):
    """The fields of ComputeStats, in order."""

    queue_ns: int
    pack_ns: int
    compute_ns: int
    unpack_ns: int
    batch_request_count: int
    batch_element_count: int
    device: str


class ResultView(NamedTuple):
    """The fields of LossResult, in order. Exactly one of `scalar` and `tensor` is set. `total` is a serialised LossState."""

    scalar: float | None
    tensor: WireTensor | None
    element_count: int
    weight_sum: float
    nonfinite_count: int
    target_gradient: WireTensor | None
    input_gradient: WireTensor | None
    total: bytes | None = None


class ResponseView(NamedTuple):
    """The fields of ComputeLossResponse, in order."""

    stats: StatsView
    results: tuple[ResultView, ...]
    idempotency_key: str


def encode_compute_response(stats: StatsView, results: Iterable[ResultView], idempotency_key: str = "") -> list[Buffer]:
    """Return a ComputeLossResponse as parts to join."""
    parts: list[Buffer] = [encode_stats(stats)]
    for result in results:
        parts += result_parts(result)
    if idempotency_key:
        parts.append(string_field(3, idempotency_key))
    return parts


def encode_stats(stats: StatsView) -> bytes:
    """Return the field of a ComputeLossResponse that holds its ComputeStats."""
    queue_ns, pack_ns, compute_ns, unpack_ns, request_count, element_count, device = stats
    body = pb.ComputeStats(
        queue_ns=queue_ns,
        pack_ns=pack_ns,
        compute_ns=compute_ns,
        unpack_ns=unpack_ns,
        batch_request_count=request_count,
        batch_element_count=element_count,
        device=device,
    ).SerializeToString()
    return b"\x0a" + varint(len(body)) + body


def counts_fields(element_count: int, weight_sum: float, nonfinite_count: int) -> bytes:
    """Return the fields 3 to 5 of a LossResult."""
    packed = _DOUBLE.pack(weight_sum)
    weight = b"\x21" + packed if packed != _ZERO else b""
    return scalar_field(3, element_count) + weight + scalar_field(5, nonfinite_count)


def result_parts(result: ResultView) -> list[Buffer]:
    """Return a LossResult, as the field numbered 2 of what holds it, as parts to join."""
    scalar, tensor, element_count, weight_sum, nonfinite_count, target_gradient, input_gradient, total = result
    parts: list[Buffer] = [b""]
    head = b"" if scalar is None else b"\x09" + _DOUBLE.pack(scalar)
    size = 0
    if tensor is not None:
        size += len(tensor.data)
        parts += (head + tensor_head(2 << 3 | 2, tensor.data_type, tensor.shape, len(tensor.data)), tensor.data)
        head = b""
    head += counts_fields(element_count, weight_sum, nonfinite_count)
    for tag, gradient in ((6 << 3 | 2, target_gradient), (7 << 3 | 2, input_gradient)):
        if gradient is not None:
            data = gradient.data
            size += len(data)
            parts += (head + tensor_head(tag, gradient.data_type, gradient.shape, len(data)), data)
            head = b""
    parts.append(head if total is None else head + b"\x42" + varint(len(total)) + total)
    size += sum(map(len, parts[1::2]))
    parts[0] = b"\x12" + varint(size)
    return parts


def encode_stream_response(responses: Iterable[tuple[int, Sequence[Buffer] | status_pb2.Status]]) -> bytes:
    """Return a StreamComputeLossResponse of (tag, parts of `encode_compute_response` or the error)."""
    return b"".join(stream_response_parts(responses))


def stream_response_parts(responses: Iterable[tuple[int, Sequence[Buffer] | status_pb2.Status]]) -> list[Buffer]:
    """Return what `encode_stream_response` does as parts to join."""
    message: list[Buffer] = []
    for tag, outcome in responses:
        parts: Sequence[Buffer]
        if isinstance(outcome, status_pb2.Status):
            field, parts = b"\x1a", [outcome.SerializeToString()]
        else:
            field, parts = b"\x12", outcome
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        # scalar_field by hand: this is done for each of thousands of answers a second.
        head = (b"\x08" + signed_varint(tag) if tag else b"") + field + varint(size)
        message.append(b"\x0a" + varint(len(head) + size) + head)
        message += parts
    return message


def decode_compute_response(
    data: bytes, start: int = 0, end: int | None = None, *, view: memoryview | None = None
) -> ResponseView:
    """Return the ComputeLossResponse `data[start:end]`. Raises CodecError.

    Its tensors' data are views into `data`: slices of `view`, which is one of all of `data`, if it is given.
    """
    return _decode_response(data, memoryview(data) if view is None else view, start, len(data) if end is None else end)


def _read_span(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Do what read_length does, in half the time for the lengths of one or two bytes that small answers have."""
    if position + 1 < end:
        length = data[position]
        start = position + 1
        if length >= 0x80 and (high := data[start]) < 0x80:
            length += (high << 7) - 0x80
            start += 1
        if length <= end - start and (length < 0x80 or start > position + 1):
            return start, start + length
    return read_length(data, position, end)


def _decode_response(data: bytes, view: memoryview, position: int, end: int) -> ResponseView:
    stats = b""
    results: list[ResultView] = []
    idempotency_key = ""
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag not in _RESPONSE_FIELDS:
            position = skip(data, tag, position, end)
            continue
        body, position = _read_span(data, position, end)
        if tag == _STATS:
            stats += data[body:position]  # where there are several they merge, as parsing the concatenation does
        elif tag == _RESULT:
            results.append(decode_result(data, view, body, position))
        else:
            try:
                idempotency_key = data[body:position].decode()
            except UnicodeDecodeError:
                raise CodecError("idempotency_key is not UTF-8") from None
    return _new(ResponseView, (_decode_stats(stats), tuple(results), idempotency_key))


@lru_cache(maxsize=64)
def _decode_stats(body: bytes) -> StatsView:
    """Return a ComputeStats. Requests of a message that are computed in one batch all have the same."""
    if body[:1] == b"\x08":
        queue_ns, position = read_varint(body, 1, len(body))
        batch = _decode_stats_of_batch(body[position:])
        if batch is not None:
            return _new(StatsView, (to_signed(queue_ns), *batch))
    stats = _parse_stats(body)
    return _new(StatsView, (stats.queue_ns, *_batch_fields(stats)))


@lru_cache(maxsize=64)
def _decode_stats_of_batch(body: bytes) -> tuple[int, int, int, int, int, str] | None:
    """Return all of a ComputeStats but its first field; None where that is in `body`, too, which would set it again.

    What the answers of a batch have in common is read once.
    """
    stats = _parse_stats(b"\x08\x01" + body)
    if stats.queue_ns != 1 or _parse_stats(body).queue_ns:
        return None
    return _batch_fields(stats)


def _batch_fields(stats: pb.ComputeStats) -> tuple[int, int, int, int, int, str]:
    return (
        stats.pack_ns,
        stats.compute_ns,
        stats.unpack_ns,
        stats.batch_request_count,
        stats.batch_element_count,
        stats.device,
    )


def _parse_stats(body: bytes) -> pb.ComputeStats:
    try:
        return pb.ComputeStats.FromString(body)
    except DecodeError:
        raise CodecError("the bytes are not a lossgrad_api.v1.ComputeLossResponse") from None


def decode_result(data: bytes, view: memoryview, position: int, end: int) -> ResultView:
    """Return the LossResult `data[position:end]`. `view` is a view of `data`. Raises CodecError."""
    known = known_result(data, view, position, end)
    if known is not None:
        return _new(ResultView, known)
    result = _walk_result(data, view, position, end)
    if result.total is None:  # of those that hold one, no two are alike
        remember_result(data, position, end)
    return result


def _walk_result(data: bytes, view: memoryview, position: int, end: int) -> ResultView:
    scalar: float | None = None
    tensors: dict[int, WireTensor] = {}
    element_count = nonfinite_count = 0
    weight_sum = 0.0
    total: bytes | None = None
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag == (1 << 3 | 1):
            behind = skip(data, tag, position, end)
            (scalar,) = _DOUBLE.unpack_from(data, position)
            tensors.pop(2, None)  # a oneof: the last one set wins
            position = behind
        elif tag == 3 << 3:
            element_count, position = read_varint(data, position, end)
        elif tag == (4 << 3 | 1):
            behind = skip(data, tag, position, end)
            (weight_sum,) = _DOUBLE.unpack_from(data, position)
            position = behind
        elif tag == 5 << 3:
            nonfinite_count, position = read_varint(data, position, end)
        elif tag in (2 << 3 | 2, 6 << 3 | 2, 7 << 3 | 2):
            body, position = read_length(data, position, end)
            number = tag >> 3
            tensors[number] = _decode_tensor(data, view, body, position, tensors.get(number))
            if number == 2:
                scalar = None
        elif tag == (8 << 3 | 2):
            body, position = read_length(data, position, end)
            total = (total or b"") + data[body:position]  # a message that comes twice is merged
        else:
            position = skip(data, tag, position, end)
    return ResultView(
        scalar,
        tensors.get(2),
        to_signed(element_count),
        weight_sum,
        to_signed(nonfinite_count),
        tensors.get(6),
        tensors.get(7),
        total,
    )


def _decode_tensor(
    data: bytes, view: memoryview, position: int, end: int, merged_into: WireTensor | None = None
) -> WireTensor:
    data_type, shape, elements = merged_into or (0, (), EMPTY)
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag == 1 << 3:
            data_type, position = read_varint(data, position, end)
            data_type = (data_type + (1 << 31) & 0xFFFF_FFFF) - (1 << 31)  # an enum is an int32
        elif tag == (2 << 3 | 2):
            body, position = read_length(data, position, end)
            if (position - body) % 8:
                raise CodecError(
                    f"a packed shape of {position - body} bytes is not a whole number of 8-byte dimensions"
                )
            shape += struct.unpack_from(f"<{(position - body) // 8}Q", data, body)
        elif tag == (2 << 3 | 1):
            behind = skip(data, tag, position, end)
            shape += struct.unpack_from("<Q", data, position)
            position = behind
        elif tag == TENSOR_DATA:
            body, position = read_length(data, position, end)
            elements = view[body:position]
        else:
            position = skip(data, tag, position, end)
    return WireTensor(data_type, shape, elements)


def decode_stream_response(data: bytes) -> list[tuple[int, ResponseView | status_pb2.Status]]:
    """Return the (tag, answer or error) pairs of a StreamComputeLossResponse. Raises CodecError."""
    responses: list[tuple[int, ResponseView | status_pb2.Status]] = []
    view = memoryview(data)
    position = 0
    end = len(data)
    while position < end:
        field, position = read_tag(data, position, end)
        if field != (1 << 3 | 2):
            position = skip(data, field, position, end)
            continue
        position, response_end = _read_span(data, position, end)
        responses.append(
            _usual_response(data, view, position, response_end) or _tagged_response(data, view, position, response_end)
        )
        position = response_end
    return responses


def _usual_response(
    data: bytes, view: memoryview, position: int, end: int
) -> tuple[int, ResponseView | status_pb2.Status] | None:
    """Return the TaggedResponse `data[position:end]` if it is as servers mostly send it, otherwise None.

    That is: a tag; a response, with stats and one result whose layout is known; nothing else. Most answers are, and
    reading them with all that could be otherwise in mind takes twice as long.
    """
    if end - position < 16 or data[position] != 1 << 3:
        return None
    tag, position = read_varint(data, position + 1, end)
    frame = known_frame(data, position, end)
    if frame is None:
        return None
    stats_begin, stats_end, _, result_begin = frame
    result = known_result(data, view, position + result_begin, end)
    if result is None:
        return None
    stats = _decode_stats(data[position + stats_begin : position + stats_end])
    return to_signed(tag), _new(ResponseView, (stats, (_new(ResultView, result),), ""))


def _tagged_response(
    data: bytes, view: memoryview, position: int, end: int
) -> tuple[int, ResponseView | status_pb2.Status]:
    tag = 0
    member = 0  # of the oneof: the last one set wins, and protobuf merges one that comes twice in a row
    spans: list[tuple[int, int]] = []
    while position < end:
        field, position = read_tag(data, position, end)
        if field == 1 << 3:
            tag, position = read_varint(data, position, end)
        elif field in (_RESPONSE, _ERROR):
            body, position = read_length(data, position, end)
            if field != member and spans:
                _outcome(data, view, member, spans)  # what is not kept must be readable all the same
                spans.clear()
            member = field
            spans.append((body, position))
        else:
            position = skip(data, field, position, end)
    if not spans:
        raise CodecError(f"the answer to request {to_signed(tag)} holds neither a response nor an error")
    return to_signed(tag), _outcome(data, view, member, spans)


def _outcome(
    data: bytes, view: memoryview, member: int, spans: list[tuple[int, int]]
) -> ResponseView | status_pb2.Status:
    start, end = spans[0]
    if len(spans) > 1:  # parsing the concatenation is what merging does
        data = b"".join(data[start:end] for start, end in spans)
        view = memoryview(data)
        start, end = 0, len(data)
    if member == _RESPONSE:
        return _decode_response(data, view, start, end)
    try:
        return status_pb2.Status.FromString(data[start:end])
    except DecodeError:
        raise CodecError("the bytes are not a google.rpc.Status") from None
