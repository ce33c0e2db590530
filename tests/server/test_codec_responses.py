"""Responses through the codec are what the generated classes make of them, in both directions, and views are views."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from tests.server import wire_messages as wire


def tensor_view(message: pb.LossResult, name: str) -> codec.WireTensor | None:
    if not message.HasField(name):
        return None
    tensor: tensor_pb2.Tensor = getattr(message, name)
    return codec.WireTensor(tensor.data_type, tuple(tensor.shape), tensor.data)


def view_of(message: pb.ComputeLossResponse) -> codec.ResponseView:
    """Return what the codec should read, made from what the generated class read."""
    stats = message.stats
    return codec.ResponseView(
        codec.StatsView(
            stats.queue_ns,
            stats.pack_ns,
            stats.compute_ns,
            stats.unpack_ns,
            stats.batch_request_count,
            stats.batch_element_count,
            stats.device,
        ),
        tuple(
            codec.ResultView(
                result.scalar if result.HasField("scalar") else None,
                tensor_view(result, "tensor"),
                result.element_count,
                result.weight_sum,
                result.nonfinite_count,
                tensor_view(result, "target_gradient"),
                tensor_view(result, "input_gradient"),
                result.total.SerializeToString(deterministic=True) if result.HasField("total") else None,
            )
            for result in message.results
        ),
        message.idempotency_key,
    )


def comparable(view: codec.ResponseView) -> object:
    """Return a view such that equal means equal to the bit, NaNs and signs of zero included."""

    def bits(value: float | None) -> bytes | None:
        return None if value is None else struct.pack("<d", value)

    def plain(total: bytes | None) -> bytes | None:  # the codec hands its bytes on in whatever form they came
        return None if total is None else pb.LossState.FromString(total).SerializeToString(deterministic=True)

    results = [
        result._replace(scalar=bits(result.scalar), weight_sum=bits(result.weight_sum), total=plain(result.total))  # type: ignore[arg-type]
        for result in view.results
    ]
    return view.stats, results, view.idempotency_key


# ---- Writing ----


@given(wire.responses)
@example(pb.ComputeLossResponse(results=[pb.LossResult(scalar=-0.0, weight_sum=-0.0)]))
@example(pb.ComputeLossResponse(results=[pb.LossResult(scalar=0.0, weight_sum=0.0)]))
@example(pb.ComputeLossResponse(results=[pb.LossResult(tensor=tensor_pb2.Tensor())]))
def test_an_encoded_response_is_byte_for_byte_what_the_generated_class_writes(message: pb.ComputeLossResponse) -> None:
    message.stats.SetInParent()
    view = view_of(message)
    encoded = b"".join(codec.encode_compute_response(view.stats, view.results, view.idempotency_key))
    assert encoded == message.SerializeToString(deterministic=True)


@given(wire.stream_responses)
def test_an_encoded_stream_answer_is_byte_for_byte_what_the_generated_class_writes(
    message: pb.StreamComputeLossResponse,
) -> None:
    entries: list[tuple[int, list[codec.Buffer] | status_pb2.Status]] = []
    for tagged in message.responses:
        if tagged.HasField("error"):
            entries.append((tagged.tag, tagged.error))
        else:
            entries.append((tagged.tag, [tagged.response.SerializeToString()]))
    assert codec.encode_stream_response(entries) == message.SerializeToString(deterministic=True)


def test_encoding_leaves_tensor_data_where_they_are_until_the_parts_are_joined() -> None:
    data = memoryview(bytearray(64))
    tensor = codec.WireTensor(3, (16,), data)
    result = codec.ResultView(None, tensor, 16, 16.0, 0, tensor, tensor)
    parts = codec.encode_compute_response(codec.StatsView(1, 2, 3, 4, 5, 6, "cpu"), [result])
    assert [part for part in parts if part is data] == [data] * 3


# ---- Reading ----


@given(wire.response_bytes)
@example(wire.delimited(2, wire.key(1, 1) + bytes(8) + wire.delimited(2, b"")))  # of a oneof, the last is set
@example(wire.delimited(2, wire.delimited(2, wire.delimited(3, b"x")) + wire.key(1, 1) + bytes(8)))
@example(
    wire.delimited(2, wire.delimited(2, wire.delimited(3, b"x")) + wire.key(1, 1) + bytes(8) + wire.delimited(2, b""))
)
@example(wire.delimited(2, wire.delimited(7, wire.delimited(3, b"x")) + wire.delimited(7, b"\x08\x01")))
@example(wire.delimited(2, wire.delimited(7, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")))  # a type of -1
@example(wire.delimited(1, b"\x08\x01") + wire.delimited(1, b"\x10\x02"))  # stats merge
def test_a_response_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    expected = view_of(pb.ComputeLossResponse.FromString(data))
    assert comparable(codec.decode_compute_response(data)) == comparable(expected)


@given(wire.response_bytes, st.binary(max_size=9), st.binary(max_size=9))
def test_a_response_is_read_where_it_stands_and_not_beyond(data: bytes, before: bytes, behind: bytes) -> None:
    view = codec.decode_compute_response(before + data + behind, len(before), len(before) + len(data))
    assert comparable(view) == comparable(view_of(pb.ComputeLossResponse.FromString(data)))


@given(wire.stream_response_bytes)
def test_a_stream_answer_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    expected = pb.StreamComputeLossResponse.FromString(data)
    if any(tagged.WhichOneof("outcome") is None for tagged in expected.responses):
        with pytest.raises(codec.CodecError, match="neither a response nor an error"):  # legal protobuf, but no answer
            codec.decode_stream_response(data)
        return
    answers = codec.decode_stream_response(data)
    assert [tag for tag, _ in answers] == [tagged.tag for tagged in expected.responses]
    for (_, answer), tagged in zip(answers, expected.responses, strict=True):
        if tagged.HasField("error"):
            assert answer == tagged.error
        else:
            assert isinstance(answer, codec.ResponseView)
            assert comparable(answer) == comparable(view_of(tagged.response))


def alike_results() -> st.SearchStrategy[bytes]:
    """Give results of which many have equal lengths, and headers or numbers that differ in a byte or two."""

    def build(
        types: tuple[int, int], extents: tuple[int, int], counts: tuple[int, int], data: bytes, scalar: float | None
    ) -> bytes:
        def tensor(number: int, data_type: int, extent: int) -> bytes:
            shape = wire.delimited(2, extent.to_bytes(8, "little"))
            return wire.delimited(number, bytes((8, data_type)) + shape + wire.delimited(3, data))

        loss = tensor(2, *types) if scalar is None else wire.key(1, 1) + struct.pack("<d", scalar)
        weight = wire.key(4, 1) + struct.pack("<d", float(counts[0]))
        numbers = bytes((3 << 3, counts[0])) + weight + bytes((5 << 3, counts[1]))
        return loss + numbers + tensor(6, types[0], extents[0]) + tensor(7, types[1], extents[1])

    small = st.integers(1, 3)
    pair = st.tuples(small, small)
    data = st.sampled_from([b"", b"1234", b"\x1a\x02\x08\x01", b"\x08\x01\x12\x00"])
    return st.builds(build, pair, pair, pair, data, st.none() | wire.DOUBLE)


@given(st.lists(alike_results() | wire.result_bytes, max_size=10))
def test_what_was_read_before_changes_nothing(results: list[bytes]) -> None:
    for data in [wire.delimited(2, result) for result in results] * 2:
        assert comparable(codec.decode_compute_response(data)) == comparable(
            view_of(pb.ComputeLossResponse.FromString(data))
        )


def test_what_is_read_are_views_into_the_received_bytes() -> None:
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"12345678")
    result = pb.LossResult(tensor=tensor, target_gradient=tensor, input_gradient=tensor)
    message = pb.StreamComputeLossResponse(
        responses=[pb.TaggedResponse(tag=1, response=pb.ComputeLossResponse(results=[result]))]
    ).SerializeToString()
    ((_, answer),) = codec.decode_stream_response(message)
    assert isinstance(answer, codec.ResponseView)
    for read in (answer.results[0].tensor, answer.results[0].target_gradient, answer.results[0].input_gradient):
        assert read is not None
        assert isinstance(read.data, memoryview)
        assert read.data.obj is message
        assert bytes(read.data) == b"12345678"


# ---- Verdicts ----


def is_judged_rightly(read: Callable[[bytes], object], data: bytes, is_legal: bool) -> bool:
    try:
        read(data)
    except codec.CodecError as error:
        # The generated classes take a field numbered 0 inside an unknown group, though it is not legal.
        return not is_legal or re.search(r"the tag [0-7] at byte \d+ is not a field's", str(error)) is not None
    return is_legal


@given(st.binary(max_size=30) | wire.damaged(wire.response_bytes))
@example(wire.delimited(3, b"\xff") + wire.delimited(3, b""))  # text that is not UTF-8, though it is not the last
def test_a_response_is_refused_exactly_where_the_generated_class_refuses_it(data: bytes) -> None:
    try:
        pb.ComputeLossResponse.FromString(data)
        is_legal = True
    except DecodeError:
        is_legal = False
    assert is_judged_rightly(codec.decode_compute_response, data, is_legal)


@given(st.binary(max_size=30) | wire.damaged(wire.stream_response_bytes))
def test_a_stream_answer_is_refused_where_the_generated_class_refuses_it_or_it_holds_no_outcome(data: bytes) -> None:
    try:
        message = pb.StreamComputeLossResponse.FromString(data)
        is_legal = all(tagged.WhichOneof("outcome") for tagged in message.responses)
    except DecodeError:
        is_legal = False
    assert is_judged_rightly(codec.decode_stream_response, data, is_legal)
