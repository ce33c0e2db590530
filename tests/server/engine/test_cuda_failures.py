"""What fails in the CUDA worker: alone where it can, with the device where it must."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.server.engine.cuda_simulation import LateDevice, SimulatedDevice, needs_interpreter  # isort: skip

from lossgrad_server.engine import cuda_batch, cuda_launch
from lossgrad_server.engine.cuda_device import Lane, Marker
from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.cuda_worker import CudaWorker, is_device_lost, is_out_of_memory
from lossgrad_server.jobs import DataType, LossKind
from lossgrad_server.work import FailureKind, Retry, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import Job, check, job, result_bytes, run, spec
from tests.server.engine.cuda_building import KIB, make_worker, outcome_bytes

pytestmark = needs_interpreter

BAD_COUNT = 101


@pytest.fixture
def _bad_jobs_fail(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every launch fail, after it computed, that holds a job of BAD_COUNT elements."""

    def compute(arena: Tensor, layout: Layout) -> None:
        cuda_launch.compute(arena, layout)
        if any(template.plan.element_count == BAD_COUNT for template in layout.templates):
            raise request.param

    monkeypatch.setattr(cuda_batch, "compute", compute)


def good_and_bad(position: int) -> tuple[Job, list[WorkItem]]:
    good = job(spec(), np.ones(100), np.zeros(100))
    bad = job(spec(), np.ones(BAD_COUNT), np.zeros(BAD_COUNT))
    items = [good.item] * 6
    items.insert(position, bad.item)
    return good, items


