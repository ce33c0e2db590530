"""Segments: sealed, bounded, found by their names only, and mapped for as long as anybody computes in them."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError, TooLarge
from lossgrad_server.shared_memory import segments as module
from lossgrad_server.shared_memory.rules import Budget
from lossgrad_server.shared_memory.segments import Segment, Segments, free_pages, why_impossible

MIB = 1 << 20


@pytest.fixture(autouse=True)
def needs_memfd() -> None:
    if reason := why_impossible():
        pytest.skip(reason)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget() -> Budget:
    return Budget(8, 64 * MIB)


@pytest.fixture
def segments(budget: Budget, clock: Clock) -> Iterator[Segments]:
    segments = Segments(budget, clock)
    yield segments
    segments.close()
    assert (budget.regions, budget.bytes) == (0, 0)


def create(segments: Segments, byte_count: int, owner: object = "somebody") -> Segment:
    segment, descriptor = segments.create(owner, byte_count)
    os.close(descriptor)
    return segment


def descriptor_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:lossgrad")


def test_its_size_cannot_be_changed_by_who_has_it(segments: Segments) -> None:
    """Without that a server that touches its mapping could be killed by any caller."""
    segment, descriptor = segments.create("somebody", MIB)
    try:
        for size in (0, MIB - 1, MIB + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            os.pwrite(descriptor, b"x", MIB)
        assert os.fstat(descriptor).st_size == MIB
        with mmap.mmap(descriptor, MIB) as theirs:
            theirs[5] = 7
        assert segments.part("input", segment.token, 0, 8)[5] == 7
    finally:
        os.close(descriptor)


def test_a_part_is_the_memory_itself(segments: Segments) -> None:
    segment = create(segments, 100)
    segments.part("input", segment.token, 8, 4)[:] = b"abcd"
    assert segment.memory[8:12] == b"abcd"
    assert len(segments.part("input", segment.token, 96, 4)) == 4
    assert len(segments.part("input", segment.token, 0, 0)) == 0


@pytest.mark.parametrize(("offset", "count"), [(0, 101), (96, 5), (104, 0), (2**64 - 8, 8), (8, 2**64 - 8)])
def test_there_is_no_part_outside(segments: Segments, offset: int, count: int) -> None:
    segment = create(segments, 100)
    with pytest.raises(InvalidRequest) as caught:
        segments.part("input", segment.token, offset, count)
    assert caught.value.reason == Reason.BAD_REGION


def test_a_part_is_aligned(segments: Segments) -> None:
    segment = create(segments, 100)
    with pytest.raises(InvalidRequest, match=r"begins at byte 4 .* multiple of 8"):
        segments.part("target", segment.token, 4, 4)


@pytest.mark.parametrize("token", [b"", b"x", bytes(16), bytes(17), bytes(1000)])
def test_a_name_that_was_not_given_finds_nothing_and_is_not_repeated(segments: Segments, token: bytes) -> None:
    segment = create(segments, 100)
    with pytest.raises(RequestError) as caught:
        segments.part("input", token, 0, 1)
    assert caught.value.code == Code.NOT_FOUND
    assert caught.value.reason == Reason.UNKNOWN_REGION
    assert segment.token.hex() not in caught.value.message


def test_names_are_random(segments: Segments) -> None:
    tokens = {create(segments, 8).token for _ in range(8)}
    assert len(tokens) == 8
    assert all(len(token) == 16 for token in tokens)


def test_only_its_owner_ends_it(segments: Segments) -> None:
    mine, theirs = object(), object()
    segment, other = create(segments, 8, mine), create(segments, 8, theirs)
    assert segments.take(theirs, segment.token) is None
    assert segments.take(mine, b"nonsense") is None
    assert segments.has_any(mine)
    assert segments.take(mine, segment.token) is segment
    assert segments.take(mine, segment.token) is None
    assert not segments.has_any(mine)
    assert segments.take_all(mine) == []
    assert segments.take_all(theirs) == [other]
    assert (segments.count, segments.byte_count) == (0, 0)


def test_a_part_outlives_its_segment(segments: Segments) -> None:
    gc.collect()
    others = mappings()
    segment = create(segments, MIB)
    part = segments.part("input", segment.token, 0, MIB)
    part[:4] = b"abcd"
    segments.take_all("somebody")
    del segment
    assert mappings() == others + 1
    assert bytes(part[:4]) == b"abcd"
    part[4:8] = b"efgh"
    del part
    gc.collect()
    assert mappings() == others


def test_freed_pages_read_as_zeros_and_can_be_written(segments: Segments) -> None:
    segment = create(segments, MIB)
    part = segments.part("input", segment.token, 0, MIB)
    part[:] = b"x" * MIB
    free_pages(segment)
    assert bytes(part) == bytes(MIB)
    part[-1] = 1


def test_the_budget_bounds_them(segments: Segments, budget: Budget) -> None:
    create(segments, 40 * MIB)
    with pytest.raises(TooLarge):
        segments.create("somebody", 30 * MIB)
    with pytest.raises(RequestError):
        segments.create("somebody", 2**63)
    assert segments.count == 1
    for _ in range(7):
        create(segments, 8)
    with pytest.raises(TooLarge):
        segments.create("somebody", 8)
    assert budget.regions == 8


def test_nothing_is_left_of_a_segment_that_the_system_refuses(
    segments: Segments, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = descriptor_count()

    def refuse(*_: object) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "no")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="no"):
        segments.create("somebody", MIB)
    assert budget.regions == 0
    assert descriptor_count() == descriptors


def test_what_nobody_uses_is_given_up_for_others(segments: Segments, clock: Clock) -> None:
    used, unused = create(segments, 8), create(segments, 8)
    clock.now += 599
    segments.part("input", used.token, 0, 8)
    assert segments.give_up_unused() == 0
    clock.now += 2
    assert segments.give_up_unused() == 1
    segments.part("input", used.token, 0, 8)
    with pytest.raises(RequestError, match="long unused"):
        segments.part("input", unused.token, 0, 8)


def test_strict_overcommit_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under it a page may be refused at its first touch, seals or no seals."""
    setting = tmp_path / "overcommit_memory"
    monkeypatch.setattr(module, "_OVERCOMMIT", setting)
    for value, is_possible in (("0\n", True), ("1\n", True), ("2\n", False)):
        setting.write_text(value)
        assert (why_impossible() == "") is is_possible
    setting.unlink()
    assert why_impossible() == ""
