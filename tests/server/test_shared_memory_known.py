"""Requests over shared memory that differ from a checked one in their places only: read alike, and checked every time."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.shared_memory.rules import Budget
from lossgrad_server.shared_memory.segments import Segments, why_impossible
from lossgrad_server.transport.checks import RequestChecker
from lossgrad_server.transport.shared_tensors import KnownSharedRequests
from lossgrad_server.work import WorkItem
from tests.server.requests import L1, SMOOTH_L1, tensor, zeros

SIZE = 1 << 16
COUNT = 500


@pytest.fixture
def segments() -> Iterator[Segments]:
    if reason := why_impossible():
        pytest.skip(reason)
    segments = Segments(Budget(8, 1 << 20))
    yield segments
    segments.close()


@pytest.fixture
def tokens(segments: Segments) -> list[bytes]:
    """The names of two regions."""
    tokens = []
    for _ in range(2):
        segment, descriptor = segments.create(object(), SIZE)
        os.close(descriptor)
        tokens.append(segment.token)
    return tokens


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the requests that were parsed, which known ones are not."""
    from lossgrad_api import codec

    lengths: list[int] = []
    real = codec.parse_request_header

    def parse(data: bytes, start: int, end: int) -> pb.ComputeLossRequest:
        lengths.append(end - start)
        return real(data, start, end)

    monkeypatch.setattr(codec, "parse_request_header", parse)
    return lengths


def place(token: bytes, offset: int, byte_count: int) -> tensor_pb2.SharedMemory:
    return tensor_pb2.SharedMemory(region=token, offset=offset, byte_count=byte_count)


def shared(token: bytes, offset: int, count: int = COUNT) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[count], shared_memory=place(token, offset, 4 * count)
    )


def ask(token: bytes, offset: int = 8, output_offset: int = 40_000) -> pb.ComputeLossRequest:
    return pb.ComputeLossRequest(
        specs=[SMOOTH_L1, L1],
        input=shared(token, offset),
        target=shared(token, offset + 4 * COUNT),
        outputs=place(token, output_offset, 8192),
    )


def seen(checked: tuple[JobPlan, WorkItem, str]) -> tuple[object, ...]:
    """Return all that a check gives, comparable: memory by its contents."""
    plan, item, key = checked
    operands = [(bytes(operand), memoryview(operand).readonly) for operand in item.operands]
    return plan, item.header, operands, [bytes(one) for one in item.destinations if one is not None], key


def paint(segments: Segments) -> None:
    """Give every 8 bytes of every segment another value, so that bytes tell where they are from."""
    number = 0
    for segment in segments._segments.values():
        for at in range(0, segment.byte_count, 8):
            number += 1
            segment.memory[at : at + 8] = number.to_bytes(8, "little")


def test_the_next_of_a_kind_is_read_without_parsing_and_with_its_own_places(
    segments: Segments, tokens: list[bytes], parsed: list[int]
) -> None:
    paint(segments)
    checker = RequestChecker(1 << 20, segments)
    checker.check(ask(tokens[0]).SerializeToString())
    parsed.clear()
    for token, offset, output_offset in ((tokens[0], 8, 40_000), (tokens[1], 4096, 16), (tokens[1], 16, 50_000)):
        data = ask(token, offset, output_offset).SerializeToString()
        found = checker.check(data)
        assert not parsed
        assert seen(found) == seen(RequestChecker(1 << 20, segments).check(data))
        parsed.clear()
        # It is the memory itself that results are written to, not a copy.
        (memory,) = (one.memory for one in segments._segments.values() if one.token == token)
        destination = found[1].destinations[0]
        assert isinstance(destination, memoryview)
        destination[:4] = b"mark"
        assert memory[output_offset : output_offset + 4] == b"mark"
        paint(segments)


@pytest.mark.parametrize(
    "bad",
    [
        lambda _: ask(bytes(16)),
        lambda tokens: ask(tokens[1], 2**64 - 8 - 4 * COUNT),
        lambda tokens: ask(tokens[1], SIZE - 4 * COUNT),
        lambda tokens: ask(tokens[1], 12),
        lambda tokens: ask(tokens[1], 8, SIZE - 8184),
        lambda tokens: ask(tokens[1], 8, 2**63),
    ],
    ids=["unknown region", "overflow", "behind the end", "misaligned", "no room", "an odd place for the answer"],
)
def test_the_places_of_a_known_kind_are_refused_as_of_any(
    bad: Callable[[list[bytes]], pb.ComputeLossRequest], segments: Segments, tokens: list[bytes], parsed: list[int]
) -> None:
    checker = RequestChecker(1 << 20, segments)
    checker.check(ask(tokens[0]).SerializeToString())
    data = bad(tokens).SerializeToString()
    with pytest.raises(RequestError) as expected:
        RequestChecker(1 << 20, segments).check(data)
    parsed.clear()
    with pytest.raises(RequestError) as caught:
        checker.check(data)
    assert not parsed
    assert (caught.value.message, caught.value.reason) == (expected.value.message, expected.value.reason)