@pytest.mark.parametrize("alone_kib", [0, 16])
@pytest.mark.parametrize("position", [0, 3, 6])
@pytest.mark.parametrize(
    "_bad_jobs_fail",
    [
        torch.OutOfMemoryError("CUDA out of memory: secret"),
        MemoryError("secret"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        ValueError("secret"),
        RuntimeError("secret"),
    ],
    indirect=True,
    ids=repr,
)
@pytest.mark.usefixtures("_bad_jobs_fail")
def test_a_failing_item_fails_alone(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest, position: int, alone_kib: int
) -> None:
    error = request.node.callspec.params["_bad_jobs_fail"]
    good, items = good_and_bad(position)
    expected = result_bytes(run(make_worker(), good))
    device = SimulatedDevice()
    worker = make_worker(device, alone_kib=alone_kib)
    with caplog.at_level(logging.WARNING):
        result = worker.run(items)
    outcomes = result.outcomes
    assert set(result.retries) <= {Retry.OUT_OF_MEMORY if is_out_of_memory(error) else Retry.ERROR}
    assert result.retries or alone_kib == 0  # what comes alone fails at once, or is tried again
    failed = outcomes.pop(position)
    assert [outcome_bytes(outcome) for outcome in outcomes] == [expected] * 6
    assert isinstance(failed, WorkFailure)
    assert "secret" not in failed.message
    assert not worker.is_lost
    if is_out_of_memory(error):
        assert failed.kind == FailureKind.OUT_OF_MEMORY
        # 101 float32 elements in, twice, and the gradient out.
        required = int(failed.message.split("about ")[1].split()[0])
        assert 3 * 404 <= required < 10_000
        assert "where 12345 are available" in failed.message
        # Memory was given back, and the request alone tried again, before it was given up.
        assert device.released_count >= 2
    else:
        assert failed.kind == FailureKind.INTERNAL
        assert caplog.records[-1].exc_info is not None
        assert caplog.records[-1].exc_info[1] is error


def test_a_request_that_fits_once_memory_is_given_back_is_computed() -> None:
    class Hoarding(SimulatedDevice):
        limit = 200 * KIB

        def empty(self, byte_count: int) -> Tensor:
            if self.released_count == 0 and byte_count > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().empty(byte_count)

    device = Hoarding()
    worker = make_worker(device, slot_kib=64)
    one = job(spec(LossKind.L1), np.ones(30_000), np.zeros(30_000))
    assert worker.run([one.item]).retries == (Retry.OUT_OF_MEMORY,)
    assert device.released_count == 1
    check(worker, one)


def test_a_request_larger_than_the_device_fails_alone_with_both_numbers() -> None:
    class Full(SimulatedDevice):
        def empty(self, byte_count: int) -> Tensor:
            if byte_count > 1 << 30:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().empty(byte_count)

    worker = make_worker(Full())
    good = job(spec(), [3.0], [0.0])
    for log_side in (22, 31):  # 2^44 elements once broadcast, and more than any device's memory has bytes
        side = 1 << log_side
        plan = job(spec(), np.zeros((1, 1)), np.zeros((1, 1))).plan
        plan = type(plan)(
            plan.specs, type(plan.input)(DataType.FLOAT64, (side, 1)), type(plan.input)(DataType.FLOAT64, (1, side))
        )
        operands: tuple[Any, ...] = tuple(_Long(8 * side) for _ in range(2))
        failed, outcome = worker.run([WorkItem(plan.header, operands), good.item]).outcomes
        assert isinstance(failed, WorkFailure)
        assert failed.kind == FailureKind.OUT_OF_MEMORY
        assert int(failed.message.split("about ")[1].split()[0]) > 1 << 47
        assert isinstance(outcome, WorkResult)


class _Long:
    """Stands for a buffer that this machine has no memory for; it may only be asked for its length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


@pytest.mark.parametrize(
    "_bad_jobs_fail",
    [torch.AcceleratorError("CUDA error: secret"), RuntimeError("Triton Error [CUDA]: secret")],
    indirect=True,
    ids=repr,
)
@pytest.mark.usefixtures("_bad_jobs_fail")
def test_a_lost_device_fails_all_that_it_held_and_all_that_comes(caplog: pytest.LogCaptureFixture) -> None:
    device = LateDevice()
    worker = make_worker(device)
    done = worker.submit([job(spec(), [3.0], [0.0]).item])
    assert isinstance(done.result().outcomes[0], WorkResult)
    before = worker.submit([job(spec(), [3.0], [0.0]).item])
    large = worker.submit([job(spec(), np.ones(9000), np.zeros(9000)).item])
    assert large.advance()
    bad = worker.submit(good_and_bad(3)[1])
    was_lost = worker.is_lost
    with caplog.at_level(logging.CRITICAL):
        outcomes = bad.result().outcomes
    after = worker.submit(good_and_bad(0)[1])
    assert (was_lost, worker.is_lost) == (False, True)
    for pending in (before, large, after):
        assert pending.is_done()
        outcomes += pending.result().outcomes
    assert len(outcomes) == 7 + 1 + 1 + 7
    for outcome in outcomes:
        assert isinstance(outcome, WorkFailure)
        assert outcome.kind == FailureKind.DEVICE_LOST
        assert "secret" not in outcome.message
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    worker.close()
    assert device.released_count == 0


@pytest.mark.parametrize("method", ["record", "empty", "available_bytes", "query"])
def test_a_device_is_lost_wherever_it_fails(method: str, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(LateDevice):
        has_failed = False

        def _guard(self, name: str) -> bool:
            if self.has_failed and name == method:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            return True

        def empty(self, byte_count: int) -> Tensor:
            self._guard("empty")
            if self.has_failed and method == "available_bytes":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().empty(byte_count)

        def available_bytes(self) -> int:
            self._guard("available_bytes")
            return super().available_bytes()

        def record(self, lane: Lane) -> Marker:
            self._guard("record")
            marker = super().record(lane)
            if method == "query":
                marker.query = lambda: self._guard("query")  # type: ignore[method-assign]
            return marker

    device = Failing()
    worker = make_worker(device)
    pending = worker.submit([job(spec(), [3.0], [0.0]).item])
    device.has_failed = True
    if method == "query":
        assert pending.is_done()
        outcomes = pending.result().outcomes
    else:
        outcomes = worker.run([job(spec(), np.ones(9000), np.zeros(9000)).item]).outcomes
    assert worker.is_lost
    assert [outcome.kind for outcome in outcomes if isinstance(outcome, WorkFailure)] == [FailureKind.DEVICE_LOST]


@pytest.mark.parametrize(
    ("error", "is_memory", "is_lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (RuntimeError("shape mismatch"), False, False),
        (ValueError("out of memory"), False, False),
    ],
    ids=repr,
)
def test_what_errors_mean(error: Exception, is_memory: bool, is_lost: bool) -> None:
    assert is_out_of_memory(error) == is_memory
    assert is_device_lost(error) == is_lost


def test_a_worker_that_cannot_compute_does_not_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image")

    monkeypatch.setattr(cuda_batch, "compute", fail)
    with pytest.raises(RuntimeError, match="device cuda:7 failed its first computation"):
        CudaWorker(SimulatedDevice(), slot_bytes=64 * KIB, piece_bytes=KIB).warm_up()
