"""AccumulateLoss's messages through the codec are what the generated classes make of them, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from lossgrad_api.wire import read_tag, skip
from tests.server import wire_messages as wire
from tests.server.accumulating import slices, state_of
from tests.server.test_codec_bounds import COUNT, MAX_HEADER_BYTES, TINY, CountedBytes
from tests.server.test_codec_requests import assume_no_field_zero, wire_tensor
from tests.server.test_codec_responses import comparable, view_of

OPERANDS = ("input", "target", "weight", "mask")

states = slices(max_size=3).map(lambda parts: state_of(parts).to_message())
configs = st.builds(
    pb.AccumulationConfig,
    specs=st.lists(wire.specs, max_size=3),
    element_count=st.none() | wire.INT64,
    resume_from=st.none() | states,
    snapshot_every_slices=st.integers(-(1 << 31), (1 << 31) - 1),
    allow_broadcast=st.booleans(),
)
slice_messages = st.builds(
    pb.Slice,
    sequence=wire.INT64,
    group=wire.KEY,
    mask=st.none() | wire.tensors,
    weight=st.none() | wire.tensors,
    target=st.none() | wire.tensors,
    input=st.none() | wire.tensors,
)
slice_results = st.builds(pb.SliceResult, sequence=wire.INT64, results=st.lists(wire.results, max_size=3))

config_bytes = wire.soup(
    wire.payload_field(1, wire.spec_bytes),
    wire.number_field(2),
    wire.payload_field(3, states.map(lambda state: state.SerializeToString())),
    wire.number_field(4),
    wire.number_field(5),
    known=frozenset(range(1, 6)),
)
slice_bytes = wire.soup(
    wire.number_field(1),
    wire.text_field(2),
    *(wire.payload_field(number, wire.tensor_bytes) for number in (3, 4, 5, 6)),
    known=frozenset(range(1, 7)),
)
request_bytes = wire.soup(
    wire.payload_field(1, config_bytes), wire.payload_field(2, slice_bytes), known=frozenset((1, 2)), max_size=3
)
slice_result_bytes = wire.soup(wire.number_field(1), wire.payload_field(2, wire.result_bytes), known=frozenset((1, 2)))
response_bytes = wire.soup(
    wire.payload_field(1, slice_result_bytes),
    wire.payload_field(2, states.map(lambda state: state.SerializeToString())),
    wire.payload_field(3, states.map(lambda state: state.SerializeToString())),
    known=frozenset((1, 2, 3)),
    max_size=3,
)


def assert_reads_like_the_generated_class(data: bytes) -> None:
    expected = pb.AccumulateLossRequest.FromString(data)
    part = codec.split_accumulate_request(data)
    name = expected.WhichOneof("part")
    if name is None:
        assert part is None
    elif name == "config":
        assert isinstance(part, codec.ConfigView)
        assert (part.resume_from is not None) == expected.config.HasField("resume_from")
        if part.resume_from is not None:
            state, start, end = part.resume_from
            assert pb.Accumulation.FromString(state[start:end]) == expected.config.resume_from
        expected.config.ClearField("resume_from")
        assert part.config.SerializeToString(deterministic=True) == expected.config.SerializeToString(
            deterministic=True
        )
    else:
        assert isinstance(part, codec.SliceView)
        assert (part.sequence, part.group) == (expected.slice.sequence, expected.slice.group)
        view = codec.split_slice(part.data, part.start, part.end)
        message = codec.parse_slice_header(part.data, part.start, part.end)
        for operand in OPERANDS:
            tensor: tensor_pb2.Tensor = getattr(expected.slice, operand)
            assert getattr(view, operand) == tensor.data, operand
            assert message.HasField(operand) == expected.slice.HasField(operand)
            tensor.ClearField("data")
            assert getattr(message, operand) == tensor


# ---- Writing ----


@given(slice_messages.filter(lambda message: message.HasField("input") and message.HasField("target")))
def test_an_encoded_slice_is_byte_for_byte_what_the_generated_class_writes(message: pb.Slice) -> None:
    optional = {name: wire_tensor(getattr(message, name)) for name in ("weight", "mask") if message.HasField(name)}
    parts = codec.encode_slice_request(
        message.sequence, wire_tensor(message.input), wire_tensor(message.target), group=message.group, **optional
    )
    expected = pb.AccumulateLossRequest(slice=message).SerializeToString(deterministic=True)
    assert b"".join(parts) == expected


@given(configs)
def test_an_encoded_config_is_one_that_the_generated_class_reads(message: pb.AccumulationConfig) -> None:
    state = (
        list(Accumulation.from_message(message.resume_from).encoded_parts()) if message.HasField("resume_from") else []
    )
    head = pb.AccumulationConfig()
    head.CopyFrom(message)
    head.ClearField("resume_from")
    encoded = b"".join(codec.encode_config_request(head, state))
    read = pb.AccumulateLossRequest.FromString(encoded)
    expected = pb.AccumulateLossRequest(config=message)
    assert read.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(slice_results)
def test_an_encoded_result_is_byte_for_byte_what_the_generated_class_writes(message: pb.SliceResult) -> None:
    views = view_of(pb.ComputeLossResponse(results=message.results)).results
    encoded = b"".join(codec.encode_slice_result(message.sequence, views))
    assert encoded == pb.AccumulateLossResponse(slice=message).SerializeToString(deterministic=True)


@given(states, st.booleans())
def test_an_encoded_state_is_byte_for_byte_what_the_generated_class_writes(
    state: pb.Accumulation, is_total: bool
) -> None:
    parts = list(Accumulation.from_message(state).encoded_parts())
    encoded = b"".join(codec.encode_state_response(parts, is_total=is_total))
    expected = pb.AccumulateLossResponse(**{"total" if is_total else "snapshot": state})  # type: ignore[arg-type]
    assert encoded == expected.SerializeToString(deterministic=True)


# ---- Reading ----


@given(st.one_of(configs, slice_messages))
def test_a_written_request_reads_back(message: pb.AccumulationConfig | pb.Slice) -> None:
    if isinstance(message, pb.Slice):
        request = pb.AccumulateLossRequest(slice=message)
    else:
        request = pb.AccumulateLossRequest(config=message)
    assert_reads_like_the_generated_class(request.SerializeToString())


@given(request_bytes)
@example(b"")
@example(wire.delimited(1, wire.delimited(3, b"")))  # an empty state is one that is set
@example(wire.delimited(2, wire.delimited(6, wire.delimited(3, b"old"))) * 2)  # merged
@example(
    wire.delimited(2, b"\x08\x01") + wire.delimited(1, b"") + wire.delimited(2, b"\x12\x01a")
)  # the last member wins
@example(wire.delimited(2, wire.delimited(6, wire.delimited(3, b"data")) + b"\x08\x07" + wire.delimited(2, b"late")))
@example(wire.delimited(1, wire.delimited(3, b"\x08\x01") + wire.delimited(3, b"\x20\x02")))
def test_a_request_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    assert_reads_like_the_generated_class(data)


@given(response_bytes)
@example(wire.delimited(1, b"\x08\x01") + wire.delimited(1, b"\x08\x02"))
@example(wire.delimited(2, b"\x08\x01") + wire.delimited(3, b"\x08\x02"))
def test_a_response_in_any_legal_form_reads_as_the_generated_class_reads_it(data: bytes) -> None:
    expected = pb.AccumulateLossResponse.FromString(data)
    name = expected.WhichOneof("part")
    if name is None:
        with pytest.raises(codec.CodecError, match="neither a slice's result nor a state"):
            codec.decode_accumulate_response(data)
        return
    part = codec.decode_accumulate_response(data)
    if isinstance(part, codec.SliceResultView):
        assert name == "slice"
        assert part.sequence == expected.slice.sequence
        wanted = view_of(pb.ComputeLossResponse(results=expected.slice.results))
        assert comparable(wanted._replace(results=part.results)) == comparable(wanted)
    else:
        assert name == ("total" if part.is_total else "snapshot")
        state = pb.Accumulation.FromString(part.data[part.start : part.end])
        wanted_state = expected.total if part.is_total else expected.snapshot
        assert state.SerializeToString(deterministic=True) == wanted_state.SerializeToString(deterministic=True)


def test_what_is_read_of_a_slice_are_views_into_the_received_bytes() -> None:
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"12345678")
    message = pb.AccumulateLossRequest(
        slice=pb.Slice(sequence=300, group="g", input=tensor, target=tensor, weight=tensor, mask=tensor)
    ).SerializeToString()
    part = codec.split_accumulate_request(message)
    assert isinstance(part, codec.SliceView)
    assert part.data is message
    view = codec.split_slice(part.data, part.start, part.end)
    assert all(getattr(view, name).obj is message for name in OPERANDS)


def test_slices_that_differ_in_number_group_and_values_are_known_again() -> None:
    known: codec.KnownRequests[str] = codec.KnownRequests(codec.SLICE_LAYOUT)

    def part(sequence: int, group: str, data: bytes) -> codec.SliceView:
        tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[len(data)], data=data)
        one = pb.Slice(sequence=sequence, group=group, input=tensor, target=tensor)
        view = codec.split_accumulate_request(pb.AccumulateLossRequest(slice=one).SerializeToString())
        assert isinstance(view, codec.SliceView)
        return view

    first = part(1, "", b"1234")
    known.remember(first.data, first.start, first.end, "plan")
    later = part(1 << 40, "a group", b"abcd")
    found = known.find(later.data, later.start, later.end)
    assert found is not None
    assert (found[0], [bytes(operand) for operand in found[1]]) == ("plan", [b"abcd", b"abcd"])
    other = part(2, "", b"12345")
    assert known.find(other.data, other.start, other.end) is None


# ---- Verdicts and bounds ----


def read_all(data: bytes) -> None:
    """Read an AccumulateLossRequest to its last byte. Raises CodecError, or DecodeError for the state."""
    part = codec.split_accumulate_request(data)
    if isinstance(part, codec.SliceView):
        codec.split_slice(part.data, part.start, part.end)
        codec.parse_slice_header(part.data, part.start, part.end)
    elif part is not None and part.resume_from is not None:
        state, start, end = part.resume_from
        pb.Accumulation.FromString(state[start:end])  # AccumulationReader's part: test_accumulation_state.py


def part_count(data: bytes) -> int:
    """Return how often a readable AccumulateLossRequest sets its part."""
    position = count = 0
    while position < len(data):
        tag, position = read_tag(data, position, len(data))
        position = skip(data, tag, position, len(data))
        count += tag in (1 << 3 | 2, 2 << 3 | 2)
    return count


@given(st.binary(max_size=30) | wire.damaged(request_bytes))
@example(wire.delimited(2, b"\x12\x01\xff"))  # a group that is not UTF-8
@example(wire.delimited(1, wire.delimited(3, b"\x08")))  # a state that ends within a field
def test_a_request_is_refused_exactly_where_the_generated_class_refuses_it(data: bytes) -> None:
    error: Exception | None = None
    try:
        read_all(data)
    except codec.CodecError as caught:
        assume_no_field_zero(caught)
        error = caught
    except DecodeError as caught:
        error = caught
    try:
        pb.AccumulateLossRequest.FromString(data)
    except DecodeError:
        # A part that a later one replaces is not looked into.
        assert error is not None or part_count(data) > 1
    else:
        assert error is None


HOSTILE: dict[str, Callable[[], bytes]] = {
    "unknown fields": lambda: TINY * COUNT,
    "empty parts": lambda: b"\x12\x00" * COUNT,
    "unknown fields of a slice": lambda: wire.delimited(2, TINY * COUNT),
    "numbers of a slice": lambda: wire.delimited(2, b"\x08\x01" * COUNT),
    "a long group": lambda: wire.delimited(2, wire.delimited(2, bytes(COUNT))),
    "empty tensors of a slice": lambda: wire.delimited(2, b"\x32\x00" * COUNT),
    "specs of a config": lambda: wire.delimited(1, b"\x0a\x00" * COUNT),
    "unknown fields of a config": lambda: wire.delimited(1, TINY * COUNT),
    "empty states of a config": lambda: wire.delimited(1, b"\x1a\x00" * COUNT),
    "extents": lambda: wire.delimited(2, wire.delimited(6, wire.delimited(2, bytes(8 * COUNT)))),
    "unknown fields of a tensor": lambda: wire.delimited(2, wire.delimited(6, TINY * COUNT)),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_a_million_tiny_fields_cost_no_more_than_a_header_may_have(message: Callable[[], bytes]) -> None:
    data = CountedBytes(message())
    with pytest.raises(codec.HeaderTooLarge):
        read_all(data)
    assert data.reads <= 4 * MAX_HEADER_BYTES
