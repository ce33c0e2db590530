"""How exact the engine is: the errors of lossgrad's mean, sum and gradient beside torch's, in ulps of the data type.

    python -m bench.accuracy [--elements N] [--json]

Exact results come from the differences as the data type's rule has them (float16, bfloat16 and float32 are subtracted in
float32, as torch does), and from there on in numpy's longdouble, which has 11 bits more than float64. An error of a loss is
that of the number that the caller gets: torch's in the tensors' data type, ours in float64. The bars are issue 3's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.measuring import Bar, bars_table, machine, progress, table, to_json
from lossgrad_server.engine.cpu_worker import CpuWorker, determinism
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import SPEC_RESULT, WorkFailure, WorkItem

Array = np.ndarray[Any, np.dtype[Any]]

_TORCH_TYPES: Final = {
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.FLOAT64: torch.float64,
}
# Bits of the significand, and the exponent of the smallest number.
_FORMATS: Final = {
    DataType.FLOAT16: (11, -24),
    DataType.BFLOAT16: (8, -133),
    DataType.FLOAT32: (24, -149),
    DataType.FLOAT64: (53, -1074),
}
# By how many ulps a mean or a sum may be off.
MOST_ULPS: Final = {data_type: 2.0 if data_type == DataType.FLOAT64 else 1.0 for data_type in _TORCH_TYPES}
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Data:
    """Values to measure with: made by `make` from a generator and a count, with these smooth L1 parameters."""

    name: str
    make: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    kind: LossKind = LossKind.SMOOTH_L1
    parameter: float = 1.0
    data_types: tuple[DataType, ...] = tuple(_TORCH_TYPES)


def _normal(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, generator=generator).double(), torch.randn(count, generator=generator).double()


def _mixed(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    scale = torch.where(torch.rand(count, generator=generator) < 0.5, 1e-3, 1e4).double()
    x, y = _normal(generator, count)
    return x * scale, y * scale


def _constant(value: float) -> Callable[[torch.Generator, int], tuple[Tensor, Tensor]]:
    return lambda _, count: (torch.full((count,), value).double(), torch.zeros(count).double())


_WIDE: Final = (DataType.FLOAT32, DataType.FLOAT64)
DATA: Final = (
    Data("normal", _normal),
    Data("normal, beta 0.11", _normal, parameter=0.11),
    Data("normal, huber 0.3", _normal, LossKind.HUBER, 0.3),
    Data("normal, l1", _normal, LossKind.L1, 0.0),
    Data("normal, mse", _normal, LossKind.MSE, 0.0, _WIDE),
    Data("1e-3 and 1e4 mixed", _mixed, data_types=_WIDE),
    Data("constant 1.1", _constant(1.1)),
    Data("constant 0.3", _constant(0.3)),
    Data("constant 0.1, mse", _constant(0.1), LossKind.MSE, 0.0),
)
# Where torch overflows or underflows: one difference, beta and the exact loss.
EXTREMES: Final = (
    (DataType.FLOAT32, 1e20, 1e30, 5e9),
    (DataType.FLOAT32, 1e-25, 1e-20, 5e-31),
    (DataType.FLOAT16, 400.0, 1000.0, 80.0),
)


@dataclass(slots=True)
class Report:
    """What was measured: errors in ulps."""

    machine: dict[str, Any]
    engine: str
    elements: int
    errors: list[dict[str, Any]] = field(default_factory=list)
    extremes: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Exact:
    """The exact loss summed, and each element's exact derivative, piece by piece."""

    total: np.longdouble
    derivatives: list[Array]


def exact_losses(x: Tensor, y: Tensor, data: Data) -> Exact:
    """Compute in longdouble, from differences that are rounded as the data type's rule has it."""
    total = np.longdouble(0)
    derivatives: list[Array] = []
    limit = np.longdouble(data.parameter)
    for start in range(0, len(x), _PIECE):
        own, other = x[start : start + _PIECE], y[start : start + _PIECE]
        if x.dtype != torch.float64:
            own, other = own.float(), other.float()
        d = (own - other).numpy().astype(np.longdouble)
        match data.kind:
            case LossKind.SMOOTH_L1:
                derivative = np.clip(d / limit, -1, 1)
                loss = np.where(abs(d) < limit, d * derivative / 2, abs(d) - limit / 2)
            case LossKind.HUBER:
                derivative = np.clip(d, -limit, limit)
                loss = np.where(abs(d) < limit, d * d / 2, limit * (abs(d) - limit / 2))
            case LossKind.L1:
                derivative, loss = np.sign(d), abs(d)
            case _:
                derivative, loss = 2 * d, d * d
        total += loss.sum()
        derivatives.append(derivative)
    return Exact(total, derivatives)


