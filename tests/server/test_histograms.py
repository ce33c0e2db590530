"""Our histogram exports what the library's would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram

from lossgrad_server.histograms import Histogram
from lossgrad_server.metrics import SECONDS
from tests.server.scraping import Scrape


@given(st.lists(st.tuples(st.floats(0, 100) | st.sampled_from(SECONDS), st.integers(1, 5)), max_size=30))
def test_our_histogram_exports_what_the_librarys_would(observations: list[tuple[float, int]]) -> None:
    ours = Histogram("seconds", "Help.", ("stage",), SECONDS)
    theirs_registry, ours_registry = CollectorRegistry(), CollectorRegistry()
    theirs = LibraryHistogram("seconds", "Help.", ("stage",), buckets=SECONDS, registry=theirs_registry)
    ours_registry.register(ours)
    series = ours.labels("queue")
    child = theirs.labels("queue")
    for value, times in observations:
        series.observe(value, times)
        for _ in range(times):
            child.observe(value)
    exported, expected = (Scrape(generate_latest(registry).decode()) for registry in (ours_registry, theirs_registry))
    assert exported.series() == expected.series()
    for key in expected.series():
        assert exported.samples[key] == pytest.approx(expected.samples[key])
    assert exported.types["seconds"] == "histogram"


def test_a_histogram_refuses_labels_that_it_does_not_have() -> None:
    histogram = Histogram("seconds", "Help.", ("stage",), SECONDS)
    bad: Callable[..., Any] = histogram.labels
    with pytest.raises(ValueError, match="stage"):
        bad("queue", "cpu")
    registry = CollectorRegistry()
    registry.register(histogram)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Histogram("seconds", "Help.", (), SECONDS))
