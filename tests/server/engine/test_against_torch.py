"""The worker against torch's own functions and autograd: losses, reductions, types, shapes, parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker
from tests import reference
from tests.server.engine.building import FLOATS, answer, job, spec

TORCH_TYPES = {
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT32: torch.float32,
    DataType.FLOAT64: torch.float64,
    DataType.INT64: torch.int64,
    DataType.INT32: torch.int32,
    DataType.INT16: torch.int16,
    DataType.INT8: torch.int8,
    DataType.UINT8: torch.uint8,
    DataType.BOOL: torch.bool,
}
REDUCTIONS = {Reduction.NONE: "none", Reduction.MEAN: "mean", Reduction.SUM: "sum"}
# Relative error of torch's own answer: it computes and sums in the type itself, or in float32 for the halves.
TOLERANCE = {DataType.FLOAT16: 4e-3, DataType.BFLOAT16: 3e-2, DataType.FLOAT32: 2e-6, DataType.FLOAT64: 1e-14}
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((0,), (0,)),
    ((0, 3), (0, 3)),
    ((1,), (1,)),
    ((7,), (7,)),
    ((3, 5, 7), (3, 5, 7)),
    ((4099,), (4099,)),
    ((2, 3), (3,)),
    ((4, 1), (1, 5)),
    ((5,), ()),
    ((), (2, 2)),
    ((3,), (1, 3)),
    ((0,), (1,)),
    ((2, 1, 3), (4, 1)),
]
FUNCTIONS = [
    *((LossKind.SMOOTH_L1, beta) for beta in (0.0, 1e-50, 0.1, 1.0, 1e39, math.inf)),
    *((LossKind.HUBER, delta) for delta in (0.1, 1.0)),
    (LossKind.L1, 0.0),
    (LossKind.MSE, 0.0),
]


def torch_loss(kind: LossKind, parameter: float, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    dtype = torch.promote_types(input.dtype, target.dtype)
    # Both are brought to one type and shape first: torch's huber fails at mixed types, and all warn about shapes.
    shape = np.broadcast_shapes(input.shape, target.shape)
    input, target = input.to(dtype).expand(shape), target.to(dtype).expand(shape)
    match kind:
        case LossKind.SMOOTH_L1:
            return F.smooth_l1_loss(input, target, reduction=reduction, beta=parameter)
        case LossKind.HUBER:
            return F.huber_loss(input, target, reduction=reduction, delta=parameter)
        case LossKind.L1:
            return F.l1_loss(input, target, reduction=reduction)
        case LossKind.MSE:
            return F.mse_loss(input, target, reduction=reduction)


def samples(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def compare_with_torch(
    worker: DeviceWorker,
    function: tuple[LossKind, float],
    reduction: Reduction,
    values: tuple[Any, Any],
    types: tuple[DataType, DataType],
) -> None:
    kind, parameter = function
    one = job(spec(kind, parameter, reduction), *values, types[0], target_type=types[1])
    got = answer(worker, one)
    plan = one.plan

    tensors = [
        torch.from_numpy(reference.decode(data, tensor).copy()).to(TORCH_TYPES[tensor.data_type])
        for data, tensor in zip(one.operands, plan.operands, strict=True)
    ]
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    loss = torch_loss(kind, parameter, tensors[0], tensors[1], REDUCTIONS[reduction])
    loss.sum().backward()  # type: ignore[no-untyped-call]

    narrowest = min((t for t in (*types, plan.result_type) if t.is_floating_point), key=FLOATS.index)
    tolerance = max(TOLERANCE[narrowest], TOLERANCE[plan.result_type])
    expected = loss.detach().to(torch.float64).numpy()
    np.testing.assert_allclose(got.loss, expected, rtol=tolerance, atol=tolerance)
    if reduction == Reduction.NONE:
        assert np.shape(got.loss) == tuple(loss.shape)
    assert got.element_count == math.prod(plan.result_shape)
    assert got.weight_sum == got.element_count
    for gradient, tensor in ((got.input_gradient, tensors[0]), (got.target_gradient, tensors[1])):
        if gradient is not None:
            assert tensor.grad is not None
            assert gradient.shape == tuple(tensor.shape)
            expected = tensor.grad.to(torch.float64).numpy()
            if parameter == 1e-50 and plan.input.shape == plan.target.shape:
                # torch gives -1 or 0 at d = 0 where beta underflows the type; 0 is right.
                expected[(tensors[0] == tensors[1]).numpy()] = 0
            np.testing.assert_allclose(gradient, expected, rtol=tolerance, atol=tolerance)
    assert got.input_gradient is not None


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_losses_and_gradients_are_torch_s(
    worker: DeviceWorker,
    function: tuple[LossKind, float],
    reduction: Reduction,
    data_type: DataType,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    values = samples(shapes[0], 1), samples(shapes[1], 2)
    compare_with_torch(worker, function, reduction, values, (data_type, data_type))


@pytest.mark.parametrize("target_type", [t for t in DataType if t != DataType.FLOAT32])
@pytest.mark.parametrize("input_type", FLOATS)
@pytest.mark.parametrize("function", [(LossKind.SMOOTH_L1, 0.5), (LossKind.HUBER, 0.5), (LossKind.MSE, 0.0)], ids=str)
def test_mixed_types_promote_as_in_torch(
    worker: DeviceWorker, function: tuple[LossKind, float], input_type: DataType, target_type: DataType
) -> None:
    target = np.random.default_rng(3).integers(0, 3, size=(3, 4))
    for reduction in REDUCTIONS:
        compare_with_torch(worker, function, reduction, (samples((2, 3, 4), 4), target), (input_type, target_type))


@pytest.mark.parametrize("target_type", [DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT64])
def test_an_integer_input_takes_a_floating_point_target(worker: DeviceWorker, target_type: DataType) -> None:
    one = job(spec(gradient=False), [1, 2, 3, 250], samples((4,), 5), DataType.UINT8, target_type=target_type)
    expected = F.smooth_l1_loss(
        torch.tensor([1.0, 2.0, 3.0, 250.0], dtype=torch.float64),
        torch.from_numpy(reference.decode(one.operands[1], one.plan.target).astype(np.float64)),
    )
    got = answer(worker, one)
    assert got.loss == pytest.approx(expected.item(), rel=1e-6)
    assert got.input_gradient is None
    assert got.target_gradient is None


def test_the_target_s_gradient_is_sent_only_where_it_is_not_the_negated_input_s(worker: DeviceWorker) -> None:
    same = answer(worker, job(spec(), samples((2, 3), 1), samples((2, 3), 2)))
    assert same.target_gradient is None
    broadcast = answer(worker, job(spec(reduction=Reduction.SUM), [[1.0, 5.0], [0.5, 0.0]], [0.0, 1.0]))
    assert broadcast.input_gradient is not None
    assert broadcast.target_gradient is not None
    np.testing.assert_array_equal(broadcast.input_gradient, [[1.0, 1.0], [0.5, -1.0]])
    np.testing.assert_array_equal(broadcast.target_gradient, [-1.5, 0.0])
