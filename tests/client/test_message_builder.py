"""Messages that are written in place are what the generated class reads, and what the server's codec reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad import message_builder
from lossgrad.message_builder import HEAD_BYTES, MessageBuilder
from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb

REQUESTS = st.lists(st.tuples(st.integers(1, (1 << 35) - 1), st.binary(max_size=300)), min_size=1, max_size=8)


def body_of(key: bytes) -> bytes:
    return pb.ComputeLossRequest(idempotency_key=key.hex(), specs=[pb.LossSpec()]).SerializeToString()


def check(requests: list[tuple[int, bytes]], spare: int) -> None:
    bodies = [(tag, body_of(key)) for tag, key in requests]
    builder = MessageBuilder(sum(HEAD_BYTES + len(body) for _, body in bodies) + spare)
    for tag, body in bodies:
        assert builder.has_room(len(body))
        middle = len(body) // 2
        builder.add(tag, [memoryview(bytearray(body[:middle])), body[middle:]], len(body))
    assert len(builder) == len(bodies)
    message, copies = builder.finish()
    assert [bytes(copy) for copy in copies] == [body for _, body in bodies]
    read = pb.StreamComputeLossRequest.FromString(message).requests
    assert [(each.tag, each.request.SerializeToString()) for each in read] == bodies
    views = codec.split_stream_request(message, len(bodies))
    assert [(view.tag, message[view.start : view.end]) for view in views] == bodies
    assert {view.timeout_ns for view in views} == {0}


@given(requests=REQUESTS, spare=st.sampled_from([0, 1, 1000]))
def test_a_message_is_its_requests_whether_or_not_it_is_full(requests: list[tuple[int, bytes]], spare: int) -> None:
    check(requests, spare)


def test_elsewhere_than_on_cpython_it_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_builder, "IS_SUPPORTED", False)
    check([(1, b"a"), (300, b"bc"), ((1 << 35) - 1, b"")], 7)


def test_the_arrays_may_change_once_they_are_added() -> None:
    array = bytearray(b"\x0a\x00")
    builder = MessageBuilder(HEAD_BYTES + len(array))
    builder.add(1, [memoryview(array)], len(array))
    assert not builder.has_room(0)
    array[:] = b"\xff\xff"
    message, (copy,) = builder.finish()
    assert bytes(copy) == b"\x0a\x00"
    assert len(message) == HEAD_BYTES + 2
