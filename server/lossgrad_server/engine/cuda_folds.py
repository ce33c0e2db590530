"""The sums of the CUDA kernels: lanes folded in half, and the kernel that adds up the partial sums of chunks."""

# Triton's language looks like Python's and is not: it has its own types, and its own conventions for compile-time values.
# mypy: ignore-errors
# ruff: noqa: N803, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from lossgrad_server.engine.cuda_elements import program_of, store
from lossgrad_server.engine.cuda_fields import FoldField, FoldFlag, SegmentField
from lossgrad_server.jobs import DataType

# Kernels can see globals only as constexpr.
_FLOAT16 = tl.constexpr(int(DataType.FLOAT16))
_BFLOAT16 = tl.constexpr(int(DataType.BFLOAT16))
_FLOAT32 = tl.constexpr(int(DataType.FLOAT32))
_FLOAT64 = tl.constexpr(int(DataType.FLOAT64))
_ROW_COUNT = tl.constexpr(int(SegmentField.ROW_COUNT))
_ROWS_LOG2 = tl.constexpr(int(SegmentField.ROWS_LOG2))
_CHUNKS_PER_ROW = tl.constexpr(int(SegmentField.CHUNKS_PER_ROW))
_FOLD_FLAGS = tl.constexpr(int(FoldField.FLAGS))
_FOLD_PARTIALS = tl.constexpr(int(FoldField.PARTIALS))
_FOLD_ROW_COUNT = tl.constexpr(int(FoldField.ROW_COUNT))
_PARTIALS_PER_ROW = tl.constexpr(int(FoldField.PARTIALS_PER_ROW))
_FOLD_ROWS_LOG2 = tl.constexpr(int(FoldField.ROWS_LOG2))
_FOLD_DIVISOR = tl.constexpr(int(FoldField.DIVISOR))
_FOLD_DIVISOR_STRIDE = tl.constexpr(int(FoldField.DIVISOR_STRIDE))
_OUTPUT_TYPE = tl.constexpr(int(FoldField.OUTPUT_TYPE))
_OUTPUT = tl.constexpr(int(FoldField.OUTPUT))
_FOLD_DIVIDE = tl.constexpr(int(FoldFlag.DIVISOR))


