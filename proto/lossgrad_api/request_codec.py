"""Requests, bytes <-> plain values: ComputeLossRequest and StreamComputeLossRequest. Responses: response_codec.py."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.wire import (
    EMPTY,
    TENSOR_DATA,
    Buffer,
    CodecError,
    HeaderTooLarge,
    WireTensor,
    read_length,
    read_tag,
    read_varint,
    signed_varint,
    skip,
    string_field,
    tensor_head,
    to_signed,
    varint,
)

# All that a request holds beside its tensors' data. Bounded before it is parsed: 28 MiB of shape once became 485 MiB.
MAX_HEADER_BYTES: Final = 64 * 1024

# What each request of a stream message may add to that beside itself: its tag, its timeout and their lengths take 40.
_TAGGED_HEAD_BYTES: Final = 64
# And its trace context, where it has one.
_TRACEPARENT: Final = 4 << 3 | 2
_TRACESTATE: Final = 5 << 3 | 2
_TRACE_BYTES: Final = {_TRACEPARENT: 64, _TRACESTATE: 512}

# Tags: field number * 8 + wire type.
_IDEMPOTENCY_KEY: Final = 3 << 3 | 2
_MASK: Final = 4 << 3 | 2
_WEIGHT: Final = 5 << 3 | 2
_TARGET: Final = 6 << 3 | 2
_INPUT: Final = 7 << 3 | 2

_Value = TypeVar("_Value")
_Unpack = Callable[[bytes, int], tuple[Any, ...]]

_new: Final = tuple.__new__  # a NamedTuple's own constructor takes three times as long


class Layout(NamedTuple):
    """Where a message has its tensors: the tags of input, target, weight and mask, and of its idempotency key, 0 without."""

    key: int
    operands: tuple[int, int, int, int]


REQUEST_LAYOUT: Final = Layout(_IDEMPOTENCY_KEY, (_INPUT, _TARGET, _WEIGHT, _MASK))


class TooManyRequests(CodecError):
    """A stream message with more requests than a message may have."""


class RequestView(NamedTuple):
    """A ComputeLossRequest taken apart: everything but tensor data, and views of each tensor's data.

    `header` holds the request's bytes less the tensors' data and the idempotency key. It is no message, but equal
    headers mean equal requests up to those, so it serves as a key. A view is empty where there is no data.
    """

    header: bytes
    idempotency_key: str
    input: memoryview
    target: memoryview
    weight: memoryview
    mask: memoryview


class TaggedRequestView(NamedTuple):
    """One request of a StreamComputeLossRequest; the ComputeLossRequest is `data[start:end]`.

    `trace` is its traceparent and tracestate, None where it has neither. What is too long, or no text, is left out.
    """

    tag: int
    timeout_ns: int
    data: bytes
    start: int
    end: int
    trace: tuple[str, str] | None


def encode_compute_request(
    specs: Sequence[bytes],
    input: WireTensor,
    target: WireTensor,
    *,
    weight: WireTensor | None = None,
    mask: WireTensor | None = None,
    allow_broadcast: bool = False,
    idempotency_key: str = "",
) -> list[Buffer]:
    """Return a ComputeLossRequest as parts to join. `specs` are serialised LossSpec messages."""
    head = _request_head(tuple(specs), allow_broadcast)
    if idempotency_key:
        head += string_field(3, idempotency_key)
    parts: list[Buffer] = []
    for tag, tensor in ((_MASK, mask), (_WEIGHT, weight), (_TARGET, target), (_INPUT, input)):
        if tensor is not None:
            parts.append(head + tensor_head(tag, tensor.data_type, tensor.shape, len(tensor.data)))
            parts.append(tensor.data)
            head = b""
    return parts


def encode_stream_request(
    requests: Iterable[tuple[int, int, Sequence[Buffer]]], traces: Mapping[int, bytes] | None = None
) -> bytes:
    """Return a StreamComputeLossRequest of (tag, timeout in nanoseconds, parts of `encode_compute_request`).

    `traces` are what `encode_trace` gave for those requests that have a trace context, by tag.
    """
    message: list[Buffer] = []
    for tag, timeout_ns, parts in requests:
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        # scalar_field by hand: this is done for each of thousands of requests a second.
        head = (b"\x08" + signed_varint(tag) if tag else b"") + _request_field_head(timeout_ns, size)
        trace = traces.get(tag, b"") if traces else b""
        message.append(b"\x0a" + varint(len(head) + size + len(trace)) + head)
        message += parts
        if trace:
            message.append(trace)
    return b"".join(message)


def encode_trace(traceparent: str, tracestate: str = "") -> bytes:
    """Return the fields of a TaggedRequest for a trace context. A state that is too long is left out, as W3C allows."""
    state = string_field(5, tracestate) if tracestate and len(tracestate.encode()) <= _TRACE_BYTES[_TRACESTATE] else b""
    return string_field(4, traceparent) + state


def split_compute_request(data: bytes, start: int = 0, end: int | None = None) -> RequestView:
    """Take the ComputeLossRequest `data[start:end]` apart without copying tensor data. Raises CodecError."""
    return split(data, start, len(data) if end is None else end, REQUEST_LAYOUT)


def split(data: bytes, start: int, end: int, layout: Layout) -> RequestView:
    """Take the message `data[start:end]` apart without copying tensor data. Raises CodecError."""
    pieces, key_span, spans = _walk(data, start, end, layout)
    header = b"".join([data[begin:behind] for begin, behind in pieces])
    try:
        key = data[slice(*key_span)].decode()
    except UnicodeDecodeError:
        raise CodecError("idempotency_key is not UTF-8") from None
    view = memoryview(data)
    input, target, weight, mask = (view[slice(*spans[tag])] if tag in spans else EMPTY for tag in layout.operands)
    return RequestView(header, key, input, target, weight, mask)


_Span = tuple[int, int]


def _walk(data: bytes, start: int, end: int, layout: Layout) -> tuple[list[_Span], _Span, dict[int, _Span]]:
    """Return where the header's pieces are, the idempotency key, and each tensor's data by the tensor's tag."""
    key, tensors = layout
    spans: dict[int, _Span] = {}
    pieces: list[_Span] = []
    key_span = (0, 0)
    position = kept = start  # the header's bytes up to `kept` are in `pieces`
    limit = start + MAX_HEADER_BYTES  # grows with every byte of tensor data
    while position < end:
        begin = position
        tag, position = read_tag(data, position, end)
        if tag == key:
            pieces.append((kept, begin))
            key_start, position = read_length(data, position, end)
            key_span = (key_start, position)
            kept = position
        elif tag not in tensors:
            position = skip(data, tag, position, end)
        else:
            position, tensor_end = read_length(data, position, end)
            while position < tensor_end:
                field, position = read_tag(data, position, tensor_end)
                if field != TENSOR_DATA:
                    position = skip(data, field, position, tensor_end)
                else:
                    position, data_end = read_length(data, position, tensor_end)
                    pieces.append((kept, position))
                    spans[tag] = (position, data_end)
                    limit += data_end - position
                    position = kept = data_end
                if position > limit:
                    raise header_too_large(position - limit)
        if position > limit:
            raise header_too_large(position - limit)
    pieces.append((kept, end))
    return pieces, key_span, spans


