"""Builds jobs out of arrays and hands them to a worker, for the engine's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import DeviceWorker, SpecTotal, WorkItem, WorkResult, unpack_totals
from tests import reference
from tests.reference import SpecAnswer

FLOATS = (DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT32, DataType.FLOAT64)
ALL_SPECS_PARAMETERS = {LossKind.SMOOTH_L1: 0.7, LossKind.HUBER: 0.7, LossKind.L1: 0.0, LossKind.MSE: 0.0}


@dataclass(frozen=True)
class Job:
    """A plan with its operands' bytes."""

    plan: JobPlan
    operands: tuple[bytes, ...]

    @property
    def item(self) -> WorkItem:
        return WorkItem(self.plan.header, self.operands)


def spec(
    kind: LossKind = LossKind.SMOOTH_L1,
    parameter: float = 1.0,
    reduction: Reduction = Reduction.MEAN,
    *,
    gradient: bool = True,
    denominator: float | None = None,
    scale: float = 1.0,
) -> SpecPlan:
    if kind in (LossKind.L1, LossKind.MSE):
        parameter = 0.0
    return SpecPlan(kind, parameter, reduction, gradient, denominator, scale)


def job(
    specs: SpecPlan | Sequence[SpecPlan],
    input: Any,
    target: Any,
    data_type: DataType = DataType.FLOAT32,
    *,
    target_type: DataType | None = None,
    weight: Any = None,
    weight_type: DataType = DataType.FLOAT32,
    mask: Any = None,
) -> Job:
    """Return a job over array-likes, each rounded to its type."""
    plans: list[TensorPlan | None] = []
    operands: list[bytes] = []
    for values, own_type in (
        (input, data_type),
        (target, target_type or data_type),
        (weight, weight_type),
        (mask, DataType.BOOL),
    ):
        if values is None:
            plans.append(None)
            continue
        plans.append(TensorPlan(own_type, np.shape(values)))
        operands.append(reference.encode(values, own_type))
    assert plans[0] is not None
    assert plans[1] is not None
    all_specs = (specs,) if isinstance(specs, SpecPlan) else tuple(specs)
    return Job(JobPlan(all_specs, plans[0], plans[1], weight=plans[2], mask=plans[3]), tuple(operands))


def run(worker: DeviceWorker, one: Job) -> WorkResult:
    """Return a single job's result; fail if it has none."""
    (outcome,) = worker.submit([one.item]).result().outcomes
    assert isinstance(outcome, WorkResult), outcome
    return outcome


def answers(worker: DeviceWorker, one: Job) -> list[SpecAnswer]:
    return reference.unpack(one.plan, run(worker, one))


def answer(worker: DeviceWorker, one: Job) -> SpecAnswer:
    (only,) = answers(worker, one)
    return only


def with_totals(one: Job) -> Job:
    """Return the job as one that wants totals."""
    return Job(dataclasses.replace(one.plan, wants_totals=True), one.operands)


def totals(worker: DeviceWorker, one: Job) -> list[SpecTotal]:
    """Return the totals that a job has when it wants them."""
    return unpack_totals(run(worker, with_totals(one)).totals)


def check(worker: DeviceWorker, one: Job) -> None:
    """Compare a job's result with the reference's."""
    reference.assert_matches(one.plan, one.operands, run(worker, one))


def gradient(result: SpecAnswer) -> list[float]:
    """Return the input's gradient as a flat list."""
    assert result.input_gradient is not None
    return [float(value) for value in result.input_gradient.ravel()]


def result_bytes(result: WorkResult) -> tuple[bytes, ...]:
    """Return everything that a result holds, to be compared to the bit."""
    return (result.scalars, result.totals, *(bytes(output) for output in result.outputs))
