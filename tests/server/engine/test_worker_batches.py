"""The worker's batches: the same bits in any company, piece size, thread count and alignment; failures that stay alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lossgrad_server.engine import torch_worker
from lossgrad_server.engine.computation import Computation, Computed
from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker, FailureKind, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, job, result_bytes, run, spec


def mixed_jobs() -> list[Job]:
    """Return jobs of many kinds and sizes, NaN and infinity among their data."""
    random = np.random.default_rng(20)
    jobs: list[Job] = []
    kinds, reductions = list(LossKind), list(Reduction)
    for index, shape in enumerate([(1,), (17, 3), (3, 4096), (5000,), (2, 9001), (40_000,), (0, 2), (300, 70)]):
        data_type = FLOATS[index % 4]
        x, y = random.normal(size=shape), random.normal(size=shape)
        if x.size and index % 3 == 0:
            x.flat[0], y.flat[-1] = np.nan, np.inf
        specs = [spec(kinds[index % 4], 0.3 + index, reduction) for reduction in reductions[index % 3 :]]
        weight = random.uniform(0, 2, size=shape) if index % 2 else None
        mask = random.random(shape) < 0.8 if index % 4 > 1 else None
        jobs.append(job(specs, x, y, data_type, weight=weight, mask=mask))
    divided = spec(reduction=Reduction.SAMPLE_MEAN, denominator=3.0)
    jobs.append(job(divided, random.normal(size=(300, 70)), random.normal(size=(300, 70))))
    jobs.append(job(spec(reduction=Reduction.SUM), random.normal(size=(90, 1)), random.normal(size=(1, 111))))
    return jobs


def test_company_changes_no_bits(worker: DeviceWorker) -> None:
    jobs = mixed_jobs()
    alone = [result_bytes(run(worker, one)) for one in jobs]
    random = np.random.default_rng(21)
    for _ in range(20):
        chosen = random.integers(0, len(jobs), size=random.integers(1, 12))
        outcomes = worker.submit([jobs[index].item for index in chosen]).result().outcomes
        for index, outcome in zip(chosen, outcomes, strict=True):
            assert isinstance(outcome, WorkResult)
            assert result_bytes(outcome) == alone[index]


@pytest.mark.parametrize("piece_elements", [4096, 8192, 1 << 20])
def test_the_piece_size_changes_no_bits(worker: DeviceWorker, piece_elements: int) -> None:
    other = TorchWorker(torch.device("cpu"), piece_elements=piece_elements)
    for one in mixed_jobs():
        assert result_bytes(run(other, one)) == result_bytes(run(worker, one))


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_restored")
def test_the_thread_count_changes_no_bits() -> None:
    random = np.random.default_rng(22)
    x, y = random.normal(size=(2, 7, 50_001)).astype(np.float32)
    one = job([spec(reduction=reduction) for reduction in Reduction], x, y)
    results: list[Any] = []
    for threads in (1, 2, 5):
        worker = TorchWorker(torch.device("cpu"), threads=threads)
        worker.warm_up()
        assert torch.get_num_threads() == threads
        results.append(result_bytes(run(worker, one)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("count", [37, 40_000])  # copied, and viewed where it lies
@pytest.mark.parametrize("data_type", FLOATS)
def test_operands_may_lie_anywhere_and_are_not_written_to(
    worker: DeviceWorker, data_type: DataType, count: int
) -> None:
    random = np.random.default_rng(23)
    specs = [spec(kind, 0.5, reduction) for kind in LossKind for reduction in (Reduction.NONE, Reduction.MEAN)]
    one = job(
        specs,
        random.normal(size=count),
        random.normal(size=count),
        data_type,
        weight=random.uniform(size=count),
        weight_type=DataType.FLOAT64,
        mask=random.random(count) < 0.5,
    )
    expected = result_bytes(run(worker, one))
    for offset in range(1, 9):
        received = [b"\x5a" * offset + operand + b"\xa5" * 3 for operand in one.operands]
        views = tuple(memoryview(data)[offset:-3] for data in received)
        (outcome,) = worker.submit([WorkItem(one.plan.header, views)]).result().outcomes
        assert isinstance(outcome, WorkResult)
        assert result_bytes(outcome) == expected
        assert received == [b"\x5a" * offset + operand + b"\xa5" * 3 for operand in one.operands]


def test_a_result_outlives_what_it_was_computed_from(worker: DeviceWorker) -> None:
    def compute() -> WorkResult:
        values = np.arange(50_000.0)
        return run(worker, job(spec(LossKind.L1, reduction=Reduction.NONE), values, -values, DataType.FLOAT64))

    result = compute()
    junk = [bytes([index]) * 400_000 for index in range(8)]
    np.testing.assert_array_equal(np.frombuffer(result.outputs[0], np.float64), 2 * np.arange(50_000.0))
    assert memoryview(result.outputs[0]).readonly
    assert len(junk) == 8


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory: secret"), FailureKind.OUT_OF_MEMORY),
        (MemoryError("secret"), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: secret"), FailureKind.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: secret"), FailureKind.DEVICE_LOST),
        (ValueError("secret"), FailureKind.INTERNAL),
        (RuntimeError("secret"), FailureKind.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_item_fails_alone(
    worker: DeviceWorker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    kind: FailureKind,
) -> None:
    good = job(spec(), np.ones(100), np.zeros(100))
    bad = job(spec(), np.ones(101), np.zeros(101))
    expected = result_bytes(run(worker, good))

    class Failing(Computation):
        def run(self) -> Computed:
            if self._plan.element_count == 101:
                raise error
            return super().run()

    monkeypatch.setattr(torch_worker, "Computation", Failing)
    with caplog.at_level(logging.WARNING):
        first, failed, last = worker.submit([good.item, bad.item, good.item]).result().outcomes
    for outcome in (first, last):
        assert isinstance(outcome, WorkResult)
        assert result_bytes(outcome) == expected
    assert isinstance(failed, WorkFailure)
    assert failed.kind == kind
    assert "secret" not in failed.message
    (record,) = caplog.records
    if kind == FailureKind.OUT_OF_MEMORY:
        # 101 float32 elements in, twice, and the gradient out; temporaries come on top.
        required = int(failed.message.split("about ")[1].split()[0])
        available = int(failed.message.split("where ")[1].split()[0])
        assert 3 * 404 <= required < 10_000
        assert available > 0
    else:
        assert record.exc_info is not None
        assert record.exc_info[1] is error


@pytest.mark.parametrize(
    "item",
    [
        WorkItem(b"", ()),
        WorkItem(b"\x63" + bytes(600), (b"", b"")),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4,)),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4, b"\x00" * 5)),
    ],
    ids=["no header", "unknown version", "operand missing", "operand too long"],
)
def test_a_garbled_item_fails_alone(worker: DeviceWorker, item: WorkItem) -> None:
    good = job(spec(), [3.0], [0.0])
    failed, outcome = worker.submit([item, good.item]).result().outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.INTERNAL
    assert isinstance(outcome, WorkResult)


def test_memory_that_the_cpu_does_not_have_is_said_with_both_numbers(worker: DeviceWorker) -> None:
    # 2^44 float64 elements once broadcast: as much as the whole address space, so never only promised.
    side = 1 << 22
    huge = job(spec(), np.zeros((side, 1)), np.zeros((1, side)), DataType.FLOAT64)
    (failed,) = worker.submit([huge.item]).result().outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.OUT_OF_MEMORY
    assert int(failed.message.split("about ")[1].split()[0]) > 1 << 47


def test_the_times_add_up_to_the_call(worker: DeviceWorker) -> None:
    result = worker.submit([job(spec(), np.ones(10_000), np.zeros(10_000)).item] * 3).result()
    assert result.pack_ns > 0
    assert result.compute_ns > 0
    assert result.unpack_ns > 0
    assert result.compute_ns > result.unpack_ns


def test_an_empty_batch_is_no_error(worker: DeviceWorker) -> None:
    assert worker.submit([]).result().outcomes == []


def test_a_worker_that_cannot_compute_does_not_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image")

    monkeypatch.setattr(torch_worker, "Computation", fail)
    with pytest.raises(RuntimeError, match="device cpu failed its first computation"):
        TorchWorker(torch.device("cpu")).warm_up()
