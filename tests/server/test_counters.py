"""Our counter exports what the library's would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as LibraryCounter

from lossgrad_server.counters import Counter
from tests.server.scraping import Scrape


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\\\n', ""]), st.integers(0, 1 << 40)), max_size=30))
def test_our_counter_exports_what_the_librarys_would(counted: list[tuple[str, int]]) -> None:
    ours_registry, theirs_registry = CollectorRegistry(), CollectorRegistry()
    ours = Counter("requests", "Help.", ("loss", "api"), registry=ours_registry)
    theirs = LibraryCounter("requests", "Help.", ("loss", "api"), registry=theirs_registry)
    for loss, amount in counted:
        ours.labels(loss, "native").inc(amount)
        theirs.labels(loss, "native").inc(amount)
    ours.labels("l1", "native").inc()
    theirs.labels("l1", "native").inc()
    exported, expected = (Scrape(generate_latest(registry).decode()) for registry in (ours_registry, theirs_registry))
    assert exported.series() == expected.series()
    for key in expected.series():
        assert exported.samples[key] == expected.samples[key]
    assert exported.types["requests"] == expected.types["requests"] == "counter"


def test_a_counter_refuses_labels_that_it_does_not_have() -> None:
    registry = CollectorRegistry()
    bad: Callable[..., Any] = Counter("requests", "Help.", ("loss",), registry=registry).labels
    with pytest.raises(ValueError, match="loss"):
        bad("l1", "native")
    with pytest.raises(ValueError, match="Duplicated"):
        Counter("requests", "Help.", (), registry=registry)
