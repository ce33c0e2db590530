"""Totals: of parts of a tensor they add up, in any order, to the bits of the whole one's mean and sum.

Every engine's tests take these in, with a worker of their own.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossgrad_server.engine.exact_sums import quotient, rounded
from lossgrad_server.jobs import DataType, LossKind, Reduction, unpack_header
from lossgrad_server.work import DeviceWorker, SpecTotal
from tests import reference
from tests.reference import CHUNK
from tests.server.engine.building import FLOATS, Job, answers, job, run, spec, totals, with_totals

NAN, INF = math.nan, math.inf
KINDS = list(LossKind)


def packed(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *numbers)


def assert_close(got: SpecTotal, expected: SpecTotal) -> None:
    """Fail unless a total is the reference's; its sums may be off by what the rounding of each chunk's adds up to."""
    reference.assert_close(got.minimum, expected.minimum, DataType.FLOAT64, 4, "minimum")
    reference.assert_close(got.maximum, expected.maximum, DataType.FLOAT64, 4, "maximum")
    for own, other in ((got.partials, expected.partials), (got.weight_partials, expected.weight_partials)):
        assert packed(*own) == packed(*reference.exact_partials(own)), "the numbers are not the nearest ones"
        reference.assert_close(rounded(own), rounded(other), DataType.FLOAT64, 16, "sum")


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("extras", ["nothing", "weight", "mask", "both"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 3), (CHUNK,), (2, 2101)], ids=str)
def test_totals_are_the_reference_s(
    worker: DeviceWorker, data_type: DataType, extras: str, shape: tuple[int, ...]
) -> None:
    random = np.random.default_rng(20)
    reductions = (Reduction.MEAN, Reduction.SUM, Reduction.NONE, Reduction.MEAN)
    one = job(
        [spec(kind, 0.7, reduction) for kind, reduction in zip(KINDS, reductions, strict=True)],
        random.normal(size=shape),
        random.normal(size=shape),
        data_type,
        weight=random.uniform(-0.2, 3, size=shape) if extras in ("weight", "both") else None,
        weight_type=data_type,
        mask=random.random(shape) < 0.6 if extras in ("mask", "both") else None,
    )
    for got, expected in zip(totals(worker, one), reference.totals(one.plan, one.operands), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("reduction", [Reduction.MEAN, Reduction.SUM, Reduction.NONE])
def test_wanting_totals_changes_no_other_number(worker: DeviceWorker, reduction: Reduction) -> None:
    random = np.random.default_rng(21)
    x, y = random.normal(size=(2, CHUNK + 5))
    for weight in (None, random.uniform(size=CHUNK + 5)):
        one = job([spec(kind, 0.7, reduction) for kind in KINDS], x, y, weight=weight)
        plain, wanted = run(worker, one), run(worker, with_totals(one))
        assert (plain.totals, len(wanted.totals)) == (b"", 4 * 672)
        assert plain.scalars == wanted.scalars
        assert list(map(bytes, plain.outputs)) == list(map(bytes, wanted.outputs))


@pytest.mark.parametrize(("shape", "target"), [((3, 2000), (2000,)), ((4, 1), (1, 2000)), ((), (CHUNK + 1,))], ids=str)
def test_totals_of_broadcast_operands_are_over_what_they_broadcast_to(
    worker: DeviceWorker, shape: tuple[int, ...], target: tuple[int, ...]
) -> None:
    random = np.random.default_rng(22)
    one = job(spec(LossKind.HUBER, 0.5), random.normal(size=shape), random.normal(size=target), DataType.FLOAT16)
    (got,) = totals(worker, one)
    (expected,) = reference.totals(one.plan, one.operands)
    assert_close(got, expected)


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("reduction", [Reduction.MEAN, Reduction.NONE])
def test_extremes_by_hand(worker: DeviceWorker, data_type: DataType, reduction: Reduction) -> None:
    # L1: 2, 0, 3, 0.5, 7; weights make them 2, -0, -6, 0.5, 7; the last is masked.
    total, *_ = totals(
        worker,
        job(
            spec(LossKind.L1, reduction=reduction),
            [2.0, 0.0, 3.0, 0.5, 7.0],
            [0.0] * 5,
            data_type,
            weight=[1.0, -1.0, -2.0, 1.0, 1.0],
            mask=[True, True, True, True, False],
        ),
    )
    assert (total.minimum, total.maximum, total.partials) == (-6.0, 2.0, (-3.5,))
    assert total.weight_partials == (-1.0,)
    (zero,) = totals(worker, job(spec(LossKind.L1), [0.0, 0.0], [0.0, 0.0], data_type, weight=[-1.0, -2.0]))
    assert packed(zero.minimum, zero.maximum) == packed(0.0, 0.0)
    (narrow,) = totals(worker, job(spec(LossKind.MSE, reduction=reduction), [300.0, 1.0], [0.0, 0.0], data_type))
    assert (narrow.minimum, narrow.maximum) == (1.0, 90_000.0)  # beyond float16


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [0, CHUNK + 1])
def test_nan_and_infinity(worker: DeviceWorker, data_type: DataType, kind: LossKind, where: int) -> None:
    x = np.full(CHUNK + 3, 3.0)
    loss = {LossKind.MSE: 9.0, LossKind.L1: 3.0}.get(kind, 2.5)
    for special, mask, minimum, maximum, total in (
        (NAN, None, loss, loss, NAN),
        (INF, None, loss, INF, INF),
        (-INF, None, loss, INF, INF),
        (NAN, where, loss, loss, (CHUNK + 2) * loss),
        (INF, where, loss, loss, (CHUNK + 2) * loss),
    ):
        x[where] = special
        masks = None if mask is None else np.arange(len(x)) != where
        (got,) = totals(worker, job(spec(kind, 1.0, Reduction.SUM), x, np.zeros(len(x)), data_type, mask=masks))
        assert (got.minimum, got.maximum) == (minimum, maximum)
        assert packed(*got.partials) == packed(total)
    x[where], x[where - 1] = NAN, INF
    (got,) = totals(worker, job(spec(kind, 1.0, Reduction.MEAN), x, np.zeros(len(x)), data_type))
    assert (got.minimum, got.maximum) == (loss, INF)
    assert packed(*got.partials) == packed(NAN)


@pytest.mark.parametrize("data_type", FLOATS)
def test_infinite_parameters_and_weights(worker: DeviceWorker, data_type: DataType) -> None:
    x, zeros = [1.0, 2.0, INF, NAN], [0.0] * 4
    specs = [spec(parameter=INF), spec(LossKind.HUBER, INF), spec(LossKind.MSE), spec(LossKind.L1)]
    smooth, huber, mse, l1 = totals(worker, job(specs, x, zeros, data_type))
    assert (smooth.minimum, smooth.maximum) == (0.0, 0.0)  # the infinite difference's loss is NaN
    assert (huber.minimum, huber.maximum) == (0.5, 2.0)
    assert (mse.minimum, mse.maximum, l1.minimum, l1.maximum) == (1.0, INF, 1.0, INF)
    (weighted,) = totals(worker, job(spec(LossKind.L1), [1.0, 2.0, 0.0], [0.0] * 3, data_type, weight=[-INF, 1.0, INF]))
    assert (weighted.minimum, weighted.maximum) == (-INF, 2.0)
    assert packed(*weighted.partials, *weighted.weight_partials) == packed(NAN, NAN)
    (one_sided,) = totals(worker, job(spec(LossKind.L1), [1.0, 2.0], [0.0] * 2, data_type, weight=[-INF, 1.0]))
    assert (one_sided.partials, one_sided.weight_partials) == ((-INF,), (-INF,))


def test_a_total_of_nothing(worker: DeviceWorker) -> None:
    for one in (job(spec(), [], []), job(spec(), [1.0, NAN], [0.0, 0.0], mask=[False, False])):
        assert totals(worker, one) == [SpecTotal(INF, -INF, (), ())]


def test_chunks_that_cancel_and_overflow(worker: DeviceWorker) -> None:
    # One element of each chunk has a weight that is not 0.
    def total(*weights: float) -> SpecTotal:
        count = (len(weights) - 1) * CHUNK + 1
        weight = np.zeros(count)
        weight[::CHUNK] = weights
        x = np.ones(count)
        one = job(spec(LossKind.L1), x, 0 * x, DataType.FLOAT64, weight=weight, weight_type=DataType.FLOAT64)
        (got,) = totals(worker, one)
        assert got.partials == got.weight_partials == reference.exact_partials(weights)
        assert answers(worker, one)[0].weight_sum == reference.exact_sum(weights)
        return got

    assert total(1.0, 2.0**-90, 1e30, -1e30, 2.0**-53).partials == (1.0 + 2.0**-52, 2.0**-90 - 2.0**-53)
    assert total(1e308, 1e308, -1e308).partials == (1e308,)
    assert total(1e308, 1e308, 5e-324).partials == (INF,)
    assert len(total(*(10.0**exponent for exponent in range(300, -320, -17))).partials) > 30


REDUCED = (Reduction.MEAN, Reduction.SUM)


def test_samples_of_chunks_that_cancel_are_summed_exactly(worker: DeviceWorker) -> None:
    # In each sample one element of each chunk has a weight that is not 0: 1 + 2^-53 + 2^-90, with 1e30 in between.
    weights = np.zeros((3, 4 * CHUNK + 1))
    weights[:, ::CHUNK] = [
        [1.0, 1e30, -1e30, 2.0**-53, 2.0**-90],
        [2.0, 0.0, 0.0, 0.0, 2.0],
        [1e308, 1e308, 1, 2, -1e308],
    ]
    ones = np.ones_like(weights)
    specs = [spec(LossKind.L1, reduction=reduction) for reduction in (Reduction.SAMPLE_SUM, Reduction.SAMPLE_MEAN)]
    sums, means = answers(
        worker, job(specs, ones, 0 * ones, DataType.FLOAT64, weight=weights, weight_type=DataType.FLOAT64)
    )
    np.testing.assert_array_equal(sums.loss, [1.0 + 2.0**-52, 4.0, 1e308])
    np.testing.assert_allclose(means.loss, [1.0, 1.0, 1.0], rtol=2.0**-52)


def test_the_least_loss_of_float64_is_the_least_of_its_elements(worker: DeviceWorker) -> None:
    random = np.random.default_rng(24)
    x, y = random.normal(size=(2, 2 * CHUNK))
    for kind in KINDS:
        one = job(spec(kind, 0.3, Reduction.NONE), x, y, DataType.FLOAT64, weight=random.normal(size=len(x)))
        (total,), (elements,) = totals(worker, one), answers(worker, one)
        assert (total.minimum, total.maximum) == (np.min(elements.loss), np.max(elements.loss))


@dataclass(frozen=True)
class Cut:
    """A tensor that is cut between chunks, and how it is made."""

    seed: int
    count: int
    edges: frozenset[int]  # in chunks
    kinds: tuple[LossKind, ...]
    parameter: float
    data_type: DataType
    spread: float  # of the magnitudes of the differences
    special: float | None  # NaN or infinity among the elements
    weight_type: DataType | None
    decades: float  # the range of the chunks' weights
    unmasked: float | None  # how much of the elements

    def jobs(self) -> tuple[Job, list[Job]]:
        """Return a job for the whole, and one for each part."""
        random = np.random.default_rng(self.seed)
        count, data_type = self.count, self.data_type
        x, y = random.normal(size=(2, count)) * np.exp(random.normal(scale=self.spread, size=count))
        if self.special is not None:
            x[random.integers(0, count, 2)] = self.special
        options: dict[str, Any] = {}
        if self.weight_type is not None:
            # Each chunk in a range of its own, so that sums are of chunks that are far apart.
            exponents = np.repeat(random.uniform(-self.decades, self.decades, size=count // CHUNK + 1), CHUNK)[:count]
            options["weight"] = random.uniform(-1, 2, size=count) * 10.0**exponents
        if self.unmasked is not None:
            options["mask"] = random.random(count) < self.unmasked
        specs = [spec(kind, self.parameter, reduction, gradient=False) for kind in self.kinds for reduction in REDUCED]

        def part(start: int, stop: int) -> Job:
            own = {name: values[start:stop] for name, values in options.items()}
            return job(specs, x[start:stop], y[start:stop], data_type, weight_type=self.weight_type or data_type, **own)

        edges = [0, *sorted(CHUNK * edge for edge in self.edges if CHUNK * edge < count), count]
        return part(0, count), [part(start, stop) for start, stop in itertools.pairwise(edges)]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    chunks = draw(st.integers(1, 5))
    weight_type = draw(st.none() | st.sampled_from(FLOATS))
    decades = {DataType.FLOAT64: 280.0, DataType.FLOAT16: 4.0}.get(weight_type or DataType.FLOAT32, 30.0)
    return Cut(
        seed=draw(st.integers(0, 2**32)),
        count=chunks * CHUNK - draw(st.sampled_from([0, 1, 17, 4000, 4095])),
        edges=frozenset(draw(st.sets(st.integers(0, chunks), max_size=4))),
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))),
        parameter=draw(st.sampled_from([0.11, 1.0, 1e30])),
        data_type=draw(st.sampled_from(FLOATS)),
        spread=draw(st.sampled_from([0.0, 3.0])),
        special=draw(st.sampled_from([None, None, None, NAN, INF])),
        weight_type=weight_type,
        decades=draw(st.sampled_from([0.0, decades])),
        unmasked=draw(st.sampled_from([None, 0.0, 0.5, 0.99])),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cut=cuts(), data=st.data())
def test_parts_of_a_tensor_add_up_to_the_bits_of_the_whole(worker: DeviceWorker, cut: Cut, data: st.DataObject) -> None:
    whole, parts = cut.jobs()
    order = data.draw(st.permutations(range(len(parts))))
    of_parts = [totals(worker, part) for part in parts]
    expected, of_whole = answers(worker, whole), totals(worker, whole)
    for index, own in enumerate(whole.plan.specs):
        total = reference.merged([of_parts[place][index] for place in order])
        for name in ("minimum", "maximum"):
            assert packed(getattr(total, name)) == packed(getattr(of_whole[index], name))
        for name in ("partials", "weight_partials"):
            assert packed(*getattr(total, name)) == packed(*getattr(of_whole[index], name))
        weights = rounded(total.weight_partials)
        assert packed(weights) == packed(expected[index].weight_sum)
        loss = quotient(total.partials, weights) if own.reduction.is_mean else rounded(total.partials)
        assert packed(float(expected[index].loss)) == packed(loss)


def test_a_gradient_that_is_divided_by_the_whole_one_s_count_is_the_whole_one_s(worker: DeviceWorker) -> None:
    random = np.random.default_rng(23)
    x, y = random.normal(size=(2, 3 * CHUNK))
    whole = answers(worker, job(spec(parameter=0.3), x, y))[0]
    parts: list[Any] = []
    for part in (slice(0, CHUNK), slice(CHUNK, 3 * CHUNK)):
        own = job(replace(spec(parameter=0.3), denominator=float(len(x))), x[part], y[part])
        parts.append(answers(worker, with_totals(own))[0].input_gradient)
    assert whole.input_gradient is not None
    assert np.concatenate(parts).tobytes() == whole.input_gradient.tobytes()


def test_a_plan_that_wants_totals_says_so_in_its_header() -> None:
    one = job(spec(), [1.0], [0.0], weight=[2.0], mask=[True])
    assert one.plan != with_totals(one).plan
    for plan in (one.plan, with_totals(one).plan):
        assert unpack_header(plan.header) == plan
