"""Requests, bytes <-> plain values: ComputeLossRequest and StreamComputeLossRequest. Responses: response_codec.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

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
    scalar_field,
    skip,
    string_field,
    tensor_head,
    to_signed,
    varint,
)

# All that a request holds beside its tensors' data. Bounded before it is parsed: 28 MiB of shape once became 485 MiB.
MAX_HEADER_BYTES: Final = 64 * 1024

# Tags: field number * 8 + wire type.
_IDEMPOTENCY_KEY: Final = 3 << 3 | 2
_MASK: Final = 4 << 3 | 2
_WEIGHT: Final = 5 << 3 | 2
_TARGET: Final = 6 << 3 | 2
_INPUT: Final = 7 << 3 | 2
_TENSORS: Final = frozenset((_MASK, _WEIGHT, _TARGET, _INPUT))


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
    """One request of a StreamComputeLossRequest; the ComputeLossRequest is `data[start:end]`."""

    tag: int
    timeout_ns: int
    data: bytes
    start: int
    end: int


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
    head = _request_head(tuple(specs), allow_broadcast, idempotency_key)
    parts: list[Buffer] = []
    for tag, tensor in ((_MASK, mask), (_WEIGHT, weight), (_TARGET, target), (_INPUT, input)):
        if tensor is not None:
            parts.append(head + tensor_head(tag, tensor.data_type, tensor.shape, len(tensor.data)))
            parts.append(tensor.data)
            head = b""
    return parts


def encode_stream_request(requests: Iterable[tuple[int, int, Sequence[Buffer]]]) -> bytes:
    """Return a StreamComputeLossRequest of (tag, timeout in nanoseconds, parts of `encode_compute_request`)."""
    message: list[Buffer] = []
    for tag, timeout_ns, parts in requests:
        size = sum(map(len, parts))
        head = scalar_field(1, tag) + scalar_field(2, timeout_ns) + b"\x1a" + varint(size)
        message.append(b"\x0a" + varint(len(head) + size) + head)
        message.extend(parts)
    return b"".join(message)


def split_compute_request(data: bytes, start: int = 0, end: int | None = None) -> RequestView:
    """Take the ComputeLossRequest `data[start:end]` apart without copying tensor data. Raises CodecError."""
    end = len(data) if end is None else end
    view = memoryview(data)
    views: dict[int, memoryview] = {}
    header: list[bytes] = []
    position = kept = start  # the header's bytes up to `kept` are in `header`
    limit = start + MAX_HEADER_BYTES  # grows with every byte of tensor data
    idempotency_key = b""
    while position < end:
        begin = position
        tag, position = read_tag(data, position, end)
        if tag == _IDEMPOTENCY_KEY:
            header.append(data[kept:begin])
            key_start, position = read_length(data, position, end)
            idempotency_key = data[key_start : min(position, limit)]
            kept = position
        elif tag not in _TENSORS:
            position = skip(data, tag, position, end)
        else:
            position, tensor_end = read_length(data, position, end)
            while position < tensor_end:
                field, position = read_tag(data, position, tensor_end)
                if field != TENSOR_DATA:
                    position = skip(data, field, position, tensor_end)
                else:
                    position, data_end = read_length(data, position, tensor_end)
                    header.append(data[kept:position])
                    views[tag] = view[position:data_end]
                    limit += data_end - position
                    position = kept = data_end
                if position > limit:
                    raise _header_too_large(position - limit)
        if position > limit:
            raise _header_too_large(position - limit)
    header.append(data[kept:end])
    try:
        key = idempotency_key.decode()
    except UnicodeDecodeError:
        raise CodecError("idempotency_key is not UTF-8") from None
    get = views.get
    return RequestView(
        b"".join(header), key, get(_INPUT, EMPTY), get(_TARGET, EMPTY), get(_WEIGHT, EMPTY), get(_MASK, EMPTY)
    )


def parse_request_header(data: bytes, start: int = 0, end: int | None = None) -> pb.ComputeLossRequest:
    """Return the ComputeLossRequest `data[start:end]` as a message whose tensors have no data. Raises CodecError.

    Call it on bytes that `split_compute_request` took, which bounds what there is to parse.
    """
    end = len(data) if end is None else end
    message: list[bytes] = []
    position = start
    while position < end:
        begin = position
        tag, position = read_tag(data, position, end)
        if tag not in _TENSORS:
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
    try:
        return pb.ComputeLossRequest.FromString(b"".join(message))
    except DecodeError:
        raise CodecError("the bytes are not a lossgrad_api.v1.ComputeLossRequest") from None


def split_stream_request(data: bytes, max_requests: int) -> list[TaggedRequestView]:
    """Take a StreamComputeLossRequest apart into its requests. Raises CodecError, also for more than `max_requests`."""
    requests: list[TaggedRequestView] = []
    position = 0
    end = len(data)
    unknown = 0
    while position < end:
        begin = position
        field, position = read_tag(data, position, end)
        if field != (1 << 3 | 2):
            position = skip(data, field, position, end)
            unknown += position - begin
        else:
            position, request_end = read_length(data, position, end)
            request, extra = _tagged_request(data, position, request_end)
            requests.append(request)
            unknown += extra
            position = request_end
        if len(requests) > max_requests:
            raise CodecError(f"the message holds more than {max_requests} requests; send fewer in one message")
        if unknown > MAX_HEADER_BYTES:
            raise _header_too_large(unknown - MAX_HEADER_BYTES)
    return requests


def _tagged_request(data: bytes, position: int, end: int) -> tuple[TaggedRequestView, int]:
    tag = timeout_ns = unknown = 0
    bodies: list[tuple[int, int]] = []
    while position < end:
        begin = position
        field, position = read_tag(data, position, end)
        if field == 1 << 3:
            tag, position = read_varint(data, position, end)
        elif field == 2 << 3:
            timeout_ns, position = read_varint(data, position, end)
        elif field == (3 << 3 | 2):
            start, position = read_length(data, position, end)
            bodies.append((start, position))
        else:
            position = skip(data, field, position, end)
            unknown += position - begin
    if len(bodies) > 1:  # protobuf merges a field that comes twice, which is what parsing the concatenation does
        data = b"".join(data[start:stop] for start, stop in bodies)
        bodies = [(0, len(data))]
    start, stop = bodies[0] if bodies else (0, 0)
    return TaggedRequestView(to_signed(tag), to_signed(timeout_ns), data, start, stop), unknown


def _header_too_large(excess: int) -> HeaderTooLarge:
    return HeaderTooLarge(
        f"all that is not tensor data takes at least {MAX_HEADER_BYTES + excess} bytes, at most {MAX_HEADER_BYTES} are "
        "taken; tensor elements belong in Tensor.data"
    )


@lru_cache(maxsize=1024)
def _request_head(specs: tuple[bytes, ...], allow_broadcast: bool, idempotency_key: str) -> bytes:
    head = b"".join(b"\x0a" + varint(len(spec)) + spec for spec in specs)
    if allow_broadcast:
        head += b"\x10\x01"
    return head + string_field(3, idempotency_key)
