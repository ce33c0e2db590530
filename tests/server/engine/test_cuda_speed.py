"""How fast the CUDA kernels and worker are on a GPU, beside torch in the same run. Prints what it measures: pytest -s."""

# ruff: noqa: T201  # what it prints is what it is for

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.server.engine.cuda_simulation import needs_gpu  # isort: skip

from lossgrad_server.engine import cuda_launch
from lossgrad_server.engine.cuda_builder import template_of
from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.cuda_template import Region
from lossgrad_server.engine.cuda_worker import SLOTS, CudaWorker
from lossgrad_server.engine.tensors import TORCH_TYPES
from lossgrad_server.jobs import DataType, JobPlan, LossKind, SpecPlan, TensorPlan
from lossgrad_server.work import WorkItem, WorkResult
from tests.server.engine.building import spec

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(500), needs_gpu]
KIB, MIB = 1024, 1024 * 1024


def plan_of(count: int, data_type: DataType = DataType.FLOAT32, specs: tuple[SpecPlan, ...] = (spec(),)) -> JobPlan:
    tensor = TensorPlan(data_type, (count,))
    return JobPlan(specs, tensor, tensor)


def on_device(plans: list[JobPlan]) -> Callable[[], None]:
    """Return what launches the kernels for those jobs, over random operands that are on the device already."""
    layout = Layout([template_of(plan.header) for plan in plans])
    arena = torch.empty(layout.byte_count, dtype=torch.uint8, device="cuda")
    tables = np.empty(layout.tables.byte_count, np.uint8)
    layout.fill(tables)
    arena[layout.tables.start : layout.tables.stop] = torch.from_numpy(tables).cuda()
    for job, template in enumerate(layout.templates):
        for operand, place in zip(template.plan.operands, template.operands, strict=True):
            start = int(layout.starts[job, Region.INPUT]) + place.offset
            view = arena[start : start + operand.byte_count].view(TORCH_TYPES[operand.data_type])
            view.copy_(torch.randn(operand.element_count, device="cuda"))
    return lambda: cuda_launch.compute(arena, layout)


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call on the device, by events; each after the cache was filled with other things."""
    other = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for index in range(repeats + 5):
        other.fill_(index)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[5:])


def host_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the median time of a call that waits for the device itself."""
    times: list[float] = []
    for _ in range(repeats + 3):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return statistics.median(times[3:])


def eager(x: Tensor, y: Tensor) -> None:
    x.grad = None
    torch.nn.functional.smooth_l1_loss(x, y).backward()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def copy_bytes_per_second() -> float:
    source = torch.randn(300_000_000, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"\n{torch.cuda.get_device_name()}: copies {rate / 1e12:.2f} TB/s, read and written")
    return rate


def test_a_hundred_million_elements_come_near_the_copy_bandwidth(
    copy_bytes_per_second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 100_000_000
    reached: dict[int, float] = {}
    chosen = cuda_launch._WARPS
    work = on_device([plan_of(count)])
    for warps in (2, 4, 8, 16):
        monkeypatch.setattr(cuda_launch, "_WARPS", warps)
        reached[warps] = 12 * count / seconds(work) / copy_bytes_per_second
        print(f"float32, {warps} warps: {reached[warps]:.3f} of the copy bandwidth")
    monkeypatch.setattr(cuda_launch, "_WARPS", chosen)
    x, y = torch.randn(2, count, device="cuda").unbind()
    faster = seconds(lambda: eager(x.requires_grad_(), y)) / seconds(work)
    print(f"{faster:.2f} times as fast as torch eager, forward and backward")
    assert reached[chosen] >= 0.85
    assert faster >= 2.2


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT64])
def test_other_types(copy_bytes_per_second: float, data_type: DataType) -> None:
    count = 100_000_000
    reached = 3 * data_type.itemsize * count / seconds(on_device([plan_of(count, data_type)])) / copy_bytes_per_second
    print(f"{data_type.name}: {reached:.3f} of the copy bandwidth")
    assert reached > 0.3


