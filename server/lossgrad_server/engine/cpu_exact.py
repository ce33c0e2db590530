"""Exact sums of float64 numbers, in machine code: what exact_sums.py does in Python, to the same bits.

A sum is a whole number of 2^-1074, the smallest float64, and every float64 is one. So numbers are added as whole numbers
of 67 words of 32 bits, the lowest first, each in an int64 that has room for 2^30 additions before anything is carried.
Source: Neal, Fast exact summation using small and large superaccumulators, 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, uint64

from lossgrad_server.engine.cpu_intrinsics import array_at, bits_of_float64, float64_of_bits
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_sums import divided, two_sum

# The words of a sum, behind two that are always 0, so that there are always two below the highest one that is not.
_FIRST = 2
_WORDS = _FIRST + 67
# The bytes that an exact sum takes while it is computed, the two numbers of `nearest_sum` behind it.
EXACT_SUM_BYTES = 8 * (_WORDS + 2)
_WORD = 0xFFFFFFFF
_INFINITE_EXPONENT = 0x7FF


@inlined
def _add(words: Any, value: Any) -> None:
    """Add a finite float64."""
    bits = int64(bits_of_float64(value))
    exponent = (bits >> 52) & _INFINITE_EXPONENT
    significand = bits & 0xFFFFFFFFFFFFF
    position = int64(0)
    if exponent > 0:
        significand |= int64(1) << 52
        position = exponent - 1
    place = _FIRST + (position >> 5)
    shift = position & 31
    low = (significand & _WORD) << shift
    high = (significand >> 32) << shift
    sign = int64(-1) if bits < 0 else int64(1)
    words[place] += sign * (low & _WORD)
    words[place + 1] += sign * ((low >> 32) + (high & _WORD))
    words[place + 2] += sign * (high >> 32)


@inlined
def _carry(words: Any) -> None:
    """Bring every word but the highest to 32 bits of at least 0; the highest has the sign."""
    carried = int64(0)
    for place in range(_WORDS - 1):
        total = words[place] + carried
        words[place] = total & _WORD
        carried = total >> 32
    words[_WORDS - 1] += carried


@inlined
def _make_positive(words: Any) -> Any:
    """Bring every word to 32 bits of at least 0; return the sign that the sum had."""
    _carry(words)
    if words[_WORDS - 1] >= 0:
        return 1.0
    for place in range(_WORDS):
        words[place] = -words[place]
    _carry(words)
    return -1.0


@inlined
def _nearest(words: Any) -> Any:
    """Return the float64 nearest to a sum of at least 0, ties to even; infinite beyond float64."""
    top = _WORDS - 1
    while top > _FIRST and words[top] == 0:
        top -= 1
    length = int64(0)
    while words[top] >> length != 0:
        length += 1
    # The highest 64 bits of the sum, and whether there is anything below them.
    shift = uint64(32 - length)
    next_word = uint64(words[top - 2])
    highest = uint64((uint64(words[top]) << uint64(32)) | uint64(words[top - 1])) << shift
    highest |= next_word >> uint64(uint64(32) - shift)
    rest = uint64(next_word << shift) & uint64(_WORD)
    for place in range(top - 2):
        rest |= uint64(words[place])
    significand = int64(highest >> uint64(11))
    position = 32 * (top - _FIRST) + length - 53  # of the significand's last bit
    if position <= 0:
        return float64_of_bits(uint64(significand >> -position))
    lost = int64(highest & uint64(0x7FF))
    if lost > 0x400 or (lost == 0x400 and (rest != uint64(0) or significand & 1)):
        significand += 1
    # With the significand's highest bit, which a float64 does not have, its exponent is one more.
    bits = min((position << 52) + significand, int64(_INFINITE_EXPONENT) << 52)
    return float64_of_bits(uint64(bits))


@native("int64(int64, int64, int64, int64, int64)")
def exact_sum(values: int, count: int, words: int, sums: int, most: int) -> int:
    """Write the sum of `count` float64 values as work.SpecTotal has it, `most` numbers of it at most. Returns how many.

    `values`, `words` and `sums` are addresses; at `words` are EXACT_SUM_BYTES to work with.
    """
    terms = array_at(values, count, np.float64)
    own = array_at(words, _WORDS, np.int64)
    out = array_at(sums, most, np.float64)
    for place in range(_WORDS):
        own[place] = 0
    special = 0.0
    for index in range(count):
        if np.isfinite(terms[index]):
            _add(own, terms[index])
        else:
            special += terms[index]
    if special != 0.0:  # NaN, too
        out[0] = np.nan if np.isnan(special) else special
        return 1
    sign = 1.0
    for number in range(most):
        sign *= _make_positive(own)
        nearest = _nearest(own)
        if nearest == 0.0:
            return number
        out[number] = sign * nearest
        if np.isinf(nearest):
            return 1
        _add(own, -nearest)
    return most


@inlined
def nearest_sum(address: Any, count: Any, words: Any) -> Any:
    """Return the first two numbers of an exact sum: the nearest one, and the nearest of what is left; as `exact_sum`."""
    terms = array_at(address, count, np.float64)
    total = 0.0
    lost = 0.0
    inexact = 0.0
    for index in range(count):
        total, error = two_sum(total, terms[index])
        lost, error = two_sum(lost, error)
        inexact += abs(error)
    # Nearly always two numbers hold the sum. NaN, as after an infinity or an overflow, is not 0.
    if inexact == 0.0:
        return two_sum(total, lost)
    found = words + 8 * _WORDS
    nearest = array_at(found, 2, np.float64)
    nearest[0] = 0.0
    nearest[1] = 0.0
    exact_sum(address, count, words, found, 2)
    return nearest[0], nearest[1]


@inlined
def quotient(total: Any, rest: Any, divisor: Any) -> Any:
    """Return a sum, with what its rounding left, over a divisor, rounded about once. NaN is always the same one."""
    # The sum itself is the nearest already: adding the rest again would round a tie the other way.
    result = total if divisor == 1.0 else divided(total, rest, divisor)
    return np.nan if np.isnan(result) else result


@native("float64(int64, int64, float64, int64)")
def exact_quotient(values: int, count: int, divisor: float, words: int) -> float:
    """Return the exact sum of float64 values over a divisor; `values` and `words` as for `exact_sum`."""
    total, rest = nearest_sum(values, count, words)
    return quotient(total, rest, divisor)