def spacing(values: Any, data_type: DataType) -> Any:
    """Return one ulp of the data type at the values' magnitude."""
    bits, smallest = _FORMATS[data_type]
    magnitudes = np.abs(np.asarray(values, np.longdouble))
    _, exponent = np.frexp(magnitudes)
    return np.ldexp(np.longdouble(1), np.where(magnitudes > 0, np.maximum(exponent - bits, smallest), smallest))


def torch_loss(x: Tensor, y: Tensor, data: Data, reduction: str) -> Tensor:
    """Return torch's loss."""
    match data.kind:
        case LossKind.SMOOTH_L1:
            return functional.smooth_l1_loss(x, y, reduction=reduction, beta=data.parameter)
        case LossKind.HUBER:
            return functional.huber_loss(x, y, reduction=reduction, delta=data.parameter)
        case LossKind.L1:
            return functional.l1_loss(x, y, reduction=reduction)
        case _:
            return functional.mse_loss(x, y, reduction=reduction)


class Bench:
    """Measures, and collects what it finds."""

    def __init__(self, elements: int) -> None:
        self.worker = CpuWorker()
        self.worker.warm_up()
        self.report = Report(machine() | {"torch": str(torch.__version__)}, determinism(), elements)

    def run(self) -> Report:
        """Measure everything."""
        for data_type in _TORCH_TYPES:
            for data in DATA:
                if data_type in data.data_types:
                    progress(f"{data_type.name.lower()}, {data.name}")
                    self._measure(data_type, data)
        for data_type, d, beta, exact in EXTREMES:
            self._extreme(data_type, d, beta, exact)
        return self.report

    def _measure(self, data_type: DataType, data: Data) -> None:
        made = data.make(torch.Generator().manual_seed(1), self.report.elements)
        x, y = (tensor.to(_TORCH_TYPES[data_type]) for tensor in made)
        exact = exact_losses(x, y, data)
        results: dict[str, tuple[dict[Reduction, float], Tensor]] = {
            "torch": self._by_torch(x, y, data),
            "ours": self._by_us(x, y, data, data_type),
        }
        wanted = {Reduction.MEAN: exact.total / self.report.elements, Reduction.SUM: exact.total}
        row: dict[str, Any] = {"data_type": data_type.name.lower(), "data": data.name}
        for reduction, value in wanted.items():
            for name, (losses, _) in results.items():
                row[f"{reduction.name.lower()}_{name}"] = float(
                    abs(np.longdouble(losses[reduction]) - value) / spacing(value, data_type)
                )
        for name, (_, gradient) in results.items():
            row[f"gradient_{name}"] = self._gradient_error(gradient, exact, data_type)
        self.report.errors.append(row)
        self._judge(row, data_type)

    def _by_torch(self, x: Tensor, y: Tensor, data: Data) -> tuple[dict[Reduction, float], Tensor]:
        own = x.clone().requires_grad_()
        mean = torch_loss(own, y, data, "mean")
        mean.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            total = torch_loss(x, y, data, "sum")
        gradient = torch.zeros(0) if own.grad is None else own.grad
        return {Reduction.MEAN: mean.item(), Reduction.SUM: total.item()}, gradient

    def _by_us(self, x: Tensor, y: Tensor, data: Data, data_type: DataType) -> tuple[dict[Reduction, float], Tensor]:
        specs = tuple(
            SpecPlan(data.kind, data.parameter, reduction, include_gradient=reduction == Reduction.MEAN)
            for reduction in (Reduction.MEAN, Reduction.SUM)
        )
        plan = TensorPlan(data_type, (len(x),))
        operands = tuple(memoryview(tensor.view(torch.uint8).numpy().data) for tensor in (x, y))
        (outcome,) = self.worker.run([WorkItem(JobPlan(specs, plan, plan).header, operands)]).outcomes
        if isinstance(outcome, WorkFailure):
            raise RuntimeError(outcome.message)  # noqa: TRY004
        numbers = [record[0] for record in SPEC_RESULT.iter_unpack(outcome.scalars)]
        gradient = torch.frombuffer(bytearray(outcome.outputs[0]), dtype=x.dtype)
        return dict(zip((Reduction.MEAN, Reduction.SUM), numbers, strict=True)), gradient

    def _gradient_error(self, gradient: Tensor, exact: Exact, data_type: DataType) -> float:
        """Return the largest error of an element of the mean's gradient."""
        largest = 0.0
        for derivative, got in zip(exact.derivatives, _pieces(gradient), strict=True):
            wanted = derivative / self.report.elements
            error = abs(got.double().numpy().astype(np.longdouble) - wanted) / spacing(wanted, data_type)
            largest = max(largest, float(error.max()))
        return largest

    def _judge(self, row: dict[str, Any], data_type: DataType) -> None:
        name = f"{row['data_type']}, {row['data']}"
        for what in ("mean", "sum"):
            ours, others = row[f"{what}_ours"], row[f"{what}_torch"]
            self.report.bars.append(Bar(f"{what}: {name}", ours, MOST_ULPS[data_type], False, " ulp"))
            self._never_worse(f"{what}: {name}", ours, others)
        self._never_worse(f"gradient: {name}", row["gradient_ours"], row["gradient_torch"])

    def _never_worse(self, name: str, ours: float, others: float) -> None:
        # torch's may be infinite or NaN, where it overflows.
        most = others if math.isfinite(others) else math.inf
        self.report.bars.append(Bar(f"{name}, beside torch", ours, max(most, 1e-6), False, " ulp"))

    def _extreme(self, data_type: DataType, d: float, beta: float, exact: float) -> None:
        data = Data(f"d = {d:g}, beta = {beta:g}", _constant(d), parameter=beta)
        x, y = (tensor.to(_TORCH_TYPES[data_type]) for tensor in data.make(torch.Generator(), 1))
        ours = self._by_us(x, y, data, data_type)[0][Reduction.MEAN]
        torchs = torch_loss(x, y, data, "mean").item()
        self.report.extremes.append(
            {"data_type": data_type.name.lower(), "data": data.name, "exact": exact, "ours": ours, "torch": torchs}
        )
        relative = abs(ours - exact) / exact
        self.report.bars.append(
            Bar(
                f"relative error: {data_type.name.lower()}, {data.name}",
                relative,
                2.0**-23,
                False,
                "",
                f"torch: {torchs:g}",
            )
        )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(tensor), _PIECE):
        yield tensor[start : start + _PIECE]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0 however the bars came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=10_000_000, help="how many, 10 million by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    report = Bench(options.elements).run()
    print(to_json(report) if options.json else _text(report))
    return 0


def _text(report: Report) -> str:
    errors = table(
        ("data type", "data", "mean torch", "mean ours", "sum torch", "sum ours", "gradient torch", "gradient ours"),
        [
            [row["data_type"], row["data"], *(f"{value:.3g}" for value in list(row.values())[2:])]
            for row in report.errors
        ],
        left=(0, 1),
    )
    extremes = table(
        ("data type", "data", "exact", "ours", "torch"),
        [
            [row["data_type"], row["data"], *(f"{value:.7g}" for value in list(row.values())[2:])]
            for row in report.extremes
        ],
        left=(0, 1),
    )
    missed = [bar for bar in report.bars if not bar.is_met]
    verdict = f"{len(report.bars) - len(missed)} of {len(report.bars)} bars met" + (":" if missed else "")
    parts = [
        f"{report.machine}\n{report.engine}\nlargest errors in ulps, {report.elements:,} elements",
        errors,
        extremes,
    ]
    return "\n\n".join([*parts, verdict, *([bars_table(missed)] if missed else [])])


if __name__ == "__main__":
    sys.exit(main())
