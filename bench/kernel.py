"""What the engine costs: lossgrad's kernels against torch eager, forward and backward, side by side on one thread.

    python -m bench.kernel [--quick] [--json] [--rounds N]

"kernel" is one call of the kernels, for one request, into memory that is kept, as the copy beside it is made into memory
already touched; "worker" is DeviceWorker.run, all of its Python and a fresh answer included. Every case has its turn in
every round; a turn is a burst of calls, of which the first is left out, so that each case finds the caches as it leaves
them itself. On a machine with CUDA, bench.kernel_cuda adds its sections. The bars are issue 3's.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.measuring import Bar, bars_table, interleave, machine, number, paired_ratio, progress, table, to_json
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server.engine.cpu_kernel import load_kernel
from lossgrad_server.engine.cpu_layout import program_of
from lossgrad_server.engine.cpu_memory import Arena
from lossgrad_server.engine.cpu_worker import CpuWorker, determinism
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import WorkItem

# How many times torch eager's speed, and how many times the time of a copy of as many bytes.
SPEEDUPS: Final = {1_000: 20.0, 10_000: 10.0, 100_000: 6.0, 1_000_000: 4.0, 10_000_000: 4.0}
COPY_ELEMENTS: Final = 10_000_000
COPY_RATIO: Final = 1.5
BYTES_PER_ELEMENT: Final = 12  # input and target in, gradient out

_TORCH_TYPES: Final = {
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.FLOAT64: torch.float64,
}
_TORCH_LOSSES: Final[dict[LossKind, Callable[..., Tensor]]] = {
    LossKind.SMOOTH_L1: functional.smooth_l1_loss,
    LossKind.HUBER: functional.huber_loss,
    LossKind.L1: functional.l1_loss,
    LossKind.MSE: functional.mse_loss,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to measure."""

    rounds: int
    burst_seconds: float
    sizes: tuple[int, ...]
    variant_elements: int
    ragged_requests: int


FULL: Final = Settings(15, 0.02, tuple(SPEEDUPS), 1_000_000, 1000)
QUICK: Final = Settings(3, 0.003, (1_000, 100_000), 100_000, 100)


@dataclass(slots=True)
class Report:
    """What was measured."""

    machine: dict[str, Any]
    engine: str
    sizes: list[dict[str, float]] = field(default_factory=list)
    variants: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """The same work for both: tensors for torch, and an item whose operands are those tensors' memory."""

    input: Tensor
    target: Tensor
    item: WorkItem
    specs: tuple[SpecPlan, ...]

    def eager(self) -> None:
        """Compute every spec with torch, as a training step does: forward, then backward into a fresh gradient."""
        for spec in self.specs:
            self.input.grad = None
            arguments: dict[str, Any] = {}
            if spec.kind == LossKind.SMOOTH_L1:
                arguments["beta"] = spec.parameter
            elif spec.kind == LossKind.HUBER:
                arguments["delta"] = spec.parameter
            reduction = {Reduction.NONE: "none", Reduction.SUM: "sum"}.get(spec.reduction, "mean")
            if spec.include_gradient:
                loss = _TORCH_LOSSES[spec.kind](self.input, self.target, reduction=reduction, **arguments)
                loss.backward(torch.ones_like(loss) if spec.reduction == Reduction.NONE else None)  # type: ignore[no-untyped-call]
            else:
                with torch.no_grad():
                    _TORCH_LOSSES[spec.kind](self.input, self.target, reduction=reduction, **arguments)


def make_case(elements: int, specs: Sequence[SpecPlan], data_type: DataType = DataType.FLOAT32, seed: int = 0) -> Case:
    """Return a case of normally distributed values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(elements, generator=generator).to(_TORCH_TYPES[data_type]) for _ in range(2)]
    plan = TensorPlan(data_type, (elements,))
    operands = tuple(memoryview(tensor.view(torch.uint8).numpy().data) for tensor in tensors)
    item = WorkItem(JobPlan(tuple(specs), plan, plan).header, operands)
    return Case(tensors[0].clone().requires_grad_(), tensors[1].clone(), item, tuple(specs))


def spec(
    kind: LossKind = LossKind.SMOOTH_L1, reduction: Reduction = Reduction.MEAN, *, gradient: bool = True
) -> SpecPlan:
    """Return a spec with torch's default parameter."""
    return SpecPlan(kind, 1.0 if kind in (LossKind.SMOOTH_L1, LossKind.HUBER) else 0.0, reduction, gradient)


