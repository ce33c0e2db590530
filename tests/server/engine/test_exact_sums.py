"""Exact sums in Python, held against sums of fractions: every exponent, cancellation, overflow, NaN and infinity."""

from __future__ import annotations

import math
import random as pseudorandom
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_server.engine.exact_sums import exact_sum, rounded
from lossgrad_server.work import MAX_PARTIALS, SPEC_TOTAL, SpecTotal, unpack_totals
from tests import reference

NAN, INF, LARGEST, SMALLEST = math.nan, math.inf, sys.float_info.max, 5e-324


def packed(partials: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(partials)}d", *partials)


def terms() -> st.SearchStrategy[list[float]]:
    """Return floats of every size, often with their negatives, so that much cancels."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    powers = st.builds(math.ldexp, st.sampled_from([1.0, -1.0, 1 + 2**-52]), st.integers(-1074, 1023))
    some = st.lists(finite | powers, max_size=60)
    return st.builds(lambda own, more: own + [-x for x in own[: len(own) // 2]] + more, some, some)


@given(terms(), st.randoms(use_true_random=False))
def test_a_sum_is_exact_in_any_order(values: list[float], random: pseudorandom.Random) -> None:
    expected = reference.exact_partials(values)
    assert packed(exact_sum(values)) == packed(expected)
    shuffled = random.sample(values, len(values))
    assert packed(exact_sum(shuffled)) == packed(expected)
    # Parts that are summed first.
    middle = len(values) // 2
    parts = [exact_sum(shuffled[:middle]), exact_sum(shuffled[middle:])]
    if all(map(math.isfinite, parts[0] + parts[1])):
        assert packed(exact_sum(parts[0] + parts[1])) == packed(expected)
    assert rounded(expected) == reference.exact_sum(values)
    assert len(expected) <= MAX_PARTIALS


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ()),
        ([0.0, -0.0], ()),
        ([1.0, -1.0], ()),
        ([1.0, 2.0**-53, SMALLEST], (1.0 + 2.0**-52, -(2.0**-53), SMALLEST)),
        ([LARGEST, LARGEST, -LARGEST], (LARGEST,)),
        ([LARGEST, LARGEST, -LARGEST, 1.0], (LARGEST, 1.0)),
        ([LARGEST, LARGEST], (INF,)),
        ([-LARGEST, -LARGEST, 1.0], (-INF,)),
        ([LARGEST, 2.0**969], (LARGEST, 2.0**969)),
        ([LARGEST, 2.0**970], (INF,)),  # half a unit of the last place: to even
        ([INF, LARGEST, -LARGEST], (INF,)),
        ([1.0, -INF], (-INF,)),
        ([INF, -INF], (NAN,)),
        ([NAN, INF, 1.0], (NAN,)),
        ([-NAN], (NAN,)),
        ([SMALLEST] * 3, (3 * SMALLEST,)),
    ],
)
def test_sums_by_hand(values: list[float], expected: tuple[float, ...]) -> None:
    assert packed(exact_sum(values)) == packed(expected)


def test_a_sum_of_every_exponent_has_as_many_numbers_as_there_is_room_for() -> None:
    # A bit at every 53rd place, and one more: each of the numbers has no other bits.
    values = [math.ldexp(1.0, exponent) for exponent in range(1023, -1075, -54)]
    assert exact_sum(values) == tuple(values)
    all_bits = [math.ldexp(1.0, exponent) for exponent in range(1022, -1075, -2)]
    partials = exact_sum(all_bits)
    assert packed(partials) == packed(reference.exact_partials(all_bits))
    assert len(partials) <= MAX_PARTIALS
    total = SpecTotal(-1.0, INF, partials, (NAN,))
    record = total.pack()
    assert len(record) == SPEC_TOTAL.size
    first, second = unpack_totals(record + SpecTotal(INF, -INF, (), ()).pack())
    assert (first.minimum, first.maximum, first.partials) == (-1.0, INF, partials)
    assert math.isnan(first.weight_partials[0])
    assert second == SpecTotal(INF, -INF, (), ())
