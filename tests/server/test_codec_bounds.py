"""No message costs more than its size justifies: what is not tensor data is bounded before it is looked at in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from tests.server import wire_messages as wire

MAX_HEADER_BYTES = 65536  # as the .proto says
COUNT = 1_000_000
TINY = wire.key(15, 0) + b"\x00"  # an unknown field of two bytes


class CountedBytes(bytes):
    """Bytes that count how often one of them is read: the work that a reader does."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def request_with_header_of(byte_count: int, data: bytes = bytes(100_000)) -> bytes:
    """Return a request that has so many bytes beside its tensors' data."""
    tensor = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[len(data)], data=data)
    request = pb.ComputeLossRequest(
        specs=[pb.LossSpec(l1=pb.L1Loss())], input=tensor, target=tensor
    ).SerializeToString()
    room = byte_count - (len(request) - 2 * len(data))
    (padding,) = (field for size in (2, 3, 4) if len(field := wire.delimited(15, bytes(room - size))) == room)
    return request + padding


# ---- One request ----


def test_a_header_of_64_kib_is_taken_beside_any_amount_of_tensor_data() -> None:
    view = codec.split_compute_request(request_with_header_of(MAX_HEADER_BYTES))
    assert len(view.header) == MAX_HEADER_BYTES
    assert len(view.input) == len(view.target) == 100_000