class KnownRequests(Generic[_Value]):
    """Remembers a value for a request, and finds it again for a request that differs in its elements' values only.

    Callers send the same kind of request again and again. Of such a one all bytes but the tensors' data are equal and in
    the same places, which a few comparisons show in a tenth of the time that a walk over its fields takes.
    """

    _MAX_LENGTHS: Final = 4096
    _MAX_OF_ONE_LENGTH: Final = 4
    _MAX_HEADER_BYTES: Final = 2048

    def __init__(self, layout: Layout = REQUEST_LAYOUT, *, max_lengths: int = _MAX_LENGTHS) -> None:
        self._layout = layout
        self._max_lengths = max_lengths
        # By length: (what gives the header's pieces, the pieces, the spans of the operands' data, the value).
        self._known: dict[int, list[tuple[_Unpack, tuple[bytes, ...], list[_Span], _Value]]] = {}

    def remember(self, data: bytes, start: int, end: int, value: _Value) -> None:
        """Remember `value` for requests like `data[start:end]`, which was split before without an error."""
        pieces, key_span, spans = _walk(data, start, end, self._layout)
        if key_span != (0, 0) or sum(behind - begin for begin, behind in pieces) > self._MAX_HEADER_BYTES:
            return
        if len(self._known) >= self._max_lengths:  # rare enough that starting over is the simplest bound
            self._known.clear()
        alike = self._known.setdefault(end - start, [])
        del alike[self._MAX_OF_ONE_LENGTH - 1 :]
        form = "<"
        position = start
        for begin, behind in pieces:
            form += f"{begin - position}x{behind - begin}s"
            position = behind
        alike.insert(
            0,
            (
                struct.Struct(form).unpack_from,
                tuple(data[begin:behind] for begin, behind in pieces),
                [(spans[tag][0] - start, spans[tag][1] - start) for tag in self._layout.operands if tag in spans],
                value,
            ),
        )

    def find(self, data: bytes, start: int, end: int) -> tuple[_Value, tuple[memoryview, ...]] | None:
        """Return the value, and views of the data of those of input, target, weight, mask that have any; or None."""
        for unpack, pieces, spans, value in self._known.get(end - start, ()):
            if unpack(data, start) == pieces:
                view = memoryview(data)
                return value, tuple([view[start + begin : start + behind] for begin, behind in spans])
        return None


def parse_request_header(data: bytes, start: int = 0, end: int | None = None) -> pb.ComputeLossRequest:
    """Return the ComputeLossRequest `data[start:end]` as a message whose tensors have no data. Raises CodecError.

    Call it on bytes that `split_compute_request` took, which bounds what there is to parse.
    """
    try:
        return pb.ComputeLossRequest.FromString(
            without_data(data, start, len(data) if end is None else end, REQUEST_LAYOUT)
        )
    except DecodeError:
        raise CodecError("the bytes are not a lossgrad_api.v1.ComputeLossRequest") from None


