"""Messages of the contract as hypothesis makes them: as generated classes, and as bytes in every form that is legal.

Bytes are written here by hand, so that what the codec reads was written by neither the codec nor the generated classes:
fields in any order and more than once, unpacked and overlong numbers, unknown fields and groups.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from google.protobuf import any_pb2
from google.rpc import status_pb2
from hypothesis import strategies as st

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2

Bytes = st.SearchStrategy[bytes]

INT64 = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from([0, 1, -1, 127, 128, 16383, 16384, 1 << 32]))
DOUBLE = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0]))
KEY = st.text(max_size=20)
EXTENT = st.one_of(st.integers(0, 5), st.sampled_from([1 << 32, 1 << 63, (1 << 64) - 1]))

tensors = st.builds(
    tensor_pb2.Tensor,
    data_type=st.integers(0, 12),
    shape=st.lists(EXTENT, max_size=4),
    data=st.binary(max_size=40),
)
specs = st.builds(
    pb.LossSpec,
    smooth_l1=st.none() | st.builds(pb.SmoothL1Loss, beta=st.none() | DOUBLE),
    reduction=st.integers(0, 6),
    include_gradient=st.booleans(),
    denominator=st.none() | DOUBLE,
    gradient_scale=st.none() | DOUBLE,
    include_total=st.booleans(),
)
requests = st.builds(
    pb.ComputeLossRequest,
    specs=st.lists(specs, max_size=3),
    allow_broadcast=st.booleans(),
    idempotency_key=KEY,
    mask=st.none() | tensors,
    weight=st.none() | tensors,
    target=st.none() | tensors,
    input=st.none() | tensors,
)
TRACE_TEXT = st.just("") | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=70)
stream_requests = st.builds(
    pb.StreamComputeLossRequest,
    requests=st.lists(
        st.builds(
            pb.TaggedRequest,
            tag=INT64,
            timeout_ns=INT64,
            request=st.none() | requests,
            traceparent=TRACE_TEXT,
            tracestate=TRACE_TEXT,
        ),
        max_size=4,
    ),
)


def _one_of_loss(result: pb.LossResult, scalar: float | None, tensor: tensor_pb2.Tensor) -> pb.LossResult:
    if scalar is None:
        result.tensor.CopyFrom(tensor)
    else:
        result.scalar = scalar
    return result


totals = st.builds(
    pb.LossState,
    partial_sums=st.lists(DOUBLE, max_size=3),
    element_count=INT64,
    weight_sum=DOUBLE,
    min=DOUBLE,
    max=DOUBLE,
    nonfinite_count=INT64,
    weight_partial_sums=st.lists(DOUBLE, max_size=2),
)
results = st.builds(
    _one_of_loss,
    st.builds(
        pb.LossResult,
        element_count=INT64,
        weight_sum=DOUBLE,
        nonfinite_count=INT64,
        target_gradient=st.none() | tensors,
        input_gradient=st.none() | tensors,
        total=st.none() | totals,
    ),
    st.none() | DOUBLE,
    tensors,
)
stats = st.builds(
    pb.ComputeStats,
    queue_ns=INT64,
    pack_ns=INT64,
    compute_ns=INT64,
    unpack_ns=INT64,
    batch_request_count=st.integers(0, (1 << 31) - 1),
    batch_element_count=INT64,
    device=KEY,
)
responses = st.builds(pb.ComputeLossResponse, stats=stats, results=st.lists(results, max_size=3), idempotency_key=KEY)
statuses = st.builds(
    status_pb2.Status,
    code=st.integers(0, 16),
    message=KEY,
    details=st.lists(st.builds(any_pb2.Any, type_url=KEY, value=st.binary(max_size=10)), max_size=2),
)


def _tagged_response(tag: int, outcome: pb.ComputeLossResponse | status_pb2.Status) -> pb.TaggedResponse:
    if isinstance(outcome, status_pb2.Status):
        return pb.TaggedResponse(tag=tag, error=outcome)
    return pb.TaggedResponse(tag=tag, response=outcome)


stream_responses = st.builds(
    pb.StreamComputeLossResponse,
    responses=st.lists(st.builds(_tagged_response, INT64, st.one_of(responses, statuses)), max_size=4),
)


# ---- Bytes, by hand ----


def varint(value: int, padding: int = 0) -> bytes:
    """Return an integer as a varint, with `padding` more bytes than it needs."""
    out = bytearray()
    value &= 0xFFFF_FFFF_FFFF_FFFF
    while value >= 0x80 or padding:
        if value < 0x80:
            padding -= 1
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def key(number: int, wire_type: int, padding: int = 0) -> bytes:
    """Return a field's tag."""
    return varint(number << 3 | wire_type, padding)


def delimited(number: int, payload: bytes, padding: int = 0) -> bytes:
    """Return a length-delimited field."""
    return key(number, 2) + varint(len(payload), padding) + payload