def test_a_header_of_one_byte_more_is_refused_with_both_numbers() -> None:
    with pytest.raises(codec.HeaderTooLarge, match=r"at least 65537 bytes, at most 65536 are taken"):
        codec.split_compute_request(request_with_header_of(MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize("before", [True, False])
def test_a_key_counts_as_header_wherever_it_stands(before: bool) -> None:
    request = request_with_header_of(100)
    key = wire.delimited(3, bytes(MAX_HEADER_BYTES))
    with pytest.raises(codec.HeaderTooLarge):
        codec.split_compute_request(key + request if before else request + key)


HOSTILE_REQUESTS: dict[str, Callable[[], bytes]] = {
    "unknown fields": lambda: TINY * COUNT,
    "known fields": lambda: b"\x10\x01" * COUNT,
    "empty specs": lambda: b"\x0a\x00" * COUNT,
    "empty tensors": lambda: b"\x3a\x00" * COUNT,
    "empty keys": lambda: b"\x1a\x00" * COUNT,
    "one long key": lambda: wire.delimited(3, bytes(COUNT)),
    "unknown fields of a tensor": lambda: wire.delimited(7, TINY * COUNT),
    "types of a tensor": lambda: wire.delimited(7, b"\x08\x01" * COUNT),
    "empty data of a tensor": lambda: wire.delimited(7, b"\x1a\x00" * COUNT),
    "extents": lambda: wire.delimited(7, (wire.key(2, 1) + bytes(8)) * COUNT),
    "packed extents": lambda: wire.delimited(7, wire.delimited(2, bytes(8 * COUNT))),
    "a group of unknown fields": lambda: wire.key(15, 3) + TINY * COUNT + wire.key(15, 4),
    "a group in a tensor": lambda: wire.delimited(7, wire.key(15, 3) + TINY * COUNT + wire.key(15, 4)),
    "many groups": lambda: (wire.key(15, 3) + wire.key(15, 4)) * COUNT,
    "groups of groups": lambda: (wire.key(15, 3) * 30 + TINY * 9000 + wire.key(15, 4) * 30) * 100,
    "fields after the tensors": lambda: request_with_header_of(100) + TINY * COUNT,
}


@pytest.mark.parametrize("message", HOSTILE_REQUESTS.values(), ids=HOSTILE_REQUESTS)
def test_a_million_tiny_fields_cost_no_more_than_a_header_may_have(message: Callable[[], bytes]) -> None:
    data = CountedBytes(message())
    with pytest.raises(codec.HeaderTooLarge):
        codec.split_compute_request(data)
    assert data.reads <= 2 * MAX_HEADER_BYTES


def test_groups_are_followed_32_deep_and_no_deeper() -> None:
    def nested(depth: int) -> bytes:
        return wire.key(15, 3) * depth + wire.key(15, 4) * depth

    codec.split_compute_request(nested(32))
    with pytest.raises(codec.CodecError, match="more than 32 deep"):
        codec.split_compute_request(nested(33))
    with pytest.raises(codec.CodecError, match="more than 32 deep"):
        codec.decode_compute_response(nested(100_000))


# ---- A stream message ----


def tagged(payload: bytes) -> bytes:
    return wire.delimited(1, payload)


HOSTILE_STREAM_MESSAGES: dict[str, Callable[[], bytes]] = {
    "unknown fields": lambda: TINY * COUNT,
    "a group": lambda: wire.key(15, 3) + TINY * COUNT + wire.key(15, 4),
    "tags of one request": lambda: tagged(b"\x08\x01" * COUNT),
    "timeouts of one request": lambda: tagged(b"\x10\x01" * COUNT),
    "unknown fields of one request": lambda: tagged(TINY * COUNT),
    "empty requests of one entry": lambda: tagged(b"\x1a\x00" * COUNT),
    "a group in an entry": lambda: tagged(wire.key(15, 3) + TINY * COUNT + wire.key(15, 4)),
    "fields behind a large request": lambda: tagged(wire.delimited(3, bytes(COUNT)) + TINY * COUNT),
    "fields in every entry": lambda: tagged(TINY * 1000) * 1000,
}


@pytest.mark.parametrize("message", HOSTILE_STREAM_MESSAGES.values(), ids=HOSTILE_STREAM_MESSAGES)
def test_a_stream_message_is_bounded_alike(message: Callable[[], bytes]) -> None:
    data = CountedBytes(message())
    with pytest.raises(codec.HeaderTooLarge):
        codec.split_stream_request(data, 1000)
    assert data.reads <= 4 * MAX_HEADER_BYTES


def test_a_full_message_of_requests_with_full_headers_is_taken() -> None:
    request = request_with_header_of(MAX_HEADER_BYTES, b"")
    entry = wire.key(1, 0) + wire.varint(-1) + wire.key(2, 0) + wire.varint(-1) + wire.delimited(3, request)
    requests = codec.split_stream_request(tagged(entry) * 300, 300)
    assert len(requests) == 300
    assert all(request[:2] == (-1, -1) for request in requests)


def test_one_request_too_many_is_refused_without_reading_the_rest() -> None:
    data = CountedBytes(tagged(b"") * COUNT)
    with pytest.raises(codec.TooManyRequests, match="more than 10 requests"):
        codec.split_stream_request(data, 10)
    assert data.reads < 100
    assert len(codec.split_stream_request(tagged(b"") * 10, 10)) == 10


# ---- Remembered requests ----


def test_what_is_remembered_is_bounded() -> None:
    """Callers choose lengths and headers; neither their number nor their size may fill the server's memory."""
    known: codec.KnownRequests[int] = codec.KnownRequests()
    requests = [wire.delimited(7, wire.delimited(3, bytes(length))) for length in range(5000)]
    for length, request in enumerate(requests):
        known.remember(request, 0, len(request), length)
    assert 0 < sum(known.find(request, 0, len(request)) is not None for request in requests) <= 4096
    large = request_with_header_of(2049)
    known.remember(large, 0, len(large), 0)
    assert known.find(large, 0, len(large)) is None


def test_of_requests_of_one_length_the_newest_are_remembered() -> None:
    known: codec.KnownRequests[int] = codec.KnownRequests()
    requests = [
        pb.ComputeLossRequest(specs=[pb.LossSpec(gradient_scale=number)]).SerializeToString() for number in range(1, 8)
    ]
    assert len({len(request) for request in requests}) == 1
    for number, request in enumerate(requests):
        known.remember(request, 0, len(request), number)
    values = [known.find(request, 0, len(request)) for request in requests]
    assert [value and value[0] for value in values] == [None, None, None, 3, 4, 5, 6]
