"""Jobs that need, between them, every kernel that any job needs, so that none is compiled while somebody waits."""

from __future__ import annotations

from lossgrad_server.engine.cuda_fields import CHUNK_ELEMENTS
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import WorkItem


def warm_up_items() -> list[WorkItem]:
    """Return jobs for which every variant of every kernel is compiled."""
    items: list[WorkItem] = []
    shape = (2, 3)
    for data_type in (DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT32, DataType.FLOAT64):
        same = TensorPlan(data_type, shape)
        broadcast = TensorPlan(data_type, (3,))
        weight, mask = TensorPlan(DataType.FLOAT32, shape), TensorPlan(DataType.BOOL, shape)
        specs = (
            SpecPlan(LossKind.SMOOTH_L1, 0.5, Reduction.MEAN, include_gradient=True),
            SpecPlan(LossKind.L1, 0.0, Reduction.NONE),
            SpecPlan(LossKind.HUBER, 0.5, Reduction.SAMPLE_MEAN, include_gradient=True),
            SpecPlan(LossKind.MSE, 0.0, Reduction.SAMPLE_SUM),
        )
        for target in (same, broadcast):
            items += [
                _zeros(JobPlan(specs, input=same, target=target)),
                _zeros(JobPlan(specs, input=same, target=target, weight=weight, mask=mask)),
                _zeros(JobPlan(specs[:2], input=same, target=target, wants_totals=True)),
            ]
    # Sums of more than one chunk, of weights and of samples.
    long = (1, CHUNK_ELEMENTS + 1)
    same, weight = TensorPlan(DataType.FLOAT32, long), TensorPlan(DataType.FLOAT32, long)
    sums = (
        SpecPlan(LossKind.MSE, 0.0, Reduction.MEAN, include_gradient=True),
        SpecPlan(LossKind.MSE, 0.0, Reduction.SAMPLE_SUM),
    )
    return [*items, _zeros(JobPlan(sums, input=same, target=same, weight=weight))]


def _zeros(plan: JobPlan) -> WorkItem:
    return WorkItem(plan.header, tuple(bytes(operand.byte_count) for operand in plan.operands))
