"""Exact sums, in Python and in machine code, held against fractions: every exponent, cancellation, overflow, NaN."""

from __future__ import annotations

import ctypes
import math
import random as pseudorandom
import struct
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lossgrad_server.engine import cpu_exact
from lossgrad_server.engine.cpu_kernel import load_kernel
from lossgrad_server.engine.cpu_native import address_of
from lossgrad_server.engine.exact_sums import exact_sum, quotient, rounded
from lossgrad_server.work import MAX_PARTIALS, SPEC_TOTAL, SpecTotal, unpack_totals
from tests import reference

NAN, INF, LARGEST, SMALLEST = math.nan, math.inf, sys.float_info.max, 5e-324


def packed(partials: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(partials)}d", *partials)


def compiled_sum(values: Sequence[float], most: int = MAX_PARTIALS) -> tuple[float, ...]:
    """Return what the CPU's machine code makes of a sum."""
    load_kernel()
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 5)(address_of(cpu_exact.exact_sum))
    source, out = np.array(values, np.float64), np.full(most, NAN)
    words = np.full(cpu_exact.EXACT_SUM_BYTES, 0xA5, np.uint8)
    count = function(source.ctypes.data, len(source), words.ctypes.data, out.ctypes.data, most)
    return tuple(out[:count].tolist())


Sum = Callable[[Sequence[float]], tuple[float, ...]]
both = pytest.mark.parametrize("add", [exact_sum, compiled_sum])


def terms() -> st.SearchStrategy[list[float]]:
    """Return floats of every size, often with their negatives, so that much cancels."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    powers = st.builds(math.ldexp, st.sampled_from([1.0, -1.0, 1 + 2**-52]), st.integers(-1074, 1023))
    some = st.lists(finite | powers, max_size=60)
    return st.builds(lambda own, more: own + [-x for x in own[: len(own) // 2]] + more, some, some)


@both
@given(values=terms(), random=st.randoms(use_true_random=False))
def test_a_sum_is_exact_in_any_order(add: Sum, values: list[float], random: pseudorandom.Random) -> None:
    expected = reference.exact_partials(values)
    assert packed(add(values)) == packed(expected)
    shuffled = random.sample(values, len(values))
    assert packed(add(shuffled)) == packed(expected)
    # Parts that are summed first.
    middle = len(values) // 2
    parts = [add(shuffled[:middle]), add(shuffled[middle:])]
    if all(map(math.isfinite, parts[0] + parts[1])):
        assert packed(add(parts[0] + parts[1])) == packed(expected)
    assert rounded(expected) == reference.exact_sum(values)
    assert len(expected) <= MAX_PARTIALS


@both
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
def test_sums_by_hand(add: Sum, values: list[float], expected: tuple[float, ...]) -> None:
    assert packed(add(values)) == packed(expected)


@both
def test_a_sum_of_every_exponent_has_as_many_numbers_as_there_is_room_for(add: Sum) -> None:
    # A bit at every 54th place: each of the numbers has no other bits.
    values = [math.ldexp(1.0, exponent) for exponent in range(1023, -1075, -54)]
    assert add(values) == tuple(values)
    all_bits = [math.ldexp(1.0, exponent) for exponent in range(1022, -1075, -2)]
    partials = add(all_bits)
    assert packed(partials) == packed(reference.exact_partials(all_bits))
    assert len(partials) <= MAX_PARTIALS


def test_a_record_holds_what_was_packed() -> None:
    partials = exact_sum([math.ldexp(1.0, exponent) for exponent in range(1022, -1075, -2)])
    total = SpecTotal(-1.0, INF, partials, (NAN,))
    record = total.pack()
    assert len(record) == SPEC_TOTAL.size
    first, second = unpack_totals(record + SpecTotal(INF, -INF, (), ()).pack())
    assert (first.minimum, first.maximum, first.partials) == (-1.0, INF, partials)
    assert math.isnan(first.weight_partials[0])
    assert second == SpecTotal(INF, -INF, (), ())


@pytest.mark.parametrize("most", [1, 2])
@given(values=terms())
def test_the_first_numbers_of_a_sum_can_be_had_alone(most: int, values: list[float]) -> None:
    assert packed(compiled_sum(values, most)) == packed(exact_sum(values)[:most])


@given(terms(), st.floats(min_value=2.0**-200, max_value=2.0**200), st.booleans())
@example([1.0, 2.0**-53], 3.0, True)
def test_a_quotient_is_within_a_rounding_of_the_exact_one(
    values: list[float], divisor: float, is_negative: bool
) -> None:
    divisor = -divisor if is_negative else divisor
    partials = exact_sum(values)
    exact = sum(map(Fraction, values), Fraction()) / Fraction(divisor)
    if all(map(math.isfinite, partials)) and 2.0**-900 < abs(exact) < 2.0**1000:
        got = quotient(partials, divisor)
        assert abs(Fraction(got) - exact) <= Fraction(math.ulp(got)) * Fraction(1, 2) * (1 + Fraction(2.0**-40))


@pytest.mark.parametrize(
    ("partials", "divisor", "expected"),
    [
        ((), 0.0, NAN),
        ((), 3.0, 0.0),
        ((1.0,), 0.0, INF),
        ((-1.0,), 0.0, -INF),
        ((1.0,), -0.0, -INF),
        ((1.0,), INF, 0.0),
        ((INF,), 2.0, INF),
        ((INF,), -INF, NAN),
        ((NAN,), 2.0, NAN),
        ((1.0,), NAN, NAN),
        ((LARGEST,), 0.5, INF),
        ((SMALLEST,), 2.0, 0.0),
    ],
)
def test_quotients_of_what_is_not_finite(partials: tuple[float, ...], divisor: float, expected: float) -> None:
    assert packed((quotient(partials, divisor),)) == packed((expected,))