@triton.jit
def fold_kernel(
    arena: tl.tensor,
    tiles: tl.tensor,
    LEVELS: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """Add up the partial sums of some rows of a fold, divide and write them. Without ADDS, a row has at most one.

    Of more partials than 2^LEVELS, each lane first adds up its own in order, as within a chunk. A sum is held by four
    numbers, exactly unless the partials are more than about 2^150 apart, and rounded once.
    """
    fold, tile = program_of(arena, tiles)
    rows_log2 = tl.load(fold + _FOLD_ROWS_LOG2).to(tl.int32)
    row_count = tl.load(fold + _FOLD_ROW_COUNT)
    per_row = tl.load(fold + _PARTIALS_PER_ROW)
    partials = (arena + tl.load(fold + _FOLD_PARTIALS)).to(tl.pointer_type(tl.float64))
    lane = tl.arange(0, 1 << LEVELS)
    if ADDS:
        row = (tile << rows_log2) + (lane & ((1 << rows_log2) - 1))
        column = (lane >> rows_log2).to(tl.int64)
        s0 = tl.zeros((1 << LEVELS,), dtype=tl.float64)
        s1, s2, s3 = s0, s0, s0
        for _ in range(((per_row + ((1 << LEVELS) - 1)) >> LEVELS).to(tl.int32)):
            own = tl.load(partials + row * per_row + column, mask=(row < row_count) & (column < per_row), other=0.0)
            s0, s1, s2, s3 = _added(s0, s1, s2, s3, own)
            column += 1 << LEVELS
        for level in tl.static_range(LEVELS + 1):
            if rows_log2 == LEVELS - level:
                _finish_rows(arena, fold, tile, _rounded(s0, s1, s2, s3), LEVELS - level)
            if level < LEVELS:
                s0, t0 = _halves(s0, LEVELS - level)
                s1, t1 = _halves(s1, LEVELS - level)
                s2, t2 = _halves(s2, LEVELS - level)
                s3, t3 = _halves(s3, LEVELS - level)
                s0, s1, s2, s3 = _added(s0, s1, s2, s3, t0)
                s1, s2, s3 = _added_below(s1, s2, s3, t1)
                s2, lost = _two_sum(s2, t2)
                s3 = s3 + (lost + t3)
    else:
        row = tile * (1 << LEVELS) + lane
        own = tl.load(partials + row, mask=row < row_count * per_row, other=0.0)
        _finish_rows(arena, fold, tile, own, LEVELS)


@triton.jit
def _two_sum(a: tl.tensor, b: tl.tensor):
    """Return a + b and what rounding lost of it, exactly. Source: Knuth, TAOCP 2, 4.2.2, theorem B."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def _added(s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, s3: tl.tensor, value: tl.tensor):
    """Add to a sum of four numbers, each of which takes what the one before it lost."""
    s0, lost = _two_sum(s0, value)
    s1, s2, s3 = _added_below(s1, s2, s3, lost)
    return s0, s1, s2, s3


@triton.jit
def _added_below(s1: tl.tensor, s2: tl.tensor, s3: tl.tensor, value: tl.tensor):
    s1, lost = _two_sum(s1, value)
    s2, lost = _two_sum(s2, lost)
    return s1, s2, s3 + lost


@triton.jit
def _rounded(s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, s3: tl.tensor) -> tl.tensor:
    """Return the sum of the four, rounded once; of the first alone where that is infinite or NaN."""
    total = s0
    for _ in tl.static_range(3):
        s2, s3 = _two_sum(s2, s3)
        s1, s2 = _two_sum(s1, s2)
        s0, s1 = _two_sum(s0, s1)
    # Now each is the rounded sum of itself and those behind it, but for a tie, which what is behind decides.
    away = s0 + 2.0 * s1
    is_beyond = ((s1 > 0.0) & (s2 > 0.0)) | ((s1 < 0.0) & (s2 < 0.0))
    s0 = tl.where(is_beyond & (away - s0 == 2.0 * s1), away, s0)
    return tl.where(tl.abs(total) < float("inf"), s0, total)


@triton.jit
def _halves(values: tl.tensor, LOG2: tl.constexpr):
    """Return the first half of 2^LOG2 numbers, and the second."""
    pair = tl.reshape(values, (2, 1 << (LOG2 - 1)))
    is_first = tl.expand_dims(tl.arange(0, 2), 1) == 0
    return tl.sum(tl.where(is_first, pair, 0.0), axis=0), tl.sum(tl.where(is_first, 0.0, pair), axis=0)


@triton.jit
def _finish_rows(arena: tl.tensor, fold: tl.tensor, tile: tl.tensor, sums: tl.tensor, LOG2: tl.constexpr) -> None:
    row = tile * (1 << LOG2) + tl.arange(0, 1 << LOG2)
    inside = row < tl.load(fold + _FOLD_ROW_COUNT)
    if (tl.load(fold + _FOLD_FLAGS) & _FOLD_DIVIDE) != 0:
        divisors = (arena + tl.load(fold + _FOLD_DIVISOR)).to(tl.pointer_type(tl.float64))
        sums = sums / tl.load(divisors + row * tl.load(fold + _FOLD_DIVISOR_STRIDE), mask=inside, other=1.0)
    output = arena + tl.load(fold + _OUTPUT)
    output_type = tl.load(fold + _OUTPUT_TYPE)
    if output_type == _FLOAT64:
        store(output, 0, row, inside, sums, _FLOAT64)
    elif output_type == _FLOAT32:
        store(output, 0, row, inside, sums, _FLOAT32)
    elif output_type == _FLOAT16:
        store(output, 0, row, inside, sums, _FLOAT16)
    else:
        store(output, 0, row, inside, sums, _BFLOAT16)


@triton.jit
def folded(values: tl.tensor, LOG2: tl.constexpr) -> tl.tensor:
    """Return 2^(LOG2 - 1) numbers: the first half of 2^LOG2, each with its counterpart in the second added to it."""
    return tl.sum(tl.reshape(values, (2, 1 << (LOG2 - 1))), axis=0)


@triton.jit
def store_partials(
    segment: tl.tensor,
    tile: tl.tensor,
    partials: tl.tensor,
    values: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Fold a tile's values and write the sum of each of its rows. Without ROWS, that is one."""
    if ROWS:
        rows_log2 = tl.load(segment + _ROWS_LOG2).to(tl.int32)
        # Rows have several chunks only where a tile is one chunk; then tiles and partials are in the same order.
        row_count = tl.load(segment + _ROW_COUNT) * tl.load(segment + _CHUNKS_PER_ROW)
        for level in tl.static_range(LEVELS + 1):
            if rows_log2 == LEVELS - level:
                row = tile * (1 << (LEVELS - level)) + tl.arange(0, 1 << (LEVELS - level))
                tl.store(partials + row, values, mask=row < row_count)
            if level < LEVELS:
                values = folded(values, LEVELS - level)
    else:
        for level in tl.static_range(LEVELS):
            values = folded(values, LEVELS - level)
        tl.store(partials + tile + tl.arange(0, 1), values)
