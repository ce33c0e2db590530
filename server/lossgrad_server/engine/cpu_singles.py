"""A block of float32 differences: to its losses and gradients, added in float64 to the lanes of its sums.

These are the loops that must be fast. The formula is that of cpu_formulas.py, in one of two forms with the same sums to
the last bit. `_add_magnitudes` needs the fewest instructions: losses do not depend on a difference's sign, and a gradient
is computed in float32, with a factor of twice float32's bits. `_add_signed` computes all in float64, for factors of any
size and gradients of any type. Operands are float32, float16 or bfloat16 where they lie, or differences in scratch memory.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import float32, uint32

from lossgrad_server.engine.cpu_formulas import NEAR
from lossgrad_server.engine.cpu_halves import (
    load_bfloat16x8,
    load_float16x8,
    store_as_bfloat16x8,
    store_as_float16x8,
    store_scaled_bfloat16x8,
    store_scaled_float16x8,
)
from lossgrad_server.engine.cpu_intrinsics import LOOP_SIGNATURE, array_at, bits_of_float32, float32_of_bits
from lossgrad_server.engine.cpu_layout import LANES, SPEC, TOGETHER, Loop
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_vectors import (
    STREAM_ALIGNMENT,
    WIDTH,
    absolute,
    absolute_float32x8,
    add,
    as_float32x8,
    as_float64x8,
    clamped,
    fused,
    least,
    load_float32x8,
    load_float64x8,
    multiply,
    scaled_float32x8,
    splat,
    splat_float32,
    store_float32x8,
    store_float64x8,
    stream_float32x8,
    subtract_float32x8,
)

# Where differences come from: from scratch memory, or from two operands of a type. And what gradients are written as.
_DIFFERENCES, _FLOAT32, _FLOAT16, _BFLOAT16 = range(4)
_NONE, _AS_FLOAT32, _AS_FLOAT16, _AS_BFLOAT16, _AS_FLOAT64 = range(5)
_SOURCE_BYTES: Final = (4, 4, 2, 2)
_GRADIENT_BYTES: Final = (0, 4, 2, 2, 8)

_VECTOR: Final = 8 * WIDTH  # bytes
_TAIL: Final = 4 * LANES  # bytes
# Between these, a factor's two halves are normal float32 numbers.
_LEAST_FACTOR: Final = 2.0**-100
_MOST_FACTOR: Final = 2.0**100


@inlined
def _difference(source: Any, first: Any, second: Any, place: Any) -> Any:
    """Return eight differences, from `place` on, as float32."""
    if source == _DIFFERENCES:
        return load_float32x8(first + 4 * place)
    if source == _FLOAT32:
        return subtract_float32x8(load_float32x8(first + 4 * place), load_float32x8(second + 4 * place))
    if source == _FLOAT16:
        return subtract_float32x8(load_float16x8(first + 2 * place), load_float16x8(second + 2 * place))
    return subtract_float32x8(load_bfloat16x8(first + 2 * place), load_bfloat16x8(second + 2 * place))


@inlined
def _add_magnitudes(total: Any, place: Any, addresses: Any, vectors: Any, flags: Any) -> Any:
    """Compute eight elements, write their gradients and losses and return `total` plus their losses."""
    source, gradient, has_loss, streams = flags
    first, second, gradients, losses = addresses
    limit, minus_half, inverse_divisor, high, low, edge = vectors
    d = _difference(source, first, second, place)
    magnitude = absolute_float32x8(d)
    wide = as_float64x8(magnitude)
    p = least(wide, limit)
    if gradient == _AS_FLOAT16:
        store_scaled_float16x8(gradients + 2 * place, d, magnitude, high, low, edge)
    elif gradient == _AS_BFLOAT16:
        store_scaled_bfloat16x8(gradients + 2 * place, d, magnitude, high, low, edge)
    elif gradient == _AS_FLOAT32:
        value = scaled_float32x8(d, magnitude, high, low, edge)
        if streams:
            stream_float32x8(gradients + 4 * place, value)
        else:
            store_float32x8(gradients + 4 * place, value)
    rest = fused(minus_half, p, wide)
    if has_loss:
        store_float32x8(losses + 4 * place, as_float32x8(multiply(multiply(p, rest), inverse_divisor)))
    return fused(p, rest, total)


@inlined
def _add_signed(total: Any, place: Any, addresses: Any, vectors: Any, flags: Any) -> Any:
    """Compute eight elements, write their gradients and losses and return `total` plus their losses."""
    source, gradient, has_loss, streams = flags
    first, second, gradients, losses = addresses
    limit, minus_limit, minus_half, factor, inverse_divisor = vectors
    d = as_float64x8(_difference(source, first, second, place))
    p = clamped(d, limit, minus_limit)
    if gradient == _AS_FLOAT64:
        store_float64x8(gradients + 8 * place, multiply(p, factor))
    elif gradient == _AS_FLOAT16:
        store_as_float16x8(gradients + 2 * place, multiply(p, factor))
    elif gradient == _AS_BFLOAT16:
        store_as_bfloat16x8(gradients + 2 * place, multiply(p, factor))
    elif gradient == _AS_FLOAT32:
        if streams:
            stream_float32x8(gradients + 4 * place, as_float32x8(multiply(p, factor)))
        else:
            store_float32x8(gradients + 4 * place, as_float32x8(multiply(p, factor)))
    rest = fused(minus_half, p, d)
    if has_loss:
        # The absolute value, because the loss of -0.0 would be -0.0.
        store_float32x8(losses + 4 * place, as_float32x8(multiply(absolute(multiply(p, rest)), inverse_divisor)))
    return fused(p, rest, total)


@inlined
def _to_odd(value: Any) -> Any:
    """Return a float64 of at least 0 as float32, rounded to odd: the last bit is set if that is not exact."""
    nearest = float32(value)
    bits = bits_of_float32(nearest)
    if nearest > value:
        bits = uint32(bits - uint32(1))
    if nearest != value:
        bits = uint32(bits | uint32(1))
    return float32_of_bits(bits)


@inlined
def _load_lanes(lanes: Any) -> Any:
    return (
        load_float64x8(lanes),
        load_float64x8(lanes + _VECTOR),
        load_float64x8(lanes + 2 * _VECTOR),
        load_float64x8(lanes + 3 * _VECTOR),
    )


@inlined
def _store_lanes(lanes: Any, sums: Any) -> None:
    sum0, sum1, sum2, sum3 = sums
    store_float64x8(lanes, sum0)
    store_float64x8(lanes + _VECTOR, sum1)
    store_float64x8(lanes + 2 * _VECTOR, sum2)
    store_float64x8(lanes + 3 * _VECTOR, sum3)


@inlined
def _copy(source: Any, target: Any, byte_count: Any) -> None:
    read = array_at(source, byte_count, np.uint8)
    written = array_at(target, byte_count, np.uint8)
    for index in range(byte_count):
        written[index] = read[index]


@inlined
def _copy_tail(source: Any, target: Any, byte_count: Any) -> None:
    """Copy less than a row of lanes, and fill the row up with 0, which adds nothing to any sum."""
    _copy(source, target, byte_count)
    rest = array_at(target + byte_count, _TAIL - byte_count, np.uint8)
    for index in range(_TAIL - byte_count):
        rest[index] = 0


def _loop(name: str, source: int, *, gradient: int = _NONE, has_loss: bool = False, streams: bool = False) -> Any:
    """Make a loop. It writes losses as float32. `streams`: gradients go past the caches, where they lie as that needs it.

    What is less than a row of lanes at the end it moves to a row in scratch memory, where it needs 256 bytes at `lost`.
    """
    has_gradient = gradient != _NONE
    in_float32 = gradient != _AS_FLOAT64
    rounds_to_odd = gradient in (_AS_FLOAT16, _AS_BFLOAT16)
    source_bytes, gradient_bytes = _SOURCE_BYTES[source], _GRADIENT_BYTES[gradient]
    moves_gradient = gradient not in (_NONE, _AS_FLOAT64)

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, second: int, _weights: int, _scales: int, gradients: int, losses: int, lanes: int,
             lost: int, record: int, factor: float, _edge: float) -> int:  # fmt: skip
        spec = array_at(record, 1, SPEC)[0]
        limit = spec.limit
        high = float32(factor)
        edge = _to_odd(limit * factor) if rounds_to_odd else float32(limit * factor)
        magnitude_vectors = (
            splat(limit), splat(-0.5), splat(spec.inverse_divisor),
            splat_float32(high), splat_float32(float32(factor - high)), splat_float32(edge),
        )  # fmt: skip
        vectors = (splat(limit), splat(-limit), splat(-0.5), splat(factor), splat(spec.inverse_divisor))
        sum0, sum1, sum2, sum3 = _load_lanes(lanes)
        addresses = (first, second, gradients, losses)
        is_narrow = in_float32 and (not has_gradient or _LEAST_FACTOR < factor < _MOST_FACTOR)
        is_streaming = streams and gradients % STREAM_ALIGNMENT == 0
        flags = (source, gradient, has_loss, is_streaming)
        rows = count // LANES * LANES
        end = rows
        for part in range(2):
            if is_narrow:
                for i in range(0, end, LANES):
                    sum0 = _add_magnitudes(sum0, i, addresses, magnitude_vectors, flags)
                    sum1 = _add_magnitudes(sum1, i + WIDTH, addresses, magnitude_vectors, flags)
                    sum2 = _add_magnitudes(sum2, i + 2 * WIDTH, addresses, magnitude_vectors, flags)
                    sum3 = _add_magnitudes(sum3, i + 3 * WIDTH, addresses, magnitude_vectors, flags)
            else:
                for i in range(0, end, LANES):
                    sum0 = _add_signed(sum0, i, addresses, vectors, flags)
                    sum1 = _add_signed(sum1, i + WIDTH, addresses, vectors, flags)
                    sum2 = _add_signed(sum2, i + 2 * WIDTH, addresses, vectors, flags)
                    sum3 = _add_signed(sum3, i + 3 * WIDTH, addresses, vectors, flags)
            if part == 1 or rows == count:
                break
            # Gradients and losses of the tail take the places of the operands that they are made of.
            _copy_tail(first + rows * source_bytes, lost, (count - rows) * source_bytes)
            if source != _DIFFERENCES:
                _copy_tail(second + rows * source_bytes, lost + _TAIL, (count - rows) * source_bytes)
            addresses = (lost, lost + _TAIL, lost if moves_gradient else gradients + 8 * rows, lost + _TAIL)
            end = LANES
        _store_lanes(lanes, (sum0, sum1, sum2, sum3))
        if moves_gradient:
            _copy(lost, gradients + rows * gradient_bytes, (count - rows) * gradient_bytes)
        if has_loss:
            _copy(lost + _TAIL, losses + 4 * rows, 4 * (count - rows))
        return 0

    return loop


@inlined
def _scaled_lanes(sums: Any, scale: Any) -> Any:
    sum0, sum1, sum2, sum3 = sums
    factor = splat(scale)
    return multiply(sum0, factor), multiply(sum1, factor), multiply(sum2, factor), multiply(sum3, factor)


@inlined
def _add_four(sums: Any, place: Any, first: Any, second: Any, vectors: Any, source: Any, has_second: Any) -> Any:
    """Return four sums plus eight elements' losses: |d|, d * d, and two clamped ones, of which the second is optional."""
    absolutes, squares, ones, others = sums
    limit, other_limit, minus_half = vectors
    d = as_float64x8(absolute_float32x8(_difference(source, first, second, place)))
    p = least(d, limit)
    ones = fused(p, fused(minus_half, p, d), ones)
    if has_second:
        q = least(d, other_limit)
        others = fused(q, fused(minus_half, q, d), others)
    return add(absolutes, d), fused(d, d, squares), ones, others