def number_field(number: int) -> Bytes:
    """Give a varint field, sometimes overlong."""

    def build(value: int, tag_padding: int, padding: int) -> bytes:
        room = 10 - len(varint(value))
        return key(number, 0, tag_padding) + varint(value, min(padding, room))

    return st.builds(build, INT64, st.integers(0, 2), st.integers(0, 9))


def double_field(number: int) -> Bytes:
    return st.builds(lambda value: key(number, 1) + struct.pack("<d", value), DOUBLE)


def payload_field(number: int, payload: Bytes) -> Bytes:
    """Give a length-delimited field, its length sometimes overlong."""
    return st.builds(lambda value, padding: delimited(number, value, padding), payload, st.integers(0, 3))


def text_field(number: int) -> Bytes:
    return payload_field(number, KEY.map(str.encode))


def unknown_field(known: frozenset[int]) -> Bytes:
    """Give a field whose number is not known, or which has a wire type that its number does not have; or a group."""
    numbers = st.integers(1, 40).filter(lambda number: number not in known) | st.just((1 << 29) - 1)

    def build(number: int, wire_type: int, payload: bytes, value: int) -> bytes:
        if wire_type == 0:
            return key(number, 0) + varint(value)
        if wire_type == 2:
            return delimited(number, payload)
        if wire_type == 3:
            inside = key(number + 1 if number < 40 else 1, 0) + varint(value) + delimited(3, payload)
            return key(number, 3) + inside + key(number, 4)
        return key(number, wire_type) + (payload + bytes(8))[: 8 if wire_type == 1 else 4]

    return st.builds(build, numbers, st.sampled_from([0, 1, 2, 3, 5]), st.binary(max_size=6), INT64)


def soup(*fields: Bytes, known: frozenset[int], max_size: int = 6) -> Bytes:
    """Give a message's bytes: any of the fields in any order, any number of times, and unknown ones between them."""
    return st.lists(st.one_of(*fields, unknown_field(known)), max_size=max_size).map(b"".join)


def shape_field(number: int) -> Bytes:
    """Give extents, packed or not."""
    packed = st.lists(EXTENT, max_size=3).map(lambda shape: delimited(number, struct.pack(f"<{len(shape)}Q", *shape)))
    unpacked = EXTENT.map(lambda extent: key(number, 1) + struct.pack("<Q", extent))
    return packed | unpacked


tensor_bytes = soup(
    number_field(1), shape_field(2), payload_field(3, st.binary(max_size=20)), known=frozenset((1, 2, 3, 4))
)
spec_bytes = specs.map(lambda spec: spec.SerializeToString())
request_bytes = soup(
    payload_field(1, spec_bytes),
    number_field(2),
    text_field(3),
    *(payload_field(number, tensor_bytes) for number in (4, 5, 6, 7)),
    known=frozenset(range(1, 9)),
)
stream_request_bytes = soup(
    payload_field(
        1,
        soup(
            number_field(1),
            number_field(2),
            payload_field(3, request_bytes),
            text_field(4),
            text_field(5),
            known=frozenset(range(1, 6)),
        ),
    ),
    known=frozenset((1,)),
    max_size=4,
)
stats_bytes = soup(*(number_field(number) for number in range(1, 7)), text_field(7), known=frozenset(range(1, 8)))
result_bytes = soup(
    double_field(1),
    payload_field(2, tensor_bytes),
    number_field(3),
    double_field(4),
    number_field(5),
    payload_field(6, tensor_bytes),
    payload_field(7, tensor_bytes),
    payload_field(8, totals.map(lambda total: total.SerializeToString())),
    known=frozenset(range(1, 9)),
)
response_bytes = soup(
    payload_field(1, stats_bytes), payload_field(2, result_bytes), text_field(3), known=frozenset((1, 2, 3, 15))
)
stream_response_bytes = soup(
    payload_field(
        1,
        soup(
            number_field(1),
            payload_field(2, response_bytes),
            payload_field(3, statuses.map(lambda status: status.SerializeToString())),
            known=frozenset((1, 2, 3)),
        ),
    ),
    known=frozenset((1,)),
    max_size=3,
)


def damaged(messages: Bytes) -> Bytes:
    """Give a message's bytes with some cut off, overwritten, inserted or taken out: seldom still a message."""

    def damage(data: bytes, how: Callable[[bytes, int, bytes], bytes], where: float, noise: bytes) -> bytes:
        return how(data, round(where * len(data)), noise)

    ways: list[Callable[[bytes, int, bytes], bytes]] = [
        lambda data, at, _: data[:at],
        lambda data, at, noise: data[:at] + noise + data[at + len(noise) :],
        lambda data, at, noise: data[:at] + noise + data[at:],
        lambda data, at, noise: data[:at] + data[at + len(noise) :],
    ]
    return st.builds(damage, messages, st.sampled_from(ways), st.floats(0, 1), st.binary(min_size=1, max_size=4))
