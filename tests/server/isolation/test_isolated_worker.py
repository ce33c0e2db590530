"""The worker in a process of its own gives what the thread's gives, to the bit, whatever it is asked."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import pytest

from lossgrad_server.engine.cpu_worker import PIECE_WORK, CpuWorker
from lossgrad_server.isolation import link as links
from lossgrad_server.isolation.worker import IsolatedWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker, FailureKind, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, check, job, result_bytes, spec, with_totals


def outcomes(worker: DeviceWorker, jobs: list[Job]) -> list[tuple[bytes, ...]]:
    results = worker.submit([one.item for one in jobs]).result().outcomes
    assert all(isinstance(result, WorkResult) for result in results), results
    return [result_bytes(result) for result in results if isinstance(result, WorkResult)]


def assert_same_bits(isolated: IsolatedWorker, thread_worker: CpuWorker, jobs: list[Job]) -> None:
    expected = outcomes(thread_worker, jobs)
    assert outcomes(isolated, jobs) == expected  # together
    assert [outcomes(isolated, [one])[0] for one in jobs] == expected  # and one by one


def random_jobs(data_type: DataType, shape: tuple[int, ...], **options: Any) -> list[Job]:
    random = np.random.default_rng(5)
    x, y = random.normal(size=(2, *shape))
    reductions = list(Reduction) if shape else [Reduction.NONE, Reduction.MEAN, Reduction.SUM]
    return [
        job(spec(kind, 0.7, reduction, scale=-1.5, gradient=gradient), x, y, data_type, **options)
        for kind, reduction, gradient in product(LossKind, reductions, (True, False))
    ]


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4101)], ids=str)
@pytest.mark.parametrize("extras", ["nothing", "weight", "mask", "both"])
def test_every_loss_reduction_and_type_has_the_bits_of_the_thread_s_worker(
    isolated: IsolatedWorker, thread_worker: CpuWorker, data_type: DataType, shape: tuple[int, ...], extras: str
) -> None:
    random = np.random.default_rng(6)
    options: dict[str, Any] = {}
    if extras in ("weight", "both"):
        options |= {"weight": random.uniform(0.1, 3, size=shape), "weight_type": data_type}
    if extras in ("mask", "both"):
        options["mask"] = random.random(shape) < 0.6
    assert_same_bits(isolated, thread_worker, random_jobs(data_type, shape, **options))


def test_what_is_right_is_what_the_reference_says(isolated: IsolatedWorker) -> None:
    for one in random_jobs(DataType.FLOAT32, (5, 301)):
        check(isolated, one)


@pytest.mark.parametrize(("input", "target"), [((4, 1), (1, 5)), ((5,), (4, 5)), ((), (2, 2)), ((0, 1), (3,))])
@pytest.mark.parametrize("target_type", [DataType.FLOAT32, DataType.FLOAT64, DataType.INT16])
def test_broadcast_and_mixed_types_have_them(
    isolated: IsolatedWorker,
    thread_worker: CpuWorker,
    input: tuple[int, ...],
    target: tuple[int, ...],
    target_type: DataType,
) -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=input), random.integers(-3, 3, size=target)
    specs = [spec(reduction=reduction) for reduction in (Reduction.NONE, Reduction.MEAN, Reduction.SUM)]
    assert_same_bits(isolated, thread_worker, [job(specs, x, y, DataType.BFLOAT16, target_type=target_type)])


def test_totals_have_them_also_where_sums_need_many_partials(
    isolated: IsolatedWorker, thread_worker: CpuWorker
) -> None:
    random = np.random.default_rng(4)
    x = random.normal(size=5 * 4096) * 10.0 ** random.integers(-150, 150, size=5 * 4096)
    y = np.zeros(5 * 4096)
    specs = [spec(kind, reduction=Reduction.SUM) for kind in (LossKind.L1, LossKind.MSE)]
    assert_same_bits(isolated, thread_worker, [with_totals(job(specs, x, y, DataType.FLOAT64))])


def test_a_ragged_batch_has_them(isolated: IsolatedWorker, thread_worker: CpuWorker) -> None:
    random = np.random.default_rng(1)
    jobs = []
    for number in range(300):  # more than one batch of the server's, and plans that repeat
        x, y = random.normal(size=(2, 1 + 37 * (number % 50)))
        kind, reduction = list(LossKind)[number % 4], (Reduction.MEAN, Reduction.SUM, Reduction.NONE)[number % 3]
        jobs.append(job(spec(kind, 0.5, reduction), x, y, FLOATS[number % 4]))
    assert outcomes(isolated, jobs) == outcomes(thread_worker, jobs)


def test_more_plans_than_it_remembers_have_them(
    isolated: IsolatedWorker, thread_worker: CpuWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossgrad_server.isolation.records.MAX_PLANS", 8)
    for first in range(1, 40, 5):
        jobs = [job(spec(), np.ones(count), np.zeros(count)) for count in (first, first + 1, first + 2, 1)]
        assert outcomes(isolated, jobs) == outcomes(thread_worker, jobs)


@pytest.mark.parametrize("count", [PIECE_WORK + 1, 3 * PIECE_WORK + 4097])
def test_a_large_request_has_them_with_small_ones_between_its_pieces(
    isolated: IsolatedWorker, thread_worker: CpuWorker, count: int
) -> None:
    random = np.random.default_rng(2)
    x, y = random.normal(size=(2, count)).astype(np.float32)
    large = with_totals(job(spec(), x, y))
    small = random_jobs(DataType.FLOAT32, (100,))[:4]
    assert isolated.is_large(large.plan)
    assert not isolated.is_large(small[0].plan)
    under_way = isolated.submit([large.item])
    between = [outcomes(isolated, [one])[0] for one in small]
    while under_way.advance():
        pass
    assert under_way.is_done()
    (result,) = under_way.result().outcomes
    assert isinstance(result, WorkResult)
    assert [result_bytes(result)] == outcomes(thread_worker, [large])
    assert between == outcomes(thread_worker, small)


def test_outputs_are_put_where_they_are_wanted(isolated: IsolatedWorker, thread_worker: CpuWorker) -> None:
    jobs = [job(spec(), *np.random.default_rng(count).normal(size=(2, count))) for count in (9, 1000, 70_000)]
    expected = outcomes(thread_worker, jobs)
    memory = [bytearray(one.plan.output_byte_count) for one in jobs]
    items = [WorkItem(one.plan.header, one.operands, (memoryview(own),)) for one, own in zip(jobs, memory, strict=True)]
    results = isolated.submit(items).result().outcomes
    for item, result, own, bits in zip(items, results, memory, expected, strict=True):
        assert isinstance(result, WorkResult)
        assert result.outputs[0] is item.destinations[0]
        assert bytes(own) == bits[2]


def test_an_output_may_be_wanted_where_an_operand_is(isolated: IsolatedWorker, thread_worker: CpuWorker) -> None:
    one = job(spec(), *np.random.default_rng(8).normal(size=(2, 5000)))
    own = bytearray(one.operands[0])
    item = WorkItem(one.plan.header, (memoryview(own), one.operands[1]), (memoryview(own),))
    (result,) = isolated.submit([item]).result().outcomes
    assert isinstance(result, WorkResult)
    assert bytes(own) == outcomes(thread_worker, [one])[0][2]


def test_an_item_that_is_not_as_its_plan_says_fails_alone(isolated: IsolatedWorker, thread_worker: CpuWorker) -> None:
    good = job(spec(), np.ones(5), np.zeros(5))
    bad = [WorkItem(good.plan.header, good.operands[:1]), WorkItem(good.plan.header, (b"1", b"2")), WorkItem(b"?", ())]
    results = isolated.submit([good.item, *bad, good.item]).result().outcomes
    assert [result.kind for result in results if isinstance(result, WorkFailure)] == [FailureKind.INTERNAL] * 3
    assert isinstance(results[0], WorkResult)
    assert isinstance(results[4], WorkResult)
    assert result_bytes(results[0]) == result_bytes(results[4]) == outcomes(thread_worker, [good])[0]


def test_more_batches_than_slots_wait_for_the_oldest(isolated: IsolatedWorker, thread_worker: CpuWorker) -> None:
    jobs = [job(spec(), np.full(count, 2.0), np.zeros(count)) for count in range(1, 3 * isolated.slots + 2)]
    under_way = [isolated.submit([one.item]) for one in jobs]
    results = [one.result().outcomes[0] for one in reversed(under_way)]
    assert all(isinstance(result, WorkResult) for result in results)
    bits = [result_bytes(result) for result in reversed(results) if isinstance(result, WorkResult)]
    assert bits == outcomes(thread_worker, jobs)


def test_the_times_of_a_batch_are_told(isolated: IsolatedWorker) -> None:
    one = job(spec(), np.ones(100_000), np.zeros(100_000))
    begun = time.perf_counter_ns()
    result = isolated.submit([one.item]).result()
    assert min(result.pack_ns, result.compute_ns, result.unpack_ns) > 0
    assert result.pack_ns + result.compute_ns + result.unpack_ns < time.perf_counter_ns() - begun


def test_memory_of_a_large_batch_is_given_back_when_it_is_long_unused(
    isolated: IsolatedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(spec(), np.ones(4 << 20), np.zeros(4 << 20))
    isolated.submit([one.item]).result()
    link = isolated.keeper.link
    assert link is not None
    slot = link._free[-1]  # what was used last
    memory = slot.memory
    assert memory is not None
    assert any(memory.view[: 1 << 20])
    monkeypatch.setattr(links, "IDLE_SECONDS", 0.0)
    link.trim()
    assert not any(memory.view[: 1 << 20])
    check(isolated, job(spec(), np.ones(9), np.zeros(9)))