class Bench:
    """Measures, and collects what it finds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.worker = CpuWorker()
        self.worker.warm_up()
        self.arena = Arena(load_kernel(), 1)
        self.report = Report(machine() | {"torch": str(torch.__version__)}, determinism())

    def run(self) -> Report:
        """Measure everything."""
        for elements in self.settings.sizes:
            progress(f"{elements:,} elements")
            self._size(elements)
        progress("variants")
        self._variants()
        progress("batches")
        self._ragged()
        self._small()
        self._threads()
        return self.report

    def burst(self, call: Callable[[], object]) -> Callable[[], float]:
        """Return a function that calls for a while and returns the median seconds of a call, the first left out."""

        def measure() -> float:
            call()
            times: list[float] = []
            end = time.perf_counter() + self.settings.burst_seconds
            while not times or (time.perf_counter() < end and len(times) < 2000):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            return statistics.median(times)

        return measure

    def measure(self, cases: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return each case's seconds a call, round by round."""
        for call in cases.values():
            call()
        return interleave({name: self.burst(call) for name, call in cases.items()}, self.settings.rounds)

    def kernel(self, case: Case) -> Callable[[], object]:
        """Return a call that computes a case into memory that is kept."""
        program = program_of(case.item.header)
        memory = memoryview(bytearray(program.output_bytes))
        buffers = [*case.item.operands, memory]
        return lambda: self.arena.compute([program], buffers, holding_gil=False)

    def _size(self, elements: int) -> None:
        case = make_case(elements, [spec()])
        source, sink = (np.ones(elements * BYTES_PER_ELEMENT // 2, np.uint8) for _ in range(2))
        seconds = self.measure(
            {
                "torch": case.eager,
                "kernel": self.kernel(case),
                "worker": lambda: self.worker.run([case.item]),
                "copy": lambda: np.copyto(sink, source),
            }
        )
        row = {"elements": float(elements)}
        row |= {f"{name}_us": statistics.median(times) * 1e6 for name, times in seconds.items()}
        row["kernel_speedup"] = paired_ratio(seconds["torch"], seconds["kernel"])
        row["worker_speedup"] = paired_ratio(seconds["torch"], seconds["worker"])
        row["kernel_over_copy"] = paired_ratio(seconds["kernel"], seconds["copy"])
        self.report.sizes.append(row)
        if elements in SPEEDUPS:
            name = f"float32 mean with gradient, {elements:,} elements, over torch eager"
            self.report.bars.append(Bar(name, row["kernel_speedup"], SPEEDUPS[elements], unit="x"))
        if elements == COPY_ELEMENTS:
            name = f"the same, {elements:,} elements, over a copy of as many bytes"
            self.report.bars.append(Bar(name, row["kernel_over_copy"], COPY_RATIO, is_least=False, unit="x"))

    def _variants(self) -> None:
        elements = self.settings.variant_elements
        four = [spec(kind) for kind in LossKind]
        one = make_case(elements, [spec()])
        variants = {
            "float32 mean": one,
            "no gradient": make_case(elements, [spec(gradient=False)]),
            "none": make_case(elements, [spec(reduction=Reduction.NONE)]),
            "none, no gradient": make_case(elements, [spec(reduction=Reduction.NONE, gradient=False)]),
            "huber": make_case(elements, [spec(LossKind.HUBER)]),
            "l1": make_case(elements, [spec(LossKind.L1)]),
            "mse": make_case(elements, [spec(LossKind.MSE)]),
            "four losses": make_case(elements, four),
            "four losses, no gradient": make_case(elements, [spec(kind, gradient=False) for kind in LossKind]),
            "float16": make_case(elements, [spec()], DataType.FLOAT16),
            "bfloat16": make_case(elements, [spec()], DataType.BFLOAT16),
            "float64": make_case(elements, [spec()], DataType.FLOAT64),
        }
        base: list[float] | None = None
        for name, case in variants.items():
            seconds = self.measure({"torch": case.eager, "kernel": self.kernel(case), "one": self.kernel(one)})
            base = base or seconds["kernel"]
            self.report.variants.append(
                {
                    "variant": name,
                    "elements": elements,
                    "torch_us": statistics.median(seconds["torch"]) * 1e6,
                    "kernel_us": statistics.median(seconds["kernel"]) * 1e6,
                    "speedup": paired_ratio(seconds["torch"], seconds["kernel"]),
                    "over_one_float32_mean": paired_ratio(seconds["kernel"], seconds["one"]),
                }
            )
        by_name = {variant["variant"]: variant["over_one_float32_mean"] for variant in self.report.variants}
        note = "of one with its gradient"
        self.report.bars.append(
            Bar("four losses, no gradient", by_name["four losses, no gradient"], 2.0, False, "x", note)
        )
        self.report.bars.append(Bar("four losses, four gradients", by_name["four losses"], 2.0, False, "x", note))

    def _ragged(self) -> None:
        random = np.random.default_rng(0)
        count = self.settings.ragged_requests
        cases = [
            make_case(int(elements), [spec()], seed=index)
            for index, elements in enumerate(random.integers(1, 10_001, count))
        ]
        items = [case.item for case in cases]

        def eager() -> None:
            for case in cases:
                case.eager()

        self._batch(f"{count:,} requests of 1 to 10,000 elements", count, eager, items)

    def _small(self) -> None:
        cases = [make_case(256, [spec()], seed=index) for index in range(64)]

        def eager() -> None:
            for case in cases:
                case.eager()

        self._batch("64 requests of 256 elements", 64, eager, [case.item for case in cases])
        per_request = self.report.batches[-1]["worker_us_per_request"]
        self.report.bars.append(Bar("64 requests of 256 elements, each in the worker", per_request, 3.0, False, " us"))

    def _batch(self, name: str, count: int, eager: Callable[[], None], items: list[WorkItem]) -> None:
        seconds = self.measure({"torch": eager, "worker": lambda: self.worker.run(items)})
        self.report.batches.append(
            {
                "batch": name,
                "torch_us_per_request": statistics.median(seconds["torch"]) * 1e6 / count,
                "worker_us_per_request": statistics.median(seconds["worker"]) * 1e6 / count,
                "speedup": paired_ratio(seconds["torch"], seconds["worker"]),
            }
        )

    def _threads(self) -> None:
        elements = max(self.settings.sizes)
        case = make_case(elements, [spec()])
        two = CpuWorker(2)
        two.warm_up()
        seconds = self.measure({"one": lambda: self.worker.run([case.item]), "two": lambda: two.run([case.item])})
        self.report.batches.append(
            {
                "batch": f"one request of {elements:,} elements, one thread and two",
                "torch_us_per_request": statistics.median(seconds["one"]) * 1e6,
                "worker_us_per_request": statistics.median(seconds["two"]) * 1e6,
                "speedup": paired_ratio(seconds["one"], seconds["two"]),
            }
        )
        two.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0 however the bars came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rough picture in seconds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--rounds", type=int, help="how often everything takes its turn")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    if options.rounds:
        settings = Settings(options.rounds, *(getattr(settings, name) for name in Settings.__slots__[1:]))
    torch.set_num_threads(1)
    keep_large_blocks()  # as the server does; torch gains from it too
    gc.collect()
    gc.disable()
    report = Bench(settings).run()
    if torch.cuda.is_available() and importlib.util.find_spec("bench.kernel_cuda"):
        importlib.import_module("bench.kernel_cuda").measure(report, settings)
    print(to_json(report) if options.json else _text(report))
    return 0


def _text(report: Report) -> str:
    sizes = table(
        ("elements", "torch us", "kernel us", "worker us", "copy us", "kernel x", "worker x", "kernel/copy"),
        [[f"{int(row['elements']):,}", *(number(value) for value in list(row.values())[1:])] for row in report.sizes],
    )
    variants = table(
        ("one thread", "elements", "torch us", "kernel us", "speed-up", "time of one float32 mean"),
        [[row["variant"], f"{row['elements']:,}", *map(number, list(row.values())[2:])] for row in report.variants],
    )
    batches = table(
        ("worker.run", "torch us each", "worker us each", "speed-up"),
        [[row["batch"], *map(number, list(row.values())[1:])] for row in report.batches],
    )
    return "\n\n".join([f"{report.machine}\n{report.engine}", sizes, variants, batches, bars_table(report.bars)])


if __name__ == "__main__":
    sys.exit(main())