def test_a_region_that_was_given_back_is_unknown_to_known_requests_too(segments: Segments, tokens: list[bytes]) -> None:
    checker = RequestChecker(1 << 20, segments)
    data = ask(tokens[0]).SerializeToString()
    checker.check(data)
    segments.close()
    with pytest.raises(RequestError, match="does not know"):
        checker.check(data)


def test_small_tensors_that_came_along_are_the_requests_own(
    segments: Segments, tokens: list[bytes], parsed: list[int]
) -> None:
    paint(segments)
    checker = RequestChecker(1 << 20, segments)
    one = pb.ComputeLossRequest(specs=[L1], input=shared(tokens[0], 8, 2), target=zeros(2))
    checker.check(one.SerializeToString())
    parsed.clear()
    one.target.CopyFrom(tensor([3.0, 4.0]))
    _, item, _ = checker.check(b"xyz" + one.SerializeToString(), 3)
    assert not parsed
    assert bytes(item.operands[1]) == one.target.data
    assert bytes(item.operands[0]) == bytes(segments.part("input", tokens[0], 8, 8))


def test_any_number_of_sizes_are_known_at_a_time(segments: Segments, tokens: list[bytes], parsed: list[int]) -> None:
    """Requests for tensors of any size have as many bytes."""
    paint(segments)
    checker = RequestChecker(1 << 20, segments)
    requests = [
        pb.ComputeLossRequest(
            specs=[SMOOTH_L1], input=shared(tokens[0], 8, count), target=shared(tokens[1], 16, count),
            outputs=place(tokens[0], 40_000, 8192),
        ).SerializeToString()
        for count in range(1, 200)
    ]  # fmt: skip
    assert len({len(one) for one in requests}) == 1
    for one in requests:
        checker.check(one)
    parsed.clear()
    found = [checker.check(one) for one in requests]
    assert not parsed
    for count, (plan, item, _) in enumerate(found, 1):
        assert plan.input.shape == (count,)
        assert [len(operand) for operand in item.operands] == [4 * count, 4 * count]
        assert [len(one) for one in item.destinations if one is not None] == [4 * count]


def test_how_many_are_known_is_bounded(
    segments: Segments, tokens: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownSharedRequests, "_MAX_KNOWN", 10)
    known = KnownSharedRequests(segments)
    checker = RequestChecker(1 << 20, segments)
    for count in range(1, 50):
        for specs in range(1, 8):
            one = pb.ComputeLossRequest(
                specs=[L1] * specs, input=shared(tokens[0], 8, count), target=shared(tokens[1], 16, count)
            )
            data = one.SerializeToString()
            plan, _, _ = checker.check(data)
            known.remember(data, 0, len(data), plan)
            found = known.find(data, 0, len(data))
            assert found is not None
            assert found[0] == plan
            kept = [len(alike) for layouts in known._known.values() for alike in layouts.values()]
            assert 0 < sum(kept) == known._count <= 10


def test_what_names_itself_is_read_every_time(segments: Segments, tokens: list[bytes], parsed: list[int]) -> None:
    """Because errors echo the key."""
    checker = RequestChecker(1 << 20, segments)
    for key in ("a", "b"):
        one = ask(tokens[0])
        one.idempotency_key = key
        *_, echoed = checker.check(one.SerializeToString())
        assert echoed == key
    assert len(parsed) == 2


def test_whatever_changes_in_a_known_request_it_is_read_as_if_it_were_new(
    segments: Segments, tokens: list[bytes]
) -> None:
    """Any byte, a piece cut out, or a piece of another request: the answer is that of a checker that knows nothing."""
    paint(segments)
    pick = random.Random(7)
    inline = pb.ComputeLossRequest(
        specs=[L1], input=shared(tokens[0], 8, 2), target=zeros(2), mask=tensor([1, 0], "bool")
    )
    zero_offset = ask(tokens[0], 0)
    good = [one.SerializeToString() for one in (ask(tokens[0]), ask(tokens[1], 4096), inline, zero_offset)]
    checker = RequestChecker(1 << 20, segments)
    for one in good:
        checker.check(one)
    outcomes = {"taken": 0, "refused": 0}
    for _ in range(3000):
        data = bytearray(pick.choice(good))
        for _ in range(pick.choice((1, 1, 2, 3))):
            at = pick.randrange(len(data))
            what = pick.randrange(4)
            if what == 0:
                data[at] ^= 1 << pick.randrange(8)
            elif what == 1:
                data[at] = pick.choice((0, 1, 8, 0x22, 0x7F, 0x80, 0xFF))
            elif what == 2:
                del data[at : at + pick.randrange(1, 9)]
            else:
                other = pick.choice(good)
                data[at : at + 8] = other[at : at + 8]
            if not data:
                break
        answers = []
        for each in (checker, RequestChecker(1 << 20, segments)):
            try:
                answers.append(seen(each.check(bytes(data))))
            except RequestError as error:
                answers.append((error.message, error.reason, error.request_id))
        assert answers[0] == answers[1]
        outcomes["taken" if len(answers[0]) > 3 else "refused"] += 1
    assert min(outcomes.values()) > 100