def _together_loop(name: str, source: int) -> Any:
    """Make a loop for the losses of up to four specs without gradients: an L1, an MSE and two others.

    `first`, `second` and `lost` as in `_loop`; at `lanes` are the addresses of the four specs' lanes, and `record` is a
    TOGETHER record. Which lanes a spec's losses go to and what is added is what its own loop would do: those
    of L1, whose limit is NEAR, are NEAR times as large, and those of MSE half as large.
    """
    source_bytes = _SOURCE_BYTES[source]

    @native(LOOP_SIGNATURE, name)
    def loop(count: int, first: int, second: int, _weights: int, _scales: int, _gradients: int, _losses: int,
             lanes: int, lost: int, record: int, _factor: float, _edge: float) -> int:  # fmt: skip
        places = array_at(lanes, 4, np.int64)
        absolutes, squares, ones, others = places[0], places[1], places[2], places[3]
        limits = array_at(record, 1, TOGETHER)[0].limits
        vectors = (splat(limits[0]), splat(limits[1]), splat(-0.5))
        has_second = limits[1] > 0.0
        a0, a1, a2, a3 = _scaled_lanes(_load_lanes(absolutes), 1.0 / NEAR)
        b0, b1, b2, b3 = _scaled_lanes(_load_lanes(squares), 2.0)
        c0, c1, c2, c3 = _load_lanes(ones)
        e0, e1, e2, e3 = _load_lanes(others)
        own, other = first, second
        rows = count // LANES * LANES
        end = rows
        for part in range(2):
            for i in range(0, end, LANES):
                a0, b0, c0, e0 = _add_four((a0, b0, c0, e0), i, own, other, vectors, source, has_second)
                a1, b1, c1, e1 = _add_four((a1, b1, c1, e1), i + WIDTH, own, other, vectors, source, has_second)
                a2, b2, c2, e2 = _add_four((a2, b2, c2, e2), i + 2 * WIDTH, own, other, vectors, source, has_second)
                a3, b3, c3, e3 = _add_four((a3, b3, c3, e3), i + 3 * WIDTH, own, other, vectors, source, has_second)
            if part == 1 or rows == count:
                break
            _copy_tail(first + rows * source_bytes, lost, (count - rows) * source_bytes)
            if source != _DIFFERENCES:
                _copy_tail(second + rows * source_bytes, lost + _TAIL, (count - rows) * source_bytes)
            own, other, end = lost, lost + _TAIL, LANES
        _store_lanes(absolutes, _scaled_lanes((a0, a1, a2, a3), NEAR))
        _store_lanes(squares, _scaled_lanes((b0, b1, b2, b3), 0.5))
        _store_lanes(ones, (c0, c1, c2, c3))
        _store_lanes(others, (e0, e1, e2, e3))
        return 0

    return loop


