"""The sums of the CUDA kernels: lanes folded in half, and the kernel that adds up the partial sums of chunks."""

# Triton's language looks like Python's and is not: it has its own types, and its own conventions for compile-time values.
# mypy: ignore-errors
# ruff: noqa: N803

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
) -> None:
    """Add up the partial sums of some rows of a fold, divide and write them.

    Of more partials than 2^LEVELS, each lane first adds up its own in order, as within a chunk.
    """
    fold, tile = program_of(arena, tiles)
    rows_log2 = tl.load(fold + _FOLD_ROWS_LOG2).to(tl.int32)
    row_count = tl.load(fold + _FOLD_ROW_COUNT)
    per_row = tl.load(fold + _PARTIALS_PER_ROW)
    partials = (arena + tl.load(fold + _FOLD_PARTIALS)).to(tl.pointer_type(tl.float64))
    lane = tl.arange(0, 1 << LEVELS)
    row = (tile << rows_log2) + (lane & ((1 << rows_log2) - 1))
    sums = tl.zeros((1 << LEVELS,), dtype=tl.float64)
    column = (lane >> rows_log2).to(tl.int64)
    for _ in range(((per_row + ((1 << LEVELS) - 1)) >> LEVELS).to(tl.int32)):
        sums += tl.load(partials + row * per_row + column, mask=(row < row_count) & (column < per_row), other=0.0)
        column += 1 << LEVELS

    for level in tl.static_range(LEVELS + 1):
        if rows_log2 == LEVELS - level:
            _finish_rows(arena, fold, tile, sums, LEVELS - level)
        if level < LEVELS:
            sums = folded(sums, LEVELS - level)


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
