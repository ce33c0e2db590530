"""What Metrics makes of what it is told, without a server: fullness, outcomes, rejections, retries, a device's memory."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import generate_latest

from lossgrad_server.batching.forming import Batch, ClosedBy
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.gauges import Limits
from lossgrad_server.metrics import Metrics, SliceOutcome
from lossgrad_server.work import BatchResult, Retry
from tests.server.metric_names import CLOSED
from tests.server.scraping import Scrape, labelled


def test_a_batch_is_as_full_as_the_cap_that_it_is_nearest_to() -> None:
    limits = Limits(batch_requests=4, batch_elements=100, batch_bytes=1000)
    job: Any = object()
    assert limits.fill_of(Batch(jobs=[job], element_count=10, byte_count=100)) == 0.25
    assert limits.fill_of(Batch(jobs=[job], element_count=90, byte_count=100)) == 0.9
    assert limits.fill_of(Batch(jobs=[job], element_count=10, byte_count=1500)) == 1.5
    assert Limits().fill_of(Batch(jobs=[job], element_count=10, byte_count=1500)) == 0.0


def test_a_devices_memory_is_read_at_every_scrape(metrics: Metrics) -> None:
    memory = {"allocated": 10, "reserved": 20, "used": 30, "total": 100}
    metrics.watch_device_memory(lambda: memory)
    memory["allocated"] = 15
    found = Scrape(generate_latest(metrics.registry).decode())
    assert found.of("lossgrad_device_memory_bytes") == {
        labelled(device="cpu", kind="allocated"): 15,
        labelled(device="cpu", kind="reserved"): 20,
        labelled(device="cpu", kind="used"): 30,
        labelled(device="cpu", kind="total"): 100,
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(device="cpu", build_info={"version": "1"})


def test_every_error_has_an_outcome_and_a_rejection_from_the_closed_sets(metrics: Metrics) -> None:
    for code in Code:
        for reason in Reason:
            metrics.failed(None, "native", RequestError("", code=code, reason=reason))
    found = Scrape(generate_latest(metrics.registry).decode())
    outcomes = {dict(labels)["outcome"] for labels in found.of("lossgrad_requests_total")}
    assert outcomes == CLOSED["outcome"] - {"ok", *SliceOutcome}
    assert sum(found.of("lossgrad_requests_total").values()) == len(Code) * len(Reason)
    assert {dict(labels)["reason"] for labels in found.of("lossgrad_rejected_total")} == CLOSED["reason"] - {*Retry}


def test_what_was_computed_once_more_is_counted_by_why(metrics: Metrics) -> None:
    batch = Batch(closed_by=ClosedBy.IDLE)
    metrics.batch_done(batch, BatchResult([], 1, 2, 3), 6)
    metrics.batch_done(batch, BatchResult([], 1, 2, 3, (Retry.ERROR, Retry.WORKER_LOST, Retry.ERROR)), 6)
    found = Scrape(generate_latest(metrics.registry).decode())
    assert {reason: found("lossgrad_batch_retries_total", device="cpu", reason=reason) for reason in Retry} == {
        "out_of_memory": 0,  # there from the start, so that a rate of it is 0 and not nothing
        "error": 2,
        "worker_lost": 1,
    }


@pytest.mark.parametrize(
    ("code", "reason", "outcome"),
    [
        (Code.INVALID_ARGUMENT, Reason.BAD_SHAPE, "invalid"),
        (Code.RESOURCE_EXHAUSTED, Reason.RESULT_TOO_LARGE, "too_large"),
        (Code.RESOURCE_EXHAUSTED, Reason.OUT_OF_DEVICE_MEMORY, "oom"),
        (Code.UNAVAILABLE, Reason.QUEUE_FULL, "overloaded"),
        (Code.UNAVAILABLE, Reason.DEVICE_FAILED, "device"),
        (Code.UNAVAILABLE, Reason.WORKER_RESTARTING, "device"),
        (Code.INTERNAL, Reason.WORKER_CRASHED, "internal"),
        (Code.NOT_FOUND, Reason.UNKNOWN_REGION, "shm"),
        (Code.RESOURCE_EXHAUSTED, Reason.REGIONS_FULL, "shm"),
        (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_PASSED, "deadline"),
        (Code.CANCELLED, Reason.CANCELLED, "cancelled"),
        (Code.INTERNAL, Reason.INTERNAL, "internal"),
    ],
)
def test_outcomes_tell_whose_trouble_it_was(metrics: Metrics, code: Code, reason: Reason, outcome: str) -> None:
    metrics.failed(None, "stream", RequestError("", code=code, reason=reason))
    found = Scrape(generate_latest(metrics.registry).decode())
    assert found("lossgrad_requests_total", loss="unknown", mode="unknown", api="stream", outcome=outcome) == 1
