"""Parts are joined as b"".join joins them, and other threads run meanwhile."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_api import raw_bytes
from lossgrad_api.raw_bytes import join_without_gil


@given(st.lists(st.tuples(st.binary(max_size=100), st.sampled_from([bytes, bytearray, memoryview])), max_size=6))
def test_parts_are_joined_in_order(parts: list[tuple[bytes, type]]) -> None:
    buffers = [kind(data) for data, kind in parts]
    assert join_without_gil(buffers) == b"".join(data for data, _ in parts)


def test_elsewhere_than_on_cpython_it_is_an_ordinary_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_bytes, "IS_SUPPORTED", False)
    assert join_without_gil([b"a", memoryview(b"bc")]) == b"abc"


def test_what_is_not_contiguous_is_refused_and_nothing_is_kept() -> None:
    part = bytearray(10)
    with pytest.raises(BufferError):
        join_without_gil([memoryview(part)[::2]])
    part.extend(b"x")  # which a view of it that is still held would forbid


def test_other_threads_run_while_it_copies() -> None:
    part = memoryview(bytearray(256 << 20))
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.0002):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        before = ticks
        joined = join_without_gil([part])
        during = ticks - before
    finally:
        stop.set()
        ticker.join()
    assert len(joined) == len(part)
    assert during >= 3  # of a few hundred; b"".join would let none through
