"""The CPU engine's fast loops where they change what they do: losses computed together, factors of any size, short tails."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker
from tests import reference
from tests.server.engine.building import FLOATS, answer, answers, check, gradient, job, run, spec

NARROW = FLOATS[:3]
# Around a row of lanes, a block and a chunk.
LENGTHS = [1, 8, 31, 32, 33, 63, 65, 511, 513, 4095, 4096, 4097, 9001]


@pytest.fixture(scope="module")
def worker() -> Iterator[DeviceWorker]:
    worker = CpuWorker()
    worker.warm_up()
    yield worker
    worker.close()


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("shape", [(length,) for length in LENGTHS] + [(7, 70), (300, 5), (2, 5000)])
def test_losses_computed_together_are_those_computed_alone(
    worker: DeviceWorker, shape: tuple[int, ...], data_type: DataType
) -> None:
    random = np.random.default_rng(shape[0])
    x, y = random.normal(scale=2, size=(2, *shape))
    # Three of one kind, more than a loop takes at a time, with parameters that float32 does not have.
    kinds = [(kind, parameter) for kind in LossKind for parameter in (0.11, 1.0)] + [(LossKind.HUBER, 2.5)]
    for reductions in ([Reduction.MEAN, Reduction.SUM], [Reduction.SAMPLE_MEAN, Reduction.SAMPLE_SUM]):
        if len(shape) == 1 and reductions[0].is_per_sample:
            continue
        for target in (y, y[:1]):
            specs = [
                spec(kind, parameter, reduction, gradient=False)
                for (kind, parameter), reduction in product(kinds, reductions)
            ][:16]
            together = run(worker, job(specs, x, target, data_type))
            alone = [run(worker, job(one, x, target, data_type)) for one in specs]
            assert together.scalars == b"".join(one.scalars for one in alone)
            assert [bytes(output) for output in together.outputs] == [
                bytes(output) for one in alone for output in one.outputs
            ]


@pytest.mark.parametrize("data_type", NARROW)
def test_not_a_number_among_losses_computed_together(worker: DeviceWorker, data_type: DataType) -> None:
    x = np.linspace(-3, 3, 5000)
    for special in (np.nan, np.inf, -np.inf):
        x[[4, 4500]] = special
        check(worker, job([spec(kind, 0.5, gradient=False) for kind in LossKind], x, np.zeros(5000), data_type))


@pytest.mark.parametrize("data_type", NARROW)
@pytest.mark.parametrize("exponent", [-140, -120, -101, -100, -99, -40, -1, 0, 30, 99, 100, 101, 120])
def test_gradients_are_the_nearest_numbers_whatever_they_are_multiplied_by(
    worker: DeviceWorker, data_type: DataType, exponent: int
) -> None:
    random = np.random.default_rng(abs(exponent))
    x = random.normal(scale=2, size=700)
    for sign, beta in product((1.0, -1.0), (0.11, 1.0)):
        scale = sign * 1.2345678901234567 * 2.0**exponent
        one = job(spec(LossKind.HUBER, beta, Reduction.SUM, scale=scale), x, np.zeros(700), data_type)
        values = reference.decode(one.operands[0], one.plan.input).astype(np.float64)
        exact = np.clip(values, -beta, beta) * scale
        with np.errstate(over="ignore"):
            expected = reference.rounded(exact, data_type)
        got = np.array(gradient(answer(worker, one)))
        infinite = np.isinf(expected)
        np.testing.assert_array_equal(got[infinite], expected[infinite])
        error = np.abs(got[~infinite] - exact[~infinite]) / reference.spacing(exact[~infinite], data_type)
        # Half an ulp is rounding; among the smallest numbers of all, the factor's lower half is rounded too.
        smallest = np.abs(exact[~infinite]) < 2.0**-100
        assert np.max(error, where=~smallest, initial=0.0) <= 0.5 + 1e-6
        assert np.max(error, where=smallest, initial=0.0) <= 1.0
        np.testing.assert_array_equal(np.signbit(got), np.signbit(exact))


@pytest.mark.parametrize("data_type", NARROW)
@pytest.mark.parametrize("length", LENGTHS)
def test_an_elements_gradient_does_not_depend_on_its_place(
    worker: DeviceWorker, length: int, data_type: DataType
) -> None:
    random = np.random.default_rng(length)
    x = random.normal(size=length)
    for kind, reduction in product(LossKind, (Reduction.SUM, Reduction.NONE)):
        one = spec(kind, 0.11, reduction, scale=0.7)
        forwards = answers(worker, job(one, x, np.zeros(length), data_type))[0]
        backwards = answers(worker, job(one, x[::-1], np.zeros(length), data_type))[0]
        assert gradient(forwards) == gradient(backwards)[::-1]
        if reduction == Reduction.NONE:
            np.testing.assert_array_equal(forwards.loss, np.asarray(backwards.loss)[::-1])
