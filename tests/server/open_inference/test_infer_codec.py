"""The ModelInfer codec: equal to protobuf's own reading for any legal message, without copies, and bounded."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from lossgrad_api.wire import CodecError, HeaderTooLarge
from lossgrad_server.transport.open_inference.codec import (
    FINAL_FLAG,
    InferRequestView,
    KnownInferRequests,
    response_form,
    split_infer_request,
    stream_error,
    stream_response_parts,
)
from tests.server import wire_messages as wire

Request: Any = service_pb2.ModelInferRequest
MAX_HEADER_BYTES = 65536
COUNT = 1_000_000
TINY = wire.key(15, 0) + b"\x00"  # an unknown field of two bytes
PACKED = {"bool_contents": 1, "fp32_contents": 6, "fp64_contents": 7}


# ---- Messages as hypothesis makes them ----

floats = st.lists(st.floats(width=32), max_size=4)
contents = wire.soup(
    wire.payload_field(1, st.lists(st.booleans(), max_size=4).map(bytes)),
    wire.payload_field(2, st.binary(max_size=4).map(lambda data: bytes(byte & 0x7F for byte in data))),
    wire.payload_field(6, floats.map(lambda values: struct.pack(f"<{len(values)}f", *values))),
    wire.payload_field(7, floats.map(lambda values: struct.pack(f"<{len(values)}d", *values))),
    st.floats(width=32).map(lambda value: wire.key(6, 5) + struct.pack("<f", value)),  # not packed
    wire.payload_field(8, st.binary(max_size=4)),
    known=frozenset(range(1, 9)),
    max_size=4,
)
parameter = wire.payload_field(
    4,
    st.builds(
        lambda name, value: wire.delimited(1, name.encode()) + wire.delimited(2, wire.key(2, 0) + wire.varint(value)),
        wire.KEY,
        wire.INT64,
    ),
)
input_bytes = wire.soup(
    wire.text_field(1),
    wire.text_field(2),
    wire.number_field(3),
    parameter,
    wire.payload_field(5, contents),
    known=frozenset(range(1, 6)),
)
request_bytes = wire.soup(
    wire.text_field(1),
    wire.text_field(2),
    wire.text_field(3),
    parameter,
    wire.payload_field(5, input_bytes),
    wire.payload_field(6, wire.soup(wire.text_field(1), known=frozenset((1, 2)), max_size=2)),
    wire.payload_field(7, st.binary(max_size=20)),
    known=frozenset(range(1, 8)),
    max_size=8,
)


def packed_of(view: InferRequestView, index: int, number: int) -> bytes:
    """Return the packed bytes of an input's field that the codec gave as views."""
    tag = number << 3 | 2
    return b"".join(view.data[slice(*span)] for one, span in view.typed.get(index, ()) if one == tag)


def check_against_protobuf(data: bytes) -> None:
    expected = Request.FromString(data)
    view = split_infer_request(data)
    assert [data[slice(*span)] for span in view.raw] == list(expected.raw_input_contents)
    assert data[slice(*view.id)].decode() == expected.id
    header = view.parse()
    assert len(header.inputs) == len(expected.inputs)
    assert max(view.typed, default=-1) < len(expected.inputs)
    for index, one in enumerate(expected.inputs):
        of_header = header.inputs[index].contents
        # The order among packed and unpacked chunks of one field is lost; such a field is refused later.
        assert len(of_header.fp32_contents) * 4 + len(packed_of(view, index, 6)) == 4 * len(one.contents.fp32_contents)
        if not of_header.fp32_contents:
            values = one.contents.fp32_contents
            assert packed_of(view, index, 6) == struct.pack(f"<{len(values)}f", *values)
        fp64 = one.contents.fp64_contents
        assert packed_of(view, index, 7) == struct.pack(f"<{len(fp64)}d", *fp64)
        flags = packed_of(view, index, 1)
        if flags.isascii():  # otherwise not one byte each, which whoever uses them refuses
            assert [flag != 0 for flag in flags] == list(one.contents.bool_contents)
        for name in PACKED:
            one.contents.ClearField(name)
            of_header.ClearField(name)
        if one.HasField("contents") and not one.contents.ByteSize():
            one.ClearField("contents")
            header.inputs[index].ClearField("contents")
    del expected.raw_input_contents[:]
    assert header.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(request_bytes)
def test_a_request_is_read_as_protobuf_reads_it(data: bytes) -> None:
    check_against_protobuf(data)


