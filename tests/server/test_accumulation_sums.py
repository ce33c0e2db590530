"""Exact sums: equal to rational arithmetic and to math.fsum, and the same to the bit in any order."""

from __future__ import annotations

import math
import struct
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lossgrad_api.exact_sums import MAX_PARTIALS, ExactSum

LARGEST = sys.float_info.max
SMALLEST = 5e-324

finite = st.floats(allow_nan=False, allow_infinity=False)
anything = st.one_of(finite, st.sampled_from([math.inf, -math.inf, math.nan, LARGEST, -LARGEST, SMALLEST, -0.0]))


def packed(exact: ExactSum) -> bytes:
    return struct.pack(f"<{len(exact.partials)}d", *exact.partials)


def nearest(value: Fraction) -> float:
    try:
        return float(value)  # a Fraction becomes the nearest float, ties to even
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@given(st.lists(finite.filter(lambda value: abs(value) < 1e300), max_size=40))
def test_the_rounded_sum_is_that_of_fsum(values: list[float]) -> None:
    assert ExactSum(values).rounded == math.fsum(values)


@given(st.lists(finite, max_size=14))
@example([LARGEST, LARGEST, -LARGEST])
@example([LARGEST, 2.0**970])  # a tie between the largest float64 and infinity
@example([1.0, 2.0**-53])  # a tie: to even
@example([1.0 + 2.0**-52, 2.0**-53])
@example([1.0, 2.0**-53, SMALLEST])
@example([SMALLEST, SMALLEST, 1e308, -1e308])
def test_the_partials_are_the_nearest_float_of_what_is_left(values: list[float]) -> None:
    exact = ExactSum(values)
    rest = sum(map(Fraction, values), Fraction(0))
    assert exact.rounded == nearest(rest)
    for partial in exact.partials:
        expected = nearest(rest)
        assert partial == (math.copysign(LARGEST, expected) if math.isinf(expected) else expected)
        rest -= Fraction(partial)
    assert rest == 0
    assert len(exact.partials) <= MAX_PARTIALS


@given(st.data())
def test_any_order_and_any_tree_of_additions_gives_the_same_bytes(data: st.DataObject) -> None:
    values = data.draw(st.lists(anything, min_size=1, max_size=12))
    sums = [ExactSum([value]) for value in data.draw(st.permutations(values))]
    while len(sums) > 1:
        first = sums.pop(data.draw(st.integers(0, len(sums) - 1)))
        second = data.draw(st.integers(0, len(sums) - 1))
        sums[second] = sums[second] + first
    expected = ExactSum(values)
    assert sums[0] == expected
    assert packed(sums[0]) == packed(expected)
    assert packed(ExactSum(expected.partials)) == packed(expected)  # what is written is read back as the same


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([-0.0], 0.0),
        ([1e308, 1e308], math.inf),
        ([-1e308, -1e308], -math.inf),
        ([1.0, math.inf], math.inf),
        ([-math.inf, 1e308, 1e308], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, math.inf], math.nan),
    ],
)
def test_the_ends_of_the_range(values: list[float], expected: float) -> None:
    rounded = ExactSum(values).rounded
    assert struct.pack("<d", rounded) == struct.pack("<d", expected)  # one NaN, one zero


def test_a_sum_beyond_float64_comes_back_when_it_shrinks() -> None:
    huge = ExactSum([LARGEST] * 16)
    assert huge.rounded == math.inf
    assert huge.is_finite
    assert (huge + ExactSum([-LARGEST] * 15)).rounded == LARGEST
    beyond = huge + ExactSum([SMALLEST])
    assert beyond.partials == (math.inf,)
    assert not beyond.is_finite


def test_sums_are_values() -> None:
    first, second = ExactSum([0.1, 0.2]), ExactSum([0.2, 0.1])
    assert first == second
    assert hash(first) == hash(second)
    assert ExactSum([math.nan]) == ExactSum([math.inf, -math.inf])
    assert first != ExactSum([0.1])
    assert first != 0.3
    assert repr(ExactSum([1.5])) == "ExactSum([1.5])"


@given(
    st.lists(finite.filter(lambda value: 1e-100 < abs(value) < 1e100 or not value), min_size=1, max_size=8),
    st.floats(1e-100, 1e100),
)
@example([1.0 + 2.0**-52, 2.0**-53, -(2.0**-200)], 1.0)  # what is left rounds to half a unit of the first number
def test_a_quotient_is_rounded_about_once(values: list[float], divisor: float) -> None:
    exact = sum(map(Fraction, values), Fraction(0)) / Fraction(divisor)
    half_a_unit = Fraction(math.ulp(nearest(exact))) / 2
    assert abs(Fraction(ExactSum(values).quotient(divisor)) - exact) <= half_a_unit * (1 + Fraction(2) ** -40)


@pytest.mark.parametrize(
    ("values", "divisor", "expected"),
    [
        ([], 0.0, math.nan),
        ([1.0], 0.0, math.inf),
        ([-1.0], 0.0, -math.inf),
        ([1.0], -0.0, -math.inf),
        ([math.inf], 0.0, math.inf),
        ([math.nan], 0.0, math.nan),
        ([1.0], math.inf, 0.0),
        ([math.inf], math.inf, math.nan),
        ([1.0], math.nan, math.nan),
        ([LARGEST], SMALLEST, math.inf),
        ([LARGEST, LARGEST], 2.0, math.inf),  # a sum beyond float64 is infinite before it is divided, as in the engine
        ([SMALLEST], 2.0, 0.0),
    ],
)
def test_a_quotient_is_ieee_754s(values: list[float], divisor: float, expected: float) -> None:
    assert struct.pack("<d", ExactSum(values).quotient(divisor)) == struct.pack("<d", expected)
