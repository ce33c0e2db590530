"""What the worker answers beyond torch: weights, masks, denominators, samples, several specs; held against the reference.

Single numbers are hand arithmetic.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker
from tests.server.engine.building import FLOATS, Job, answer, answers, check, gradient, job, spec

NAN, INF = math.nan, math.inf
MEANS = (Reduction.MEAN, Reduction.SAMPLE_MEAN)


def random_jobs(seed: int, data_type: DataType, shape: tuple[int, ...], **options: Any) -> list[Job]:
    """Return jobs with every loss and reduction, over data whose differences lie on both sides of the parameters."""
    random = np.random.default_rng(seed)
    reductions = list(Reduction) if shape else [Reduction.NONE, Reduction.MEAN, Reduction.SUM]
    specs = [spec(kind, 0.7, reduction, scale=-2.5) for kind, reduction in product(LossKind, reductions)]
    if options.pop("denominators", False):
        specs = [
            spec(one.kind, one.parameter, one.reduction, denominator=37.5) for one in specs if one.reduction.is_mean
        ]
    x, y = random.normal(size=shape), random.normal(size=shape)
    return [job(some, x, y, data_type, **options) for some in (specs[::2], specs[1::2])]


SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (0, 3), (3, 0), (7,), (5, 3), (3, 1, 4), (2, 301)]


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extras", ["nothing", "weight", "mask", "both", "denominators"])
def test_every_loss_and_reduction_is_the_reference_s(
    worker: DeviceWorker, extras: str, shape: tuple[int, ...], data_type: DataType
) -> None:
    random = np.random.default_rng(8)
    options: dict[str, Any] = {"denominators": extras == "denominators"}
    if extras in ("weight", "both", "denominators"):
        options["weight"] = random.uniform(0.1, 3, size=shape)
        options["weight_type"] = data_type
    if extras in ("mask", "both"):
        options["mask"] = random.random(shape) < 0.6
    for one in random_jobs(9, data_type, shape, **options):
        check(worker, one)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_rows_longer_than_a_chunk_are_the_reference_s(worker: DeviceWorker, reduction: Reduction) -> None:
    random = np.random.default_rng(12)
    shape = (2, 4101)
    x, y, weight = random.normal(size=shape), random.normal(size=shape), random.uniform(0.1, 3, size=shape)
    check(worker, job(spec(parameter=0.7, reduction=reduction), x, y, weight=weight, mask=random.random(shape) < 0.6))


@pytest.mark.parametrize(
    ("input", "target", "weight", "mask"),
    [
        ((4, 1), (1, 5), (5,), (4, 1)),
        ((5,), (4, 5), (4, 5), ()),
        ((2, 1, 3), (4, 1), (), (2, 4, 3)),
        ((), (2, 2), (2, 1), (2,)),
        ((0, 1), (3,), (3,), (1, 1)),
        ((1,), (0,), (1,), (1,)),
        ((3,), (1, 3), (3,), (1, 3)),
    ],
)
@pytest.mark.parametrize(
    ("input_type", "target_type"),
    [(DataType.FLOAT32, DataType.FLOAT32), (DataType.BFLOAT16, DataType.FLOAT64), (DataType.FLOAT16, DataType.INT16)],
)
def test_broadcast_operands_get_their_gradients_summed_back(
    worker: DeviceWorker,
    input: tuple[int, ...],
    target: tuple[int, ...],
    weight: tuple[int, ...],
    mask: tuple[int, ...],
    input_type: DataType,
    target_type: DataType,
) -> None:
    random = np.random.default_rng(10)
    specs = [spec(kind, 0.7, reduction) for kind, reduction in product(LossKind, list(Reduction)[:4])]
    one = job(
        specs,
        random.normal(size=input),
        random.normal(size=target) * 2,
        input_type,
        target_type=target_type,
        weight=random.uniform(0.1, 2, weight),
        mask=random.random(mask) < 0.7,
    )
    check(worker, one)


@pytest.mark.parametrize("beta", [0.0, 1e-50, 0.1, 1.0, 1e39, INF])
@pytest.mark.parametrize("data_type", FLOATS)
def test_the_extremes_of_beta_and_delta_are_the_reference_s(
    worker: DeviceWorker, data_type: DataType, beta: float
) -> None:
    d = [0.0, -0.0, 0.1, -0.1, 1.0, -1.0, 3e-7, 250.0, -60000.0, NAN, INF, -INF, *np.linspace(-2, 2, 41)]
    specs = [spec(parameter=beta, reduction=Reduction.NONE)]
    if beta > 0:
        specs.append(spec(LossKind.HUBER, beta, Reduction.NONE))
    check(worker, job(specs, d, np.zeros(len(d)), data_type))


@pytest.mark.parametrize("count", [1, 16, 37])  # torch's vector blocks and their tails
@pytest.mark.parametrize(
    ("kind", "parameter", "d", "loss", "derivative"),
    [
        (LossKind.SMOOTH_L1, 0.5, NAN, NAN, NAN),
        (LossKind.SMOOTH_L1, 0.5, INF, INF, 1.0),
        (LossKind.SMOOTH_L1, 0.5, -INF, INF, -1.0),
        (LossKind.SMOOTH_L1, 0.5, 0.5, 0.25, 1.0),
        (LossKind.SMOOTH_L1, 0.5, -0.5, 0.25, -1.0),
        (LossKind.SMOOTH_L1, 0.5, 0.0, 0.0, 0.0),
        (LossKind.SMOOTH_L1, 0.0, NAN, NAN, 0.0),
        (LossKind.SMOOTH_L1, 0.0, INF, INF, 1.0),
        (LossKind.SMOOTH_L1, 0.0, -INF, INF, -1.0),
        (LossKind.SMOOTH_L1, 0.0, 0.0, 0.0, 0.0),
        (LossKind.SMOOTH_L1, INF, 3.0, 0.0, 0.0),
        (LossKind.SMOOTH_L1, INF, INF, NAN, 1.0),
        (LossKind.SMOOTH_L1, INF, -INF, NAN, -1.0),
        (LossKind.SMOOTH_L1, INF, NAN, NAN, NAN),
        (LossKind.SMOOTH_L1, 1e-50, 0.0, 0.0, 0.0),  # torch: -1 in vector blocks, NaN on CUDA
        (LossKind.SMOOTH_L1, 5e-324, 0.0, 0.0, 0.0),
        (LossKind.SMOOTH_L1, 5e-324, NAN, NAN, NAN),
        (LossKind.L1, 0.0, NAN, NAN, 0.0),
        (LossKind.L1, 0.0, -INF, INF, -1.0),
        (LossKind.HUBER, 2.0, NAN, NAN, NAN),
        (LossKind.HUBER, 2.0, -INF, INF, -2.0),
        (LossKind.HUBER, INF, 3.0, 4.5, 3.0),
        (LossKind.MSE, 0.0, NAN, NAN, NAN),
        (LossKind.MSE, 0.0, -INF, INF, -INF),
    ],
)
def test_kinks_nan_and_infinity(
    worker: DeviceWorker, kind: LossKind, parameter: float, d: float, loss: float, derivative: float, count: int
) -> None:
    result = answer(worker, job(spec(kind, parameter, Reduction.NONE), [d] * count, [0.0] * count))
    np.testing.assert_array_equal(result.loss, [loss] * count)
    np.testing.assert_array_equal(gradient(result), [derivative] * count)
    assert result.nonfinite_count == (0 if math.isfinite(loss) else count)


@pytest.mark.parametrize("beta", [0.0, 1.0, INF])
def test_no_loss_is_a_negative_zero(worker: DeviceWorker, beta: float) -> None:
    specs = [spec(kind, beta or 1.0, Reduction.NONE) for kind in LossKind] + [spec(parameter=beta)]
    for result in answers(worker, job(specs, [-0.0], [0.0])):
        assert not np.signbit(result.loss).any()


def test_infinity_minus_infinity_is_nan(worker: DeviceWorker) -> None:
    result = answer(worker, job(spec(), [INF], [INF]))
    assert math.isnan(float(result.loss))
    assert math.isnan(gradient(result)[0])


@pytest.mark.parametrize(
    ("data_type", "input", "beta", "loss"),
    [
        (DataType.FLOAT32, 1e20, 1e30, 5e9),  # torch: inf
        (DataType.FLOAT32, 1e-25, 1e-20, 5e-31),  # torch: 0
        (DataType.FLOAT16, 400.0, 1000.0, 80.0),  # torch: inf
    ],
)
def test_right_where_torch_overflows_or_underflows(
    worker: DeviceWorker, data_type: DataType, input: float, beta: float, loss: float
) -> None:
    specs = [spec(parameter=beta, reduction=reduction) for reduction in (Reduction.NONE, Reduction.SUM)]
    elementwise, summed = answers(worker, job(specs, [input], [0.0], data_type))
    np.testing.assert_allclose(elementwise.loss, [loss], rtol=1e-6)
    assert summed.loss == pytest.approx(loss, rel=1e-7)
    assert summed.nonfinite_count == 0


def test_a_loss_beyond_its_type_is_finite_as_a_sum_and_infinite_as_an_element(worker: DeviceWorker) -> None:
    specs = [spec(LossKind.MSE, reduction=reduction) for reduction in (Reduction.NONE, Reduction.SUM)]
    elementwise, summed = answers(worker, job(specs, [2.0**70], [0.0]))
    np.testing.assert_array_equal(elementwise.loss, [INF])
    assert summed.loss == 2.0**140


@pytest.mark.parametrize("behind", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("kind", list(LossKind))
def test_nothing_passes_a_mask(worker: DeviceWorker, kind: LossKind, reduction: Reduction, behind: float) -> None:
    mask = [[True, False], [True, True]]
    hidden = answer(
        worker,
        job(
            spec(kind, 1.0, reduction),
            [[1.0, behind], [2.0, 3.0]],
            [[3.0, NAN], [2.5, 3.0]],
            weight=[[2.0, behind], [1.0, 0.5]],
            mask=mask,
        ),
    )
    plain = answer(
        worker,
        job(
            spec(kind, 1.0, reduction),
            [[1.0, 0.0], [2.0, 3.0]],
            [[3.0, 0.0], [2.5, 3.0]],
            weight=[[2.0, 1.0], [1.0, 0.5]],
            mask=mask,
        ),
    )
    np.testing.assert_array_equal(hidden.loss, plain.loss)
    np.testing.assert_array_equal(gradient(hidden), gradient(plain))
    assert (hidden.element_count, hidden.weight_sum, hidden.nonfinite_count) == (3, 3.5, 0)
    assert gradient(hidden)[1] == 0.0
    if reduction == Reduction.NONE:
        assert np.asarray(hidden.loss)[0, 1] == 0.0


def test_any_byte_but_zero_is_true(worker: DeviceWorker) -> None:
    one = job(
        spec(LossKind.L1, reduction=Reduction.SUM), [1.0] * 4, [1] * 4, target_type=DataType.BOOL, mask=[True] * 4
    )
    odd = Job(one.plan, (one.operands[0], b"\x00\x01\x02\xff", b"\x80\x00\x02\x01"))
    result = answer(worker, odd)
    assert (result.loss, result.element_count) == (1.0, 3)


def test_an_empty_mean_is_nan_and_an_empty_sum_0(worker: DeviceWorker) -> None:
    specs = [spec(reduction=Reduction.MEAN), spec(reduction=Reduction.SUM)]
    for one in (job(specs, [], []), job(specs, [1.0, 2.0], [3.0, 5.0], mask=[False, False])):
        mean, total = answers(worker, one)
        assert math.isnan(float(mean.loss))
        assert total.loss == 0.0
        assert (mean.element_count, mean.weight_sum) == (0, 0.0)
        assert set(gradient(mean) + gradient(total)) <= {0.0}


def test_a_sample_without_elements_has_mean_nan_and_harms_no_other(worker: DeviceWorker) -> None:
    specs = [spec(reduction=Reduction.SAMPLE_MEAN), spec(reduction=Reduction.SAMPLE_SUM)]
    one = job(specs, [[1.0, 3.0], [1.0, 1.0]], [[0.0, 0.0], [NAN, 0.0]], mask=[[True, True], [False, False]])
    mean, total = answers(worker, one)
    np.testing.assert_array_equal(mean.loss, [1.5, NAN])
    np.testing.assert_array_equal(total.loss, [3.0, 0.0])
    assert gradient(mean) == [0.5, 0.5, 0.0, 0.0]


def test_zero_weights_give_a_mean_of_nan(worker: DeviceWorker) -> None:
    result = answer(worker, job(spec(), [3.0, 0.0], [0.0, 0.0], weight=[0.0, 0.0]))
    assert math.isnan(float(result.loss))
    assert all(math.isnan(value) for value in gradient(result))


def test_weights_and_a_denominator_by_hand(worker: DeviceWorker) -> None:
    # smooth L1, beta 1: d = 2, -0.5, 0 -> l = 1.5, 0.125, 0 and g = 1, -0.5, 0; weights 2, 4, 1
    specs = [
        spec(),
        spec(denominator=10.0, scale=3.0),
        spec(reduction=Reduction.SUM, scale=-2.0),
        spec(reduction=Reduction.NONE),
    ]
    mean, divided, total, elements = answers(
        worker, job(specs, [2.0, 0.0, 1.0], [0.0, 0.5, 1.0], DataType.FLOAT64, weight=[2.0, 4.0, 1.0])
    )
    assert mean.loss == 3.5 / 7
    assert gradient(mean) == [2 / 7, -2 / 7, 0.0]
    assert divided.loss == 0.35
    assert gradient(divided) == [0.6, -0.6, 0.0]
    assert total.loss == 3.5
    assert gradient(total) == [-4.0, 4.0, 0.0]
    np.testing.assert_array_equal(elements.loss, [3.0, 0.5, 0.0])
    assert {one.weight_sum for one in (mean, divided, total, elements)} == {7.0}


def test_shards_with_a_common_denominator_add_up_to_the_whole(worker: DeviceWorker) -> None:
    random = np.random.default_rng(11)
    x, y = random.normal(size=(2, 1000))
    whole = answer(worker, job(spec(), x, y, DataType.FLOAT64))
    one, other = (
        answer(worker, job(spec(denominator=1000.0), x[part], y[part], DataType.FLOAT64))
        for part in (slice(0, 300), slice(300, 1000))
    )
    assert float(one.loss) + float(other.loss) == pytest.approx(float(whole.loss), rel=1e-15)
    assert gradient(one) + gradient(other) == gradient(whole)


def test_scalars_are_sent_only_for_scalar_reductions_and_outputs_only_when_asked(worker: DeviceWorker) -> None:
    specs = [spec(gradient=False, reduction=reduction) for reduction in Reduction]
    results = answers(worker, job(specs, [[1.0, 2.0]], [[0.0, 0.0]]))
    assert [np.shape(result.loss) for result in results] == [(1, 2), (), (), (1,), (1,)]
    assert all(result.input_gradient is None for result in results)


def test_a_loss_scaled_float16_gradient_is_right_beyond_30_million_elements_worth_of_divisor(
    worker: DeviceWorker,
) -> None:
    # torch's CPU huber gives 0 here: it holds 1/N in half.
    result = answer(
        worker, job(spec(LossKind.HUBER, 1.0, denominator=4e7, scale=32768.0), [2.0], [0.0], DataType.FLOAT16)
    )
    assert gradient(result)[0] == float(np.float16(32768 / 4e7))
