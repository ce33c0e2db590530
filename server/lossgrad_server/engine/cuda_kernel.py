"""The CUDA kernels, in Triton: losses and gradients over many segments at once, and the sums of their chunks.

Imports triton, so it is imported only where it computes. With TRITON_INTERPRET=1 in the environment when it is first
imported, the kernels run on the CPU, in Triton's interpreter.

Bits. Everything is float64 but the difference of float32 and half operands, and every operation is one that IEEE 754
fixes: +, -, *, / and conversions, none contracted (launch with enable_fp_fusion=False). Sums are folds of a fixed length:
the second half added to the first until one is left. So a result depends on its segment alone, and not on the number of
warps, the compiler's choice of layout, the neighbours or the order in which programs run. The only atomic operations
are on integers.

A program computes one tile: a chunk of a row, block after block, each lane adding up its own elements in order; or,
where rows are no longer than a block, several rows beside each other. Lane i is then column i / rows of row i % rows:
the first folds add up columns, and the rows' sums are what is left when as many numbers as rows are.
"""

# Triton's language looks like Python's and is not: it has its own types, and its own conventions for compile-time values.
# mypy: ignore-errors
# ruff: noqa: N803, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from lossgrad_server.engine.cuda_elements import (
    block_count_of,
    elements_of,
    float64_at,
    load,
    offset_of,
    program_of,
    store,
    unmasked,
    weights_of,
)
from lossgrad_server.engine.cuda_fields import LossCode, SegmentField, SpecField, SpecFlag
from lossgrad_server.engine.cuda_folds import store_partials

# Whether the kernels run in Triton's interpreter.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Kernels can see globals only as constexpr.
_SMOOTH_L1 = tl.constexpr(int(LossCode.SMOOTH_L1))
_HUBER = tl.constexpr(int(LossCode.HUBER))
_L1 = tl.constexpr(int(LossCode.L1))
_MSE = tl.constexpr(int(LossCode.MSE))
_INPUT = tl.constexpr(int(SegmentField.INPUT))
_TARGET = tl.constexpr(int(SegmentField.TARGET))
_SPECS = tl.constexpr(int(SegmentField.SPECS))
_SPEC_COUNT = tl.constexpr(int(SegmentField.SPEC_COUNT))
_WEIGHT_PARTIALS = tl.constexpr(int(SegmentField.WEIGHT_PARTIALS))
_UNMASKED_COUNT = tl.constexpr(int(SegmentField.UNMASKED_COUNT))
_SPEC_FIELDS = tl.constexpr(len(SpecField))
_CODE = tl.constexpr(int(SpecField.CODE))
_SPEC_FLAGS = tl.constexpr(int(SpecField.FLAGS))
_PARAMETER = tl.constexpr(int(SpecField.PARAMETER))
_HALF_PARAMETER = tl.constexpr(int(SpecField.HALF_PARAMETER))
_GRADIENT_SCALE = tl.constexpr(int(SpecField.GRADIENT_SCALE))
_DIVISOR = tl.constexpr(int(SpecField.DIVISOR))
_DIVISOR_STRIDE = tl.constexpr(int(SpecField.DIVISOR_STRIDE))
_LOSS = tl.constexpr(int(SpecField.LOSS))
_GRADIENT = tl.constexpr(int(SpecField.GRADIENT))
_PARTIALS = tl.constexpr(int(SpecField.PARTIALS))
_NONFINITE_COUNT = tl.constexpr(int(SpecField.NONFINITE_COUNT))
_SUM = tl.constexpr(int(SpecFlag.SUM))
_DIVIDE = tl.constexpr(int(SpecFlag.DIVISOR))
_WRITE_LOSS = tl.constexpr(int(SpecFlag.WRITE_LOSS))
_WRITE_GRADIENT = tl.constexpr(int(SpecFlag.WRITE_GRADIENT))


