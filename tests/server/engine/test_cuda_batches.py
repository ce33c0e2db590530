"""The CUDA worker's batches: the same bits in any company and piece size, lanes that wait for one another, failures."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.server.engine.cuda_simulation import LateDevice, SimulatedDevice, needs_interpreter  # isort: skip

from lossgrad_server.engine import cuda_batch, cuda_launch
from lossgrad_server.engine.cuda_device import Device, Lane, Marker
from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.cuda_worker import SLOTS, CudaWorker, is_device_lost, is_out_of_memory
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import FailureKind, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, check, job, result_bytes, run, spec

pytestmark = needs_interpreter

KIB = 1024


def make_worker(
    device: Device | None = None, *, slot_kib: int = 256, alone_kib: int = 16, piece_kib: int = 4
) -> CudaWorker:
    """Return a worker with little memory, so that small jobs are split and cut as large ones are. Not warmed up."""
    worker = CudaWorker(
        device or SimulatedDevice(), slot_bytes=slot_kib * KIB, alone_bytes=alone_kib * KIB, piece_bytes=piece_kib * KIB
    )
    worker.allocate()
    return worker


def jobs_of_every_path() -> list[Job]:
    """Return small jobs of every kind of launch, NaN and infinity among their data."""
    random = np.random.default_rng(50)
    jobs: list[Job] = []
    kinds, reductions = list(LossKind), list(Reduction)
    for index, shape in enumerate([(1,), (17, 3), (1025,), (0, 2), (40, 9), (2, 1030), (3, 1, 2), (64,)]):
        x, y = random.normal(size=shape), random.normal(size=shape)
        if x.size and index % 3 == 0:
            x.flat[0], y.flat[-1] = np.nan, np.inf
        specs = [
            spec(kinds[(index + at) % 4], 0.3 + index, reductions[(index + at) % 5]) for at in range(1 + index % 3)
        ]
        weight = random.uniform(0, 2, size=shape) if index % 2 else None
        mask = random.random(shape) < 0.8 if index % 4 > 1 else None
        jobs.append(job(specs, x, y, FLOATS[index % 4], weight=weight, mask=mask))
    jobs.append(job(spec(reduction=Reduction.SUM), random.normal(size=(9, 1)), random.normal(size=(1, 11))))
    jobs.append(job(spec(), random.normal(size=7), np.arange(7), DataType.FLOAT16, target_type=DataType.INT32))
    return jobs


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return jobs_of_every_path()


@pytest.fixture(scope="module")
def alone(jobs: list[Job]) -> list[tuple[bytes, ...]]:
    worker = make_worker(alone_kib=128)
    return [result_bytes(run(worker, one)) for one in jobs]


def outcome_bytes(outcome: WorkResult | WorkFailure) -> tuple[bytes, ...]:
    assert isinstance(outcome, WorkResult), outcome
    return result_bytes(outcome)


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_no_bits(jobs: list[Job], alone: list[tuple[bytes, ...]], seed: int) -> None:
    random = np.random.default_rng(60 + seed)
    # With 32 KiB a slot, a batch becomes several launches.
    worker = make_worker(slot_kib=int(random.choice([32, 256])), alone_kib=int(random.choice([2, 16])), piece_kib=1)
    chosen = random.integers(0, len(jobs), size=15)
    garbled = WorkItem(b"", ())
    items = [jobs[index].item for index in chosen]
    items.insert(7, garbled)
    outcomes = worker.run(items).outcomes
    assert isinstance(outcomes.pop(7), WorkFailure)
    assert [outcome_bytes(outcome) for outcome in outcomes] == [alone[index] for index in chosen]


def test_a_thousand_requests_are_one_launch_of_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, int]] = []

    def note(arena: Tensor, layout: Layout) -> None:
        launches.extend((launch.kernel.stage.name, launch.tile_count) for launch in layout.launches)

    monkeypatch.setattr(cuda_batch, "compute", note)
    one = np.zeros(10_000)
    items = [job(spec(), one[:count], one[:count]).item for count in range(10, 10_010, 10)]
    make_worker(slot_kib=96 * KIB, alone_kib=KIB).run(items)
    chunks = sum(-(-count // 4096) for count in range(10, 10_010, 10))
    assert launches == [("LOSSES", chunks), ("LOSS_FOLDS", 1000)]


@pytest.mark.parametrize("piece_kib", [1, 3, 64])
def test_the_piece_size_changes_no_bits(jobs: list[Job], alone: list[tuple[bytes, ...]], piece_kib: int) -> None:
    device = LateDevice()
    worker = make_worker(device, slot_kib=64, alone_kib=0, piece_kib=piece_kib)
    for one, expected in zip(jobs, alone, strict=True):
        assert result_bytes(run(worker, one)) == expected
    assert device.waiting_count == 0


def test_lanes_wait_for_one_another(jobs: list[Job], alone: list[tuple[bytes, ...]]) -> None:
    # Nothing runs here before it must: staging memory used again too early, or read too early, holds the wrong bytes.
    worker = make_worker(LateDevice(), slot_kib=64, piece_kib=1)
    pendings = [worker.submit([one.item for one in jobs[start : start + 3]]) for start in range(0, len(jobs), 3)]
    assert not pendings[-1].is_done()
    for start, pending in reversed(list(enumerate(pendings))):
        outcomes = pending.result().outcomes
        assert [outcome_bytes(outcome) for outcome in outcomes] == alone[3 * start : 3 * start + 3]
        assert pending.is_done()


def test_slots_are_used_again_when_their_batch_is_done() -> None:
    worker = make_worker(LateDevice())
    values = np.arange(1.0, 8 * SLOTS + 1)
    pendings = [worker.submit([job(spec(LossKind.L1), [value], [0.0]).item]) for value in values]
    # Only as many wait as there are slots; those before have been brought home.
    assert [pending.is_done() for pending in pendings] == [True] * 7 * SLOTS + [False] * SLOTS
    for value, pending in zip(values, pendings, strict=True):
        (outcome,) = pending.result().outcomes
        assert outcome_bytes(outcome)[0][:8] == np.float64(value).tobytes()


def test_a_small_request_waits_for_one_piece_of_a_large_one() -> None:
    device = LateDevice()
    worker = make_worker(device)
    random = np.random.default_rng(51)
    large = job([spec(), spec(LossKind.MSE)], random.normal(size=20_000), random.normal(size=20_000))
    small = job(spec(), [3.0], [0.0])
    pending = worker.submit([large.item])
    uploaded: list[int] = []
    advances = 0
    while pending.advance():
        advances += 1
        if advances % 5 == 0:
            check(worker, small)
            uploaded.append(device.waiting_count)
            assert not pending.is_done()
    # 160 KB in and 160 KB out, in pieces of 4 KiB.
    assert advances >= 320_000 // 4096
    assert len(uploaded) >= 15
    (outcome,) = pending.result().outcomes
    assert outcome_bytes(outcome) == result_bytes(run(make_worker(slot_kib=KIB, alone_kib=KIB), large))


def test_large_and_small_requests_in_one_batch_are_all_answered(
    jobs: list[Job], alone: list[tuple[bytes, ...]]
) -> None:
    worker = make_worker(LateDevice(), slot_kib=64, alone_kib=4, piece_kib=2)
    outcomes = worker.run([one.item for one in jobs + jobs]).outcomes
    assert [outcome_bytes(outcome) for outcome in outcomes] == alone + alone


@pytest.mark.parametrize("alone_kib", [0, 64])
def test_operands_may_lie_anywhere_and_are_not_written_to(alone_kib: int) -> None:
    random = np.random.default_rng(52)
    one = job(
        [spec(), spec(LossKind.L1, reduction=Reduction.NONE)],
        random.normal(size=300),
        random.normal(size=300),
        DataType.FLOAT64,
        weight=random.uniform(size=300),
        mask=random.random(300) < 0.5,
    )
    worker = make_worker(alone_kib=alone_kib)
    expected = result_bytes(run(worker, one))
    for offset in (1, 2, 5):
        received = [b"\x5a" * offset + operand + b"\xa5" * 3 for operand in one.operands]
        views = tuple(memoryview(data)[offset:-3] for data in received)
        (outcome,) = worker.run([WorkItem(one.plan.header, views)]).outcomes
        assert outcome_bytes(outcome) == expected
        assert received == [b"\x5a" * offset + operand + b"\xa5" * 3 for operand in one.operands]


@pytest.mark.parametrize("alone_kib", [0, 64])
def test_a_result_outlives_its_slot(alone_kib: int) -> None:
    worker = make_worker(alone_kib=alone_kib)
    values = np.arange(300.0)
    result = run(worker, job(spec(LossKind.L1, reduction=Reduction.NONE), values, -values, DataType.FLOAT64))
    for _ in range(2 * SLOTS):
        run(worker, job(spec(reduction=Reduction.NONE), np.ones(300), np.zeros(300), DataType.FLOAT64))
    np.testing.assert_array_equal(np.frombuffer(result.outputs[0], np.float64), 2 * values)
    assert memoryview(result.outputs[0]).readonly


def test_an_empty_batch_is_no_error() -> None:
    worker = make_worker()
    assert worker.run([]).outcomes == []
    assert worker.submit([]).is_done()


def test_an_operand_without_elements_may_come_with_large_ones() -> None:
    worker = make_worker(alone_kib=1)
    check(worker, job(spec(reduction=Reduction.SUM), np.zeros((0, 5000)), np.ones((1, 5000))))


def test_the_times_add_up_to_the_call() -> None:
    result = make_worker().run([job(spec(), np.ones(1000), np.zeros(1000)).item] * 3)
    assert result.pack_ns > 0
    assert result.unpack_ns > 0
    assert result.compute_ns > result.unpack_ns


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
def test_a_garbled_item_fails_alone(item: WorkItem) -> None:
    failed, outcome = make_worker().run([item, job(spec(), [3.0], [0.0]).item]).outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.INTERNAL
    assert isinstance(outcome, WorkResult)


# --- faults ---

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
        outcomes = worker.run(items).outcomes
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
    check(worker, job(spec(LossKind.L1), np.ones(30_000), np.zeros(30_000)))
    assert device.released_count == 1


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


def test_closing_waits_for_what_is_under_way_and_gives_memory_back(jobs: list[Job]) -> None:
    device = LateDevice()
    worker = make_worker(device, alone_kib=64)
    pending = worker.submit([one.item for one in jobs[:4]])
    worker.close()
    assert device.waiting_count == 0
    assert device.released_count == 1
    assert all(isinstance(outcome, WorkResult) for outcome in pending.result().outcomes)


def test_pieces_must_fit_the_staging_memory() -> None:
    with pytest.raises(ValueError, match="piece_bytes is 2048; it must be at most slot_bytes, 1024"):
        CudaWorker(SimulatedDevice(), slot_bytes=1024, piece_bytes=2048)