def without_data(data: bytes, start: int, end: int, layout: Layout) -> bytes:
    """Return the message `data[start:end]` as one whose tensors have no data. Raises CodecError."""
    message: list[bytes] = []
    position = start
    while position < end:
        begin = position
        tag, position = read_tag(data, position, end)
        if tag not in layout.operands:
            position = skip(data, tag, position, end)
            message.append(data[begin:position])
            continue
        position, tensor_end = read_length(data, position, end)
        tensor: list[bytes] = []
        while position < tensor_end:
            begin = position
            field, position = read_tag(data, position, tensor_end)
            position = skip(data, field, position, tensor_end)
            if field != TENSOR_DATA:
                tensor.append(data[begin:position])
        body = b"".join(tensor)
        message += (varint(tag), varint(len(body)), body)
    return b"".join(message)


def split_stream_request(data: bytes, max_requests: int) -> list[TaggedRequestView]:
    """Take a StreamComputeLossRequest apart into its requests. Raises CodecError, TooManyRequests among them."""
    requests: list[TaggedRequestView] = []
    position = 0
    end = len(data)
    limit = MAX_HEADER_BYTES  # of `position`; grows with every request, and with every byte of one
    while position < end:
        field, position = read_tag(data, position, end)
        if field != (1 << 3 | 2):
            position = skip(data, field, position, end)
        else:
            if len(requests) == max_requests:
                raise TooManyRequests(f"the message holds more than {max_requests} requests; send fewer in one message")
            position, request_end = read_length(data, position, end)
            request, limit = _tagged_request(data, position, request_end, limit + _TAGGED_HEAD_BYTES)
            requests.append(request)
            position = request_end
        if position > limit:
            raise header_too_large(position - limit)
    return requests


def _tagged_request(data: bytes, position: int, end: int, limit: int) -> tuple[TaggedRequestView, int]:
    """Return the TaggedRequest `data[position:end]`, and `limit` moved by the bytes of its ComputeLossRequest."""
    # As most are written: tag, timeout, request, and nothing else. All but the last are less than _TAGGED_HEAD_BYTES.
    if position < end and data[position] == 1 << 3:
        tag, behind = read_varint(data, position + 1, end)
        timeout_ns = 0
        if behind < end and data[behind] == 2 << 3:
            timeout_ns, behind = read_varint(data, behind + 1, end)
        if behind < end and data[behind] == (3 << 3 | 2):
            start, behind = read_length(data, behind + 1, end)
            if behind == end:
                view = (to_signed(tag), to_signed(timeout_ns), data, start, end, None)
                return _new(TaggedRequestView, view), limit + end - start
    tag = timeout_ns = 0
    bodies: list[tuple[int, int]] = []
    trace = {_TRACEPARENT: "", _TRACESTATE: ""}
    while position < end:
        field, position = read_tag(data, position, end)
        if field in trace:
            start, position = read_length(data, position, end)
            if position - start <= _TRACE_BYTES[field]:
                if not trace[field]:
                    limit += position - start
                trace[field] = data[start:position].decode("ascii", "ignore")
        elif field == 1 << 3:
            tag, position = read_varint(data, position, end)
        elif field == 2 << 3:
            timeout_ns, position = read_varint(data, position, end)
        elif field == (3 << 3 | 2):
            start, position = read_length(data, position, end)
            bodies.append((start, position))
            limit += position - start
        else:
            position = skip(data, field, position, end)
        if position > limit:
            raise header_too_large(position - limit)
    if len(bodies) > 1:  # protobuf merges a field that comes twice, which is what parsing the concatenation does
        data = b"".join(data[start:stop] for start, stop in bodies)
        bodies = [(0, len(data))]
    start, stop = bodies[0] if bodies else (0, 0)
    context = (trace[_TRACEPARENT], trace[_TRACESTATE])
    return TaggedRequestView(
        to_signed(tag), to_signed(timeout_ns), data, start, stop, context if context[0] else None
    ), limit


def header_too_large(excess: int) -> HeaderTooLarge:
    """Return the error of a message with so many bytes too many beside its tensors' data."""
    return HeaderTooLarge(
        f"all that is not tensor data takes at least {MAX_HEADER_BYTES + excess} bytes, at most {MAX_HEADER_BYTES} are "
        "taken; tensor elements belong in Tensor.data"
    )


@lru_cache(maxsize=256)
def _request_field_head(timeout_ns: int, size: int) -> bytes:
    """Return what stands in a TaggedRequest between its tag and its ComputeLossRequest."""
    return (b"\x10" + signed_varint(timeout_ns) if timeout_ns else b"") + b"\x1a" + varint(size)


@lru_cache(maxsize=1024)
def _request_head(specs: tuple[bytes, ...], allow_broadcast: bool) -> bytes:
    head = b"".join(b"\x0a" + varint(len(spec)) + spec for spec in specs)
    return head + b"\x10\x01" if allow_broadcast else head
