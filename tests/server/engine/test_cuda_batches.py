"""The CUDA worker's batches: the same bits in any company and piece size, lanes that wait for one another."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from tests.server.engine.cuda_simulation import LateDevice, SimulatedDevice, needs_interpreter  # isort: skip

from lossgrad_server.engine import cuda_batch
from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.cuda_worker import SLOTS, CudaWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import FailureKind, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import Job, check, job, result_bytes, run, spec
from tests.server.engine.cuda_building import KIB, jobs_of_every_path, make_worker, outcome_bytes

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return jobs_of_every_path()


@pytest.fixture(scope="module")
def alone(jobs: list[Job]) -> list[tuple[bytes, ...]]:
    worker = make_worker(alone_kib=128)
    return [result_bytes(run(worker, one)) for one in jobs]


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