def is_broken(tag: int, chunk: bytes) -> bool:
    """Return whether packed contents are no whole elements, which whoever uses them sees by their length."""
    return bool(chunk) and (
        chunk[-1] >= 0x80 or len(chunk) > 9 if tag == 10 else len(chunk) % (4 if tag == 50 else 8) > 0
    )


@given(wire.damaged(request_bytes))
def test_what_protobuf_refuses_is_refused_and_the_rest_is_read_alike(data: bytes) -> None:
    try:
        Request.FromString(data)
    except DecodeError:
        try:
            view = split_infer_request(data)
            view.parse()
        except CodecError:
            return
        chunks = [(tag, data[slice(*span)]) for typed in view.typed.values() for tag, span in typed]
        assert any(is_broken(tag, chunk) for tag, chunk in chunks)
    else:
        check_against_protobuf(data)


def test_tensor_data_are_parts_of_the_received_bytes_and_nothing_else_is_left_of_them_in_the_header() -> None:
    raw, typed = bytes(range(256)) * 400, struct.pack("<4000f", *range(4000))
    request = Request(model_name="smooth_l1", id="7", raw_input_contents=[raw, b""])
    request.inputs.add(name="INPUT", datatype="FP32", shape=[4000]).contents.fp32_contents.extend(range(4000))
    data = request.SerializeToString()
    view = split_infer_request(data)
    assert [data[slice(*span)] for span in view.raw] == [raw, b""]
    ((_, span),) = view.typed[0]
    assert data[slice(*span)] == typed
    assert len(view.header) < 100


# ---- Bounds ----