@triton.jit
def loss_kernel(
    arena: tl.tensor,
    tiles: tl.tensor,
    OPERAND: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    SELECTED: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Compute one tile of a segment, for all its specs: write losses, gradients and partial sums, count non-finites.

    `tiles` has two int64 for each program: where its segment's record is, and which of its tiles it computes. OPERAND
    and OUTPUT are DataTypes: of input and target, and of losses and gradients. ROWS: whether segments have several
    rows; without it, all is one row. SELECTED: whether they may have weights or masks. A block has 2^LEVELS elements, a
    chunk CHUNK.
    """
    segment, tile = program_of(arena, tiles)
    input_block = arena + offset_of(segment, _INPUT)
    target_block = arena + offset_of(segment, _TARGET)
    spec = (arena + tl.load(segment + _SPECS)).to(tl.pointer_type(tl.int64))
    block_count = block_count_of(segment, tile, ROWS, CHUNK, LEVELS)

    # Specs after the first find the tile in the cache.
    for _ in range(tl.load(segment + _SPEC_COUNT).to(tl.int32)):
        code = tl.load(spec + _CODE)
        flags = tl.load(spec + _SPEC_FLAGS)
        parameter = float64_at(spec + _PARAMETER)
        half_parameter = float64_at(spec + _HALF_PARAMETER)
        gradient_scale = float64_at(spec + _GRADIENT_SCALE)
        sums = tl.zeros((1 << LEVELS,), dtype=tl.float64)
        nonfinite_counts = tl.zeros((1 << LEVELS,), dtype=tl.int32)
        for block in range(block_count):
            row, first, offsets, near, inside = elements_of(segment, tile, block, ROWS, CHUNK, LEVELS)
            input = load(input_block, first, offsets, near, OPERAND)
            target = load(target_block, first, offsets, near, OPERAND)
            # In float32 for halves and float32, in float64 for float64.
            d = (input - target).to(tl.float64)
            loss, gradient = _loss_and_derivative(code, parameter, half_parameter, d)

            selected = inside
            weight = d
            if SELECTED:
                selected = unmasked(arena, segment, first, offsets, near, inside)
                weight = weights_of(arena, segment, first, offsets, near)
            # NaN compares false. No loss is negative.
            nonfinite_counts += tl.where(selected & ((loss < float("inf")) == 0), 1, 0)
            if SELECTED:
                loss = loss * weight
            loss = tl.where(selected, loss, 0.0)
            sums += loss
            if (flags & _WRITE_LOSS) != 0:
                store(arena + offset_of(spec, _LOSS), first, offsets, near, loss, OUTPUT)

            if (flags & _WRITE_GRADIENT) != 0:
                # dl/dinput * w * gradient_scale / divisor
                if SELECTED:
                    gradient = gradient * weight
                gradient = gradient * gradient_scale
                if (flags & _DIVIDE) != 0:
                    divisors = (arena + tl.load(spec + _DIVISOR)).to(tl.pointer_type(tl.float64))
                    if ROWS:
                        stride = tl.load(spec + _DIVISOR_STRIDE)
                        gradient = gradient / tl.load(divisors + row * stride, mask=inside, other=1.0)
                    else:
                        gradient = gradient / tl.load(divisors)
                if SELECTED:
                    gradient = tl.where(selected, gradient, 0.0)
                store(arena + offset_of(spec, _GRADIENT), first, offsets, near, gradient, OUTPUT)

        nonfinite_count = tl.sum(nonfinite_counts, axis=0)
        if nonfinite_count > 0:
            counter = (arena + tl.load(spec + _NONFINITE_COUNT)).to(tl.pointer_type(tl.int64))
            tl.atomic_add(counter, nonfinite_count.to(tl.int64), sem="relaxed")
        if (flags & _SUM) != 0:
            partials = (arena + tl.load(spec + _PARTIALS)).to(tl.pointer_type(tl.float64))
            store_partials(segment, tile, partials, sums, ROWS, LEVELS)
        spec += _SPEC_FIELDS


@triton.jit
def weight_kernel(
    arena: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Sum the unmasked elements' weights over one tile of a segment; count them where all is one row."""
    segment, tile = program_of(arena, tiles)
    sums = tl.zeros((1 << LEVELS,), dtype=tl.float64)
    counts = tl.zeros((1 << LEVELS,), dtype=tl.int32)
    for block in range(block_count_of(segment, tile, ROWS, CHUNK, LEVELS)):
        _, first, offsets, near, inside = elements_of(segment, tile, block, ROWS, CHUNK, LEVELS)
        selected = unmasked(arena, segment, first, offsets, near, inside)
        sums += tl.where(selected, weights_of(arena, segment, first, offsets, near), 0.0)
        counts += tl.where(selected, 1, 0)
    partials = (arena + tl.load(segment + _WEIGHT_PARTIALS)).to(tl.pointer_type(tl.float64))
    store_partials(segment, tile, partials, sums, ROWS, LEVELS)
    if not ROWS:
        counter = (arena + tl.load(segment + _UNMASKED_COUNT)).to(tl.pointer_type(tl.int64))
        tl.atomic_add(counter, tl.sum(counts, axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _loss_and_derivative(code: tl.tensor, parameter: tl.tensor, half_parameter: tl.tensor, d: tl.tensor):
    """Return each element's loss and its derivative. losses.py has the formulas' sources and limits."""
    if code == _SMOOTH_L1:
        # g = clamp(d / beta, -1, 1), NaN where d is; loss = g (d - 0.5 beta g)
        g = d / parameter
        g = tl.where(g > 1.0, 1.0, tl.where(g < -1.0, -1.0, g))
        loss = tl.abs((d - g * half_parameter) * g)
    elif code == _HUBER:
        # g = clamp(d, -delta, delta); loss = g (d - 0.5 g)
        g = tl.where(d > parameter, parameter, tl.where(d < -parameter, -parameter, d))
        loss = tl.abs((d - g * 0.5) * g)
    elif code == _L1:
        g = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0)).to(tl.float64)
        loss = tl.abs(d)
    elif code == _MSE:
        g = d * 2.0
        loss = d * d
    else:
        # smooth_l1's limit: 0, but inf - 0.5 inf and the sign for an infinite d.
        zero = d * 0.0
        g = tl.where(tl.abs(d) == float("inf"), tl.where(d > 0.0, 1.0, -1.0), zero)
        loss = tl.abs(zero)
    return loss, g
