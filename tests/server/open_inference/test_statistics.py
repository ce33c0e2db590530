"""ModelStatistics counts what it says: held against batches that a test composes, and against the batcher's own clocks."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from lossgrad_server.batching.job import BatchFacts, Computed
from lossgrad_server.transport.open_inference.models import MODELS
from lossgrad_server.transport.open_inference.statistics import ModelStatistics
from lossgrad_server.work import WorkResult
from tests.server import calling
from tests.server.calling import Connect
from tests.server.open_inference.asking import infer, infer_request, messages, pair, refusal, stub_on
from tests.server.requests import request as native_request
from tests.server.serving import HeldWorker, RunningServer, StartServer, eventually


def statistics(stub: Any, model: str = "") -> dict[str, Any]:
    """Return the statistics by model."""
    response = stub.ModelStatistics(messages.ModelStatisticsRequest(name=model))
    return {one.name: one for one in response.model_stats}


def good(rows: int, model: str = "mse") -> Any:
    return infer_request(model, pair(rows, 5))


@pytest.fixture
def running(start_server: StartServer) -> RunningServer:
    return start_server(worker=HeldWorker())


@pytest.fixture
def stub(running: RunningServer, connect: Connect) -> Any:
    return stub_on(connect(running.address))


def test_all_models_or_one_begin_at_nothing(stub: Any) -> None:
    everything = statistics(stub)
    assert list(everything) == list(MODELS)
    assert list(statistics(stub, "huber")) == ["huber"]
    one = everything["huber"]
    assert one.version == "1"
    assert (one.inference_count, one.execution_count, one.last_inference) == (0, 0, 0)
    assert not one.batch_stats
    with pytest.raises(grpc.RpcError) as caught:
        statistics(stub, "resnet")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_requests_are_counted_in_rows_and_batches_once(running: RunningServer, stub: Any, connect: Connect) -> None:
    """Three requests of 2, 3 and 4 rows in one batch, beside one of another model and a native one."""
    worker = running.worker
    assert worker is not None
    worker.hold()
    first = stub.ModelInfer.future(good(1))
    worker.wait_for_batch()
    waiting = [stub.ModelInfer.future(good(rows)) for rows in (2, 3, 4)]
    waiting.append(stub.ModelInfer.future(good(8, "l1")))
    waiting.append(calling.stub_on(connect(running.address)).ComputeLoss.future(native_request([1.0], [2.0])))
    eventually(lambda: running.batcher.waiting_requests == 5)
    worker.release()
    for call in (first, *waiting):
        call.result()
    assert worker.wait_for_batch() == 5
    now = statistics(stub)
    mse, l1 = now["mse"], now["l1"]
    assert (mse.inference_count, mse.execution_count) == (10, 2)
    assert (l1.inference_count, l1.execution_count) == (8, 1)
    assert {one.batch_size: one.compute_infer.count for one in mse.batch_stats} == {1: 1, 9: 1}
    assert {one.batch_size: one.compute_infer.count for one in l1.batch_stats} == {8: 1}
    assert mse.inference_stats.success.count == 4
    assert mse.inference_stats.queue.count == 4
    # Every request of a batch is charged with all of it; the batch itself is counted once.
    of_batches = {one.batch_size: one.compute_infer.ns for one in mse.batch_stats}
    assert mse.inference_stats.compute_infer.ns == of_batches[1] + 3 * of_batches[9]
    assert {one.batch_size: one.compute_infer.ns for one in l1.batch_stats} == {8: of_batches[9]}


def test_durations_are_parts_of_the_whole(stub: Any) -> None:
    before = time.time_ns() // 1_000_000
    for _ in range(5):
        infer(stub, good(2))
    one = statistics(stub, "mse")["mse"]
    parts = one.inference_stats
    inside = parts.queue.ns + parts.compute_input.ns + parts.compute_infer.ns + parts.compute_output.ns
    assert 0 < inside < parts.success.ns
    assert parts.compute_input.count == parts.compute_output.count == parts.success.count == 5
    assert before <= one.last_inference <= time.time_ns() // 1_000_000
    assert (parts.cache_hit.count, parts.cache_miss.count) == (0, 0)


def test_failures_are_counted_apart_wherever_they_happen(running: RunningServer, stub: Any) -> None:
    refusal(stub, infer_request("mse", pair(2, 3), parameters={"denominator": 0}))
    assert running.worker is not None
    running.worker.failure = RuntimeError("a fault of the worker")
    refusal(stub, good(2))
    one = statistics(stub, "mse")["mse"]
    assert one.inference_stats.fail.count == 2
    assert one.inference_stats.fail.ns > 0
    assert (one.inference_stats.success.count, one.inference_count, one.execution_count) == (0, 0, 0)


def computed(batch_number: int) -> Computed:
    return Computed(WorkResult(b"", ()), 10, BatchFacts(20, 30, 40, 1, 1, batch_number))


def test_the_sizes_of_batches_that_are_told_apart_are_bounded() -> None:
    counts = ModelStatistics(MODELS["mse"])
    for size in range(1, 5001):
        counts.computed(size, computed(size), 100)
    message = counts.message()
    assert len(message["batch_stats"]) <= 1024 + 64
    assert sum(one["compute_infer"]["count"] for one in message["batch_stats"]) == 5000
    assert message["execution_count"] == 5000


def test_statistics_that_are_read_between_two_batches_are_whole() -> None:
    counts = ModelStatistics(MODELS["mse"])
    for number in (1, 2):
        for rows in (3, 4):
            counts.computed(rows, computed(number), 100)
        assert [(one["batch_size"], one["compute_input"]) for one in counts.message()["batch_stats"]] == [
            (7, {"count": number, "ns": 20 * number})
        ]
    assert counts.message()["inference_stats"]["queue"] == {"count": 4, "ns": 40}


def test_requests_of_one_batch_that_are_answered_apart_are_one_execution() -> None:
    """Results that are copied into shared memory are answered later than the others of their batch."""
    counts = ModelStatistics(MODELS["mse"])
    for number, rows in ((1, 2), (2, 5), (1, 3), (3, 1), (2, 4)):
        counts.computed(rows, computed(number), 100)
    message = counts.message()
    assert message["execution_count"] == 3
    assert [one["batch_size"] for one in message["batch_stats"]] == [1, 5, 9]
    assert message["inference_count"] == 15