class CountedBytes(bytes):
    """Bytes that count how often one of them is read: the work that a reader does."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "unknown fields": lambda: TINY * COUNT,
    "empty ids": lambda: b"\x1a\x00" * COUNT,
    "one long id": lambda: wire.delimited(3, bytes(COUNT)),
    "parameters": lambda: b"\x22\x00" * COUNT,
    "empty inputs": lambda: b"\x2a\x00" * COUNT,
    "empty outputs": lambda: b"\x32\x00" * COUNT,
    "empty raw contents": lambda: b"\x3a\x00" * COUNT,
    "extents": lambda: wire.delimited(5, wire.delimited(3, bytes(COUNT))),
    "unknown fields of an input": lambda: wire.delimited(5, TINY * COUNT),
    "empty contents of an input": lambda: wire.delimited(5, b"\x2a\x00" * COUNT),
    "empty packed contents": lambda: wire.delimited(5, wire.delimited(5, b"\x32\x00" * COUNT)),
    "numbers of contents": lambda: wire.delimited(5, wire.delimited(5, b"\x10\x01" * COUNT)),
    "unpacked floats": lambda: wire.delimited(5, wire.delimited(5, (b"\x35" + bytes(4)) * COUNT)),
    "packed integers": lambda: wire.delimited(5, wire.delimited(5, wire.delimited(2, bytes(COUNT)))),
    "strings": lambda: wire.delimited(5, wire.delimited(5, b"\x42\x00" * COUNT)),
    "a group": lambda: wire.key(15, 3) + TINY * COUNT + wire.key(15, 4),
    "fields after the tensors": lambda: wire.delimited(7, bytes(COUNT)) + TINY * COUNT,
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_a_million_tiny_fields_cost_no_more_than_a_header_may_have(message: Callable[[], bytes]) -> None:
    data = CountedBytes(message())
    with pytest.raises(HeaderTooLarge):
        split_infer_request(data)
    assert data.reads <= 3 * MAX_HEADER_BYTES


def test_a_header_of_64_kib_is_taken_beside_any_amount_of_tensor_data_and_not_a_byte_more() -> None:
    tensors = wire.delimited(7, bytes(300_000)) * 2
    others = 2 * (len(wire.delimited(7, bytes(300_000))) - 300_000)
    padding = MAX_HEADER_BYTES - others - len(wire.delimited(15, bytes(60_000))) + 60_000
    assert len(split_infer_request(tensors + wire.delimited(15, bytes(padding))).raw) == 2
    with pytest.raises(HeaderTooLarge, match="at least 65537 bytes, at most 65536 are taken"):
        split_infer_request(tensors + wire.delimited(15, bytes(padding + 1)))


# ---- Remembered requests ----


def example(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"model_name": "smooth_l1", "id": "a1", "raw_input_contents": [b"12345678", b"abcdefgh"]}
    data: bytes = Request(**(fields | changes)).SerializeToString()
    return data


def remembered(data: bytes) -> KnownInferRequests[str]:
    known: KnownInferRequests[str] = KnownInferRequests()
    view = split_infer_request(data)
    known.remember(view, list(view.raw), "value")
    return known


def test_a_request_that_differs_in_its_id_and_its_elements_is_found_again() -> None:
    known = remembered(example())
    other = example(id="b2", raw_input_contents=[b"87654321", b"hgfedcba"])
    found = known.find(other)
    assert found is not None
    value, request_id, operands = found
    assert (value, request_id) == ("value", b"b2")
    assert [bytes(operand) for operand in operands] == [b"87654321", b"hgfedcba"]
    assert all(operand.obj is other for operand in operands)


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "smooth_l2"},
        {"id": "abc"},
        {"id": ""},
        {"raw_input_contents": [b"1234567", b"abcdefghi"]},
        {"raw_input_contents": [b"12345678abcdefgh"]},
        {"model_name": "smooth_l", "model_version": ""},
    ],
    ids=str,
)
def test_a_request_that_differs_in_anything_else_is_not(change: dict[str, Any]) -> None:
    assert remembered(example()).find(example(**change)) is None


def test_a_request_with_two_ids_is_not_remembered() -> None:
    """The second would be compared as a part of the header, or answered with as if it were the first."""
    data = wire.delimited(3, b"x") + wire.delimited(3, b"y")
    assert remembered(data).find(data) is None


def test_what_is_remembered_is_bounded() -> None:
    known: KnownInferRequests[int] = KnownInferRequests()
    requests = [wire.delimited(7, bytes(length)) for length in range(5000)]
    for length, request in enumerate(requests):
        view = split_infer_request(request)
        known.remember(view, list(view.raw), length)
    assert 0 < sum(known.find(request) is not None for request in requests) <= 4096
    large = split_infer_request(wire.delimited(15, bytes(2049)))
    known.remember(large, [], 0)
    assert known.find(large.data) is None


def test_of_requests_of_one_length_the_newest_are_remembered() -> None:
    known: KnownInferRequests[str] = KnownInferRequests()
    for name in "abcdefg":
        view = split_infer_request(example(model_name=name))
        known.remember(view, list(view.raw), name)
    found = [known.find(example(model_name=name)) for name in "abcdefg"]
    assert [one and one[0] for one in found] == [None, None, None, "d", "e", "f", "g"]


# ---- Responses ----


def response(parts: list[Any]) -> Any:
    return service_pb2.ModelInferResponse.FromString(b"".join(parts))  # type: ignore[attr-defined]


def test_a_response_has_one_raw_entry_for_each_output_an_empty_one_for_shared_memory() -> None:
    outputs = [("LOSS", "FP32", (2, 1)), ("GRAD", "FP16", (2, 300)), ("COUNT", "INT64", (1,))]
    form = response_form("smooth_l1_grad", "1", outputs, [8, 0, 8])
    message = response(form.parts("ünïque".encode(), [b"losslos2", b"", memoryview(b"countcou")]))
    assert (message.model_name, message.model_version, message.id) == ("smooth_l1_grad", "1", "ünïque")
    assert [(one.name, one.datatype, tuple(one.shape)) for one in message.outputs] == outputs
    assert list(message.raw_output_contents) == [b"losslos2", b"", b"countcou"]
    assert response(form.parts(b"", [b"losslos2", b"", b"countcou"])).id == ""


def test_a_streams_response_holds_a_response_and_says_that_it_is_the_last() -> None:
    form = response_form("mse", "1", [("LOSS", "FP32", (1,))], [4])
    parts = stream_response_parts([*form.parts(b"9", [b"loss"]), FINAL_FLAG])
    message = service_pb2.ModelStreamInferResponse.FromString(b"".join(parts))  # type: ignore[attr-defined]
    assert message.error_message == ""
    assert message.infer_response.parameters["triton_final_response"].bool_param
    assert list(message.infer_response.raw_output_contents) == [b"loss"]


def test_a_streams_error_names_the_request() -> None:
    message = service_pb2.ModelStreamInferResponse.FromString(  # type: ignore[attr-defined]
        stream_error("INPUT is missing", "mse", "9")
    )
    assert message.error_message == "INPUT is missing"
    assert (message.infer_response.model_name, message.infer_response.id) == ("mse", "9")