# By their names in cpu_layout.Loop.
SINGLES = {
    Loop.PAIR: _loop("pair", _FLOAT32),
    Loop.PAIR_GRADIENT: _loop("pair_gradient", _FLOAT32, gradient=_AS_FLOAT32),
    Loop.PAIR_LOSS: _loop("pair_loss", _FLOAT32, has_loss=True),
    Loop.PAIR_LOSS_GRADIENT: _loop("pair_loss_gradient", _FLOAT32, gradient=_AS_FLOAT32, has_loss=True),
    Loop.PAIR_STREAMED_GRADIENT: _loop("pair_streamed_gradient", _FLOAT32, gradient=_AS_FLOAT32, streams=True),
    Loop.FLOAT16: _loop("float16", _FLOAT16),
    Loop.FLOAT16_GRADIENT: _loop("float16_gradient", _FLOAT16, gradient=_AS_FLOAT16),
    Loop.BFLOAT16: _loop("bfloat16", _BFLOAT16),
    Loop.BFLOAT16_GRADIENT: _loop("bfloat16_gradient", _BFLOAT16, gradient=_AS_BFLOAT16),
    Loop.PLAIN: _loop("plain", _DIFFERENCES),
    Loop.PLAIN_GRADIENT: _loop("plain_gradient", _DIFFERENCES, gradient=_AS_FLOAT32),
    Loop.PLAIN_STREAMED_GRADIENT: _loop("plain_streamed_gradient", _DIFFERENCES, gradient=_AS_FLOAT32, streams=True),
    Loop.PLAIN_WIDE_GRADIENT: _loop("plain_wide_gradient", _DIFFERENCES, gradient=_AS_FLOAT64),
    Loop.PAIR_TOGETHER: _together_loop("pair_together", _FLOAT32),
    Loop.TOGETHER: _together_loop("together", _DIFFERENCES),
}
