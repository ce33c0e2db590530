"""How exact the CPU engine is: where torch overflows, underflows or adds up rounding errors, and at its formats' edges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker
from tests import reference
from tests.server.engine.building import FLOATS, Job, answer, answers, check, gradient, job, spec
from tests.server.engine.test_cpu_invariance import jobs

NARROW = FLOATS[:3]


@pytest.fixture(scope="module")
def worker() -> Iterator[DeviceWorker]:
    worker = CpuWorker()
    worker.warm_up()
    yield worker
    worker.close()


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(one=jobs())
def test_any_job_is_answered_as_the_reference_answers_it(worker: DeviceWorker, one: Job) -> None:
    if one.plan.element_count <= 3000:  # the reference takes its time
        check(worker, one)


@pytest.mark.parametrize(
    ("d", "beta", "exact"), [(1e20, 1e30, 5e9), (1e-25, 1e-20, 5e-31), (1e-30, 1e-38, 1e-30), (3e38, 1.0, 3e38)]
)
def test_float32_losses_are_right_where_torch_overflows_or_underflows(
    worker: DeviceWorker, d: float, beta: float, exact: float
) -> None:
    for reduction in (Reduction.MEAN, Reduction.SUM):
        assert float(answer(worker, job(spec(parameter=beta, reduction=reduction), [d], [0.0])).loss) == pytest.approx(
            exact, rel=1e-7
        )


def test_a_float16_square_beyond_float16_is_right(worker: DeviceWorker) -> None:
    results = answers(worker, job([spec(parameter=1000.0), spec(LossKind.MSE)], [400.0], [0.0], DataType.FLOAT16))
    assert [result.loss for result in results] == [80.0, 160_000.0]


@pytest.mark.parametrize("exponent", [-1074, -1070, -1022, -500, 0, 500, 1000])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 3.0])
def test_float64_losses_are_right_at_any_scale(worker: DeviceWorker, exponent: int, ratio: float) -> None:
    beta = math.ldexp(1.0, exponent)
    d = beta * ratio
    specs = [spec(parameter=beta), spec(LossKind.L1)]
    if exponent < 1000:  # the square is infinite there
        specs.append(spec(LossKind.HUBER, beta))
    check(worker, job(specs, [d, -d, 0.0], [0.0] * 3, DataType.FLOAT64))


@pytest.mark.parametrize("data_type", NARROW)
@pytest.mark.parametrize("kind", LossKind)
def test_a_constants_mean_and_sum_are_exact(worker: DeviceWorker, kind: LossKind, data_type: DataType) -> None:
    # torch's float32 sum of 1.1 is off by 5 ulp: every addition rounds the same way.
    count = 1_000_003
    one = job(
        [spec(kind, 0.11, gradient=False), spec(kind, 0.11, Reduction.SUM, gradient=False)], [1.1], [0.0], data_type
    )
    value = float(reference.decode(one.operands[0], one.plan.input)[0])
    loss, _ = reference.element(kind, 0.11, value)
    mean, total = answers(worker, job(one.plan.specs, np.full(count, 1.1), np.zeros(count), data_type))
    assert float(mean.loss) == pytest.approx(loss, rel=1e-14)
    assert float(total.loss) == pytest.approx(loss * count, rel=1e-14)


@pytest.mark.parametrize("data_type", FLOATS)
def test_a_sum_of_small_and_large_is_rounded_once(worker: DeviceWorker, data_type: DataType) -> None:
    random = np.random.default_rng(2)
    values = random.normal(size=300_000) * np.where(random.random(300_000) < 0.5, 1e-3, 1e4)
    one = job([spec(LossKind.L1, reduction=Reduction.SUM, gradient=False)], values, np.zeros(values.size), data_type)
    exact = math.fsum(abs(reference.decode(one.operands[0], one.plan.input).astype(np.float64)))
    got = float(answer(worker, one).loss)
    assert abs(Fraction(got) - Fraction(exact)) <= Fraction(float(np.spacing(exact)))


def test_a_broadcast_gradient_that_cancels_is_exact(worker: DeviceWorker) -> None:
    # Terms of about 1e8 that leave about 1: the float32 sum has no correct digit.
    random = np.random.default_rng(4)
    half = random.normal(scale=1e8, size=(50_000, 3)).astype(np.float32)
    x = np.concatenate([half, np.ones((1, 3), np.float32), -half])[random.permutation(100_001)]
    y = np.zeros(3, np.float32)
    result = answer(worker, job(spec(LossKind.MSE, reduction=Reduction.SUM), x, y, DataType.FLOAT32))
    assert result.target_gradient is not None
    np.testing.assert_array_equal(result.target_gradient, [-2.0, -2.0, -2.0])
    column = answer(worker, job(spec(LossKind.MSE, reduction=Reduction.SUM), x.T, y[:, None], DataType.FLOAT32))
    assert column.target_gradient is not None
    np.testing.assert_array_equal(column.target_gradient, [[-2.0], [-2.0], [-2.0]])


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16])
def test_every_number_of_a_half_type_is_read_and_written_as_it_is(worker: DeviceWorker, data_type: DataType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.float16 if data_type == 1 else torch.bfloat16)
    one = job([spec(LossKind.L1, reduction=Reduction.NONE)], np.zeros(bits.size), np.zeros(bits.size), data_type)
    result = answer(worker, Job(one.plan, (bits.tobytes(), one.operands[1])))
    np.testing.assert_array_equal(result.loss, values.double().abs().numpy())


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16])
def test_gradients_are_rounded_once_to_the_half_types(worker: DeviceWorker, data_type: DataType) -> None:
    # The gradient is 1, or 1/2 or 3 times that, times a float64 next to a tie of the half type.
    bits = 11 if data_type == DataType.FLOAT16 else 8
    tie = 1.0 + 2.0**-bits
    for scale in (tie, np.nextafter(tie, 2.0), np.nextafter(tie, 0.0), tie + 2.0**-40, tie * 2.0**-20, 65520.0, 1e39):
        one = job(spec(LossKind.HUBER, 3.0, Reduction.SUM, scale=float(scale)), [1.0, 0.5, 5.0], [0.0] * 3, data_type)
        expected = reference.rounded(np.array([1.0, 0.5, 3.0]) * scale, data_type)
        np.testing.assert_array_equal(gradient(answer(worker, one)), expected)


@pytest.mark.parametrize("data_type", NARROW)
@pytest.mark.parametrize("beta", [0.11, 1.0, 7.3])
def test_gradients_are_the_nearest_numbers(worker: DeviceWorker, data_type: DataType, beta: float) -> None:
    random = np.random.default_rng(6)
    x, y = random.normal(scale=3, size=(2, 20_000))
    one = job(spec(parameter=beta, scale=0.7), x, y, data_type)
    differences = (
        reference.decode(one.operands[0], one.plan.input).astype(np.float32)
        - reference.decode(one.operands[1], one.plan.target).astype(np.float32)
    ).astype(np.float64)
    exact = np.clip(differences / beta, -1.0, 1.0) * 0.7 / x.size
    got = np.array(gradient(answer(worker, one)))
    error = np.abs(got - exact) / reference.spacing(exact, data_type)
    assert error.max() <= 0.5 + 1e-6


def test_gradients_at_the_limit_are_the_scale_itself(worker: DeviceWorker) -> None:
    for data_type in (DataType.FLOAT32, DataType.FLOAT64):
        for beta in (0.5, 0.75, 3.0, 1e-3 if data_type == DataType.FLOAT64 else 2.0**-10):
            one = job(
                spec(parameter=beta, reduction=Reduction.SUM, scale=0.3), [beta, -beta, 9 * beta], [0.0] * 3, data_type
            )
            scale = float(reference.rounded(0.3, data_type))
            assert gradient(answer(worker, one)) == [scale, -scale, scale]
