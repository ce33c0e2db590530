"""Requests through the codec are what the generated classes make of them, in both directions, and views are views."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from tests.server import wire_messages as wire

OPERANDS = ("input", "target", "weight", "mask")


def wire_tensor(tensor: tensor_pb2.Tensor) -> codec.WireTensor:
    return codec.WireTensor(tensor.data_type, tuple(tensor.shape), tensor.data)


def encode(request: pb.ComputeLossRequest) -> bytes:
    optional = {name: wire_tensor(getattr(request, name)) for name in ("weight", "mask") if request.HasField(name)}
    return b"".join(
        codec.encode_compute_request(
            [spec.SerializeToString() for spec in request.specs],
            wire_tensor(request.input),
            wire_tensor(request.target),
            allow_broadcast=request.allow_broadcast,
            idempotency_key=request.idempotency_key,
            **optional,
        )
    )


def without_data(request: pb.ComputeLossRequest) -> pb.ComputeLossRequest:
    copy = pb.ComputeLossRequest()
    copy.CopyFrom(request)
    for name in OPERANDS:
        if copy.HasField(name):
            getattr(copy, name).ClearField("data")
    return copy


def assert_reads_like_the_generated_class(data: bytes, start: int = 0, end: int | None = None) -> None:
    expected = pb.ComputeLossRequest.FromString(data[start:end])
    view = codec.split_compute_request(data, start, end)
    assert view.idempotency_key == expected.idempotency_key
    for name in OPERANDS:
        assert getattr(view, name) == getattr(expected, name).data, name
    assert codec.parse_request_header(data, start, end) == without_data(expected)


# ---- Writing ----


@given(wire.requests.filter(lambda request: request.HasField("input") and request.HasField("target")))
def test_an_encoded_request_is_byte_for_byte_what_the_generated_class_writes(request: pb.ComputeLossRequest) -> None:
    assert encode(request) == request.SerializeToString(deterministic=True)


@given(wire.stream_requests)
def test_an_encoded_stream_message_is_byte_for_byte_what_the_generated_class_writes(
    message: pb.StreamComputeLossRequest,
) -> None:
    for number, tagged in enumerate(message.requests):
        tagged.request.SetInParent()
        tagged.tag = number
    entries = [(tagged.tag, tagged.timeout_ns, [tagged.request.SerializeToString()]) for tagged in message.requests]
    traces = {tagged.tag: codec.encode_trace(tagged.traceparent, tagged.tracestate) for tagged in message.requests}
    assert codec.encode_stream_request(entries, traces) == message.SerializeToString(deterministic=True)


def test_encoding_leaves_tensor_data_where_they_are_until_the_parts_are_joined() -> None:
    data = memoryview(bytearray(64))
    tensor = codec.WireTensor(3, (16,), data)
    parts = codec.encode_compute_request([b""], tensor, tensor)
    assert [part for part in parts if part is data] == [data, data]


# ---- Reading ----


@given(wire.requests)
def test_a_written_request_reads_back(request: pb.ComputeLossRequest) -> None:
    assert_reads_like_the_generated_class(request.SerializeToString())


@given(wire.request_bytes)
@example(wire.delimited(7, wire.delimited(3, b"old") + wire.delimited(3, b"")))  # the last data win, even if empty
@example(wire.delimited(7, wire.delimited(3, b"old")) + wire.delimited(7, b""))  # merging in nothing changes nothing
@example(wire.delimited(7, wire.delimited(3, b"old")) + wire.delimited(7, wire.delimited(3, b"new")))
@example(wire.delimited(3, b"one") + wire.delimited(3, b""))
@example(wire.key(3, 0) + b"\x05" + wire.key(7, 0) + b"\x05")  # known numbers with other wire types are unknown fields
@example(wire.delimited(7, wire.key(3, 0) + b"\x07"))
@example(wire.key(7, 3) + wire.delimited(3, b"in a group") + wire.key(7, 4))
def test_a_request_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    assert_reads_like_the_generated_class(data)


@given(wire.request_bytes, st.binary(max_size=9), st.binary(max_size=9))
def test_a_request_is_read_where_it_stands_and_not_beyond(data: bytes, before: bytes, behind: bytes) -> None:
    assert_reads_like_the_generated_class(before + data + behind, len(before), len(before) + len(data))


@given(wire.stream_request_bytes)
@example(
    wire.delimited(
        1,
        wire.delimited(3, wire.delimited(7, wire.delimited(3, b"a")))
        + wire.delimited(3, wire.delimited(6, wire.delimited(3, b"b"))),
    )
)
def test_a_stream_message_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    expected = pb.StreamComputeLossRequest.FromString(data)
    entries = codec.split_stream_request(data, 1000)
    assert [(entry.tag, entry.timeout_ns) for entry in entries] == [
        (tagged.tag, tagged.timeout_ns) for tagged in expected.requests
    ]
    for entry, tagged in zip(entries, expected.requests, strict=True):
        context = (tagged.traceparent, tagged.tracestate)
        if len(tagged.traceparent.encode()) <= 64 and all(text.isascii() for text in context):
            assert entry.trace == (context if tagged.traceparent else None)
        assert pb.ComputeLossRequest.FromString(entry.data[entry.start : entry.end]) == tagged.request
        assert_reads_like_the_generated_class(entry.data, entry.start, entry.end)


def test_trace_contexts_are_bounded_and_do_not_use_up_the_room_for_headers() -> None:
    context = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    entries = [(tag, 0, [b""]) for tag in range(1, 1001)]
    traces = {tag: codec.encode_trace(context, "a=" + "b" * 400) for tag in range(1, 1001)}
    assert all(
        entry.trace == (context, "a=" + "b" * 400)
        for entry in codec.split_stream_request(codec.encode_stream_request(entries, traces), 1000)
    )
    too_long = wire.delimited(1, wire.key(1, 0) + b"\x01" + wire.delimited(4, b"x" * 65))
    (entry,) = codec.split_stream_request(too_long, 1)
    assert entry.trace is None
    assert codec.encode_trace(context, "a=" + "b" * 600) == codec.encode_trace(context)
    with pytest.raises(codec.HeaderTooLarge):
        codec.split_stream_request(wire.delimited(1, wire.delimited(4, b"x" * 64) * 1000), 1)


def test_what_is_read_are_views_into_the_received_bytes() -> None:
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"12345678")
    message = pb.StreamComputeLossRequest(
        requests=[
            pb.TaggedRequest(
                request=pb.ComputeLossRequest(input=tensor, target=tensor, weight=tensor, mask=tensor), tag=1
            )
        ]
    ).SerializeToString()
    (entry,) = codec.split_stream_request(message, 1)
    assert entry.data is message
    view = codec.split_compute_request(entry.data, entry.start, entry.end)
    for name in OPERANDS:
        operand = getattr(view, name)
        assert operand.obj is message
        assert operand.readonly
        assert operand == b"12345678"


def test_a_missing_tensor_is_an_empty_view() -> None:
    view = codec.split_compute_request(b"")
    assert [len(getattr(view, name)) for name in OPERANDS] == [0, 0, 0, 0]


# ---- Verdicts ----


def refusal(data: bytes) -> codec.CodecError | None:
    try:
        codec.split_compute_request(data)
        codec.parse_request_header(data)
    except codec.CodecError as error:
        return error
    return None


def assume_no_field_zero(error: codec.CodecError | None) -> None:
    """Leave out what the generated classes take though it is not legal: a field numbered 0 inside an unknown group."""
    assume(not re.search(r"the tag [0-7] at byte \d+ is not a field's", str(error)))


def refused_by_the_generated_class(data: bytes) -> bool:
    try:
        pb.ComputeLossRequest.FromString(data)
    except DecodeError:
        return True
    return False


@given(st.binary(max_size=30) | wire.damaged(wire.request_bytes))
@example(b"\x80")
@example(b"\x90\x80\x80\x80\x00\x01")  # a tag in five bytes
@example(b"\x90\x80\x80\x80\x80\x00\x01")  # in six
@example(b"\xba\x80\x80\x80\x80\x00\x00")
@example(b"\x90\x80\x80\x80\x10\x01")  # a tag beyond 32 bits
@example(b"\xf8\xff\xff\xff\x0f\x01")  # the largest
@example(b"\x3a\x80\x80\x80\x80\x00")  # a length in five bytes
@example(b"\x3a\x80\x80\x80\x80\x80\x00")  # in six
@example(b"\x10" + b"\x80" * 9 + b"\x7f")  # a number in ten bytes
@example(b"\x10" + b"\x80" * 10 + b"\x00")  # in eleven
@example(b"\x3a\x03\x12\x01\x01")  # a shape of one byte
@example(b"\x3a\xff\xff\xff\xff\x0f")  # a length of 4 GiB
@example(b"\x3a\x02\x1a\x05abcde")  # data that go beyond their tensor
@example(b"\x7b\x74")  # a group that another one ends
@example(b"\x7c")  # the end of a group that did not begin
@example(b"\x7e\x00")
@example(b"\x1a\x01\xff")  # text that is not UTF-8
def test_a_request_is_refused_exactly_where_the_generated_class_refuses_it(data: bytes) -> None:
    error = refusal(data)
    assume_no_field_zero(error)
    assert (error is not None) == refused_by_the_generated_class(data)


@given(st.binary(max_size=30) | wire.damaged(wire.stream_request_bytes))
def test_a_stream_message_is_refused_as_a_whole_or_in_one_of_its_requests_where_the_generated_class_refuses_it(
    data: bytes,
) -> None:
    errors: list[codec.CodecError | None]
    try:
        errors = [refusal(entry.data[entry.start : entry.end]) for entry in codec.split_stream_request(data, 1000)]
    except codec.CodecError as error:
        errors = [error]
    for one in errors:
        assume_no_field_zero(one)
    try:
        pb.StreamComputeLossRequest.FromString(data)
    except DecodeError:
        assert any(errors)
    else:
        assert not any(errors)


@pytest.mark.parametrize("length", range(40))
def test_a_truncated_request_is_refused_or_is_a_shorter_one(length: int) -> None:
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1], data=b"1234")
    data = pb.ComputeLossRequest(
        specs=[pb.LossSpec(reduction=pb.REDUCTION_SUM)], input=tensor, target=tensor
    ).SerializeToString()
    assert len(data) >= 40
    assert (refusal(data[:length]) is not None) == refused_by_the_generated_class(data[:length])


@pytest.mark.parametrize("data", [b"\x00\x00", b"\x04", b"\x02\x00", b"\x80\x00\x00", b"\x7b\x00\x00\x7c"])
@pytest.mark.parametrize(
    "read", [codec.split_compute_request, codec.parse_request_header, codec.decode_compute_response]
)
def test_a_field_numbered_0_is_refused(read: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(codec.CodecError, match="is not a field's"):
        read(data)