def test_four_specs_cost_less_than_twice_one() -> None:
    count = 50_000_000
    kinds = (LossKind.SMOOTH_L1, LossKind.HUBER, LossKind.L1, LossKind.MSE)
    # One gradient, four losses.
    four = tuple(spec(kind, gradient=kind == LossKind.SMOOTH_L1) for kind in kinds)
    ratio = seconds(on_device([plan_of(count, specs=four)])) / seconds(on_device([plan_of(count)]))
    print(f"four specs: {ratio:.2f} times one")
    assert ratio < 2


def test_a_thousand_ragged_requests_are_fifty_times_as_fast_as_torch() -> None:
    counts = np.random.default_rng(90).integers(1, 10_001, 1000).tolist()
    pairs = [torch.randn(2, count, device="cuda").unbind() for count in counts]
    tensors = [(x.requires_grad_(), y) for x, y in pairs]

    def torch_calls() -> None:
        for x, y in tensors:
            eager(x, y)
        torch.cuda.synchronize()

    work = on_device([plan_of(count) for count in counts])
    ratio = host_seconds(torch_calls) / seconds(work)
    print(f"1000 ragged requests in one launch: {ratio:.0f} times as fast as 1000 torch calls")
    worker = CudaWorker(torch.device("cuda:0"), slot_bytes=128 * MIB)
    worker.warm_up()
    items = [item_of(plan_of(count)) for count in counts]
    result = worker.run(items)
    whole = host_seconds(lambda: worker.run(items))
    print(
        f"through the worker, from bytes to bytes: {whole * 1e3:.1f} ms (first: pack {result.pack_ns / 1e6:.1f}, "
        f"compute {result.compute_ns / 1e6:.1f}, unpack {result.unpack_ns / 1e6:.1f} ms)"
    )
    assert ratio >= 50


def item_of(plan: JobPlan) -> WorkItem:
    random = np.random.default_rng(91)
    return WorkItem(
        plan.header, tuple(random.standard_normal(one.byte_count // 4, np.float32).tobytes() for one in plan.operands)
    )


def test_successive_batches_overlap() -> None:
    worker = CudaWorker(torch.device("cuda:0"), slot_bytes=64 * MIB, alone_bytes=64 * MIB)
    worker.warm_up()
    items = [item_of(plan_of(64 * KIB))] * 32  # 24 MiB in and out

    def pipelined() -> None:
        pendings = [worker.submit(items) for _ in range(SLOTS)]
        for _ in range(30 - SLOTS):
            pendings.pop(0).result()
            pendings.append(worker.submit(items))
        for pending in pendings:
            pending.result()

    def in_turn() -> None:
        for _ in range(30):
            worker.run(items)

    ratio = host_seconds(in_turn, 3) / host_seconds(pipelined, 3)
    print(f"three batches under way at a time: {ratio:.2f} times as fast as one")
    assert ratio > 1.05


@pytest.mark.parametrize("mib", [1, 2, 4, 8, 16, 32, 64])
def test_where_gathering_stops_to_pay(mib: int) -> None:
    item = item_of(plan_of(mib * MIB // 12))
    for name, options in (
        ("gathered", {"slot_bytes": 256 * MIB, "alone_bytes": 256 * MIB}),
        ("alone, pieces of 1 MiB", {"slot_bytes": 32 * MIB, "alone_bytes": 0, "piece_bytes": MIB}),
        ("alone, pieces of 4 MiB", {"slot_bytes": 32 * MIB, "alone_bytes": 0, "piece_bytes": 4 * MIB}),
    ):
        worker = CudaWorker(torch.device("cuda:0"), **options)
        worker.allocate()
        (outcome,) = worker.run([item]).outcomes
        assert isinstance(outcome, WorkResult)
        print(f"{mib} MiB {name}: {host_seconds(lambda: worker.run([item])) * 1e3:.2f} ms")  # noqa: B023
        worker.close()
