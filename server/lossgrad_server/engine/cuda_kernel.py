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

from lossgrad_server.engine.cuda_fields import (
    FoldField,
    FoldFlag,
    LossCode,
    SegmentField,
    SegmentFlag,
    SpecField,
    SpecFlag,
)
from lossgrad_server.jobs import DataType

# Whether the kernels run in Triton's interpreter.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Kernels can see globals only as constexpr.
_FLOAT16 = tl.constexpr(int(DataType.FLOAT16))
_BFLOAT16 = tl.constexpr(int(DataType.BFLOAT16))
_FLOAT32 = tl.constexpr(int(DataType.FLOAT32))
_FLOAT64 = tl.constexpr(int(DataType.FLOAT64))

_SMOOTH_L1 = tl.constexpr(int(LossCode.SMOOTH_L1))
_HUBER = tl.constexpr(int(LossCode.HUBER))
_L1 = tl.constexpr(int(LossCode.L1))
_MSE = tl.constexpr(int(LossCode.MSE))

_SEGMENT_FLAGS = tl.constexpr(int(SegmentField.FLAGS))
_INPUT = tl.constexpr(int(SegmentField.INPUT))
_TARGET = tl.constexpr(int(SegmentField.TARGET))
_WEIGHT = tl.constexpr(int(SegmentField.WEIGHT))
_MASK = tl.constexpr(int(SegmentField.MASK))
_ROW_COUNT = tl.constexpr(int(SegmentField.ROW_COUNT))
_ROW_LENGTH = tl.constexpr(int(SegmentField.ROW_LENGTH))
_ROWS_LOG2 = tl.constexpr(int(SegmentField.ROWS_LOG2))
_CHUNKS_PER_ROW = tl.constexpr(int(SegmentField.CHUNKS_PER_ROW))
_SPECS = tl.constexpr(int(SegmentField.SPECS))
_SPEC_COUNT = tl.constexpr(int(SegmentField.SPEC_COUNT))
_WEIGHT_PARTIALS = tl.constexpr(int(SegmentField.WEIGHT_PARTIALS))
_UNMASKED_COUNT = tl.constexpr(int(SegmentField.UNMASKED_COUNT))
_HAS_WEIGHT = tl.constexpr(int(SegmentFlag.WEIGHT))
_HAS_FLOAT64_WEIGHT = tl.constexpr(int(SegmentFlag.FLOAT64_WEIGHT))
_HAS_MASK = tl.constexpr(int(SegmentFlag.MASK))

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
    segment, tile = _program(arena, tiles)
    input_block = arena + _offset(segment, _INPUT)
    target_block = arena + _offset(segment, _TARGET)
    spec = (arena + tl.load(segment + _SPECS)).to(tl.pointer_type(tl.int64))
    block_count = _block_count(segment, tile, ROWS, CHUNK, LEVELS)

    # Specs after the first find the tile in the cache.
    for _ in range(tl.load(segment + _SPEC_COUNT).to(tl.int32)):
        code = tl.load(spec + _CODE)
        flags = tl.load(spec + _SPEC_FLAGS)
        parameter = _float64(spec + _PARAMETER)
        half_parameter = _float64(spec + _HALF_PARAMETER)
        gradient_scale = _float64(spec + _GRADIENT_SCALE)
        sums = tl.zeros((1 << LEVELS,), dtype=tl.float64)
        nonfinite_counts = tl.zeros((1 << LEVELS,), dtype=tl.int32)
        for block in range(block_count):
            row, first, offsets, near, inside = _elements(segment, tile, block, ROWS, CHUNK, LEVELS)
            input = _load(input_block, first, offsets, near, OPERAND)
            target = _load(target_block, first, offsets, near, OPERAND)
            # In float32 for halves and float32, in float64 for float64.
            d = (input - target).to(tl.float64)
            loss, gradient = _loss_and_derivative(code, parameter, half_parameter, d)

            selected = inside
            weight = d
            if SELECTED:
                selected = _unmasked(arena, segment, first, offsets, near, inside)
                weight = _weights(arena, segment, first, offsets, near)
            # NaN compares false. No loss is negative.
            nonfinite_counts += tl.where(selected & ((loss < float("inf")) == 0), 1, 0)
            if SELECTED:
                loss = loss * weight
            loss = tl.where(selected, loss, 0.0)
            sums += loss
            if (flags & _WRITE_LOSS) != 0:
                _store(arena + _offset(spec, _LOSS), first, offsets, near, loss, OUTPUT)

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
                _store(arena + _offset(spec, _GRADIENT), first, offsets, near, gradient, OUTPUT)

        nonfinite_count = tl.sum(nonfinite_counts, axis=0)
        if nonfinite_count > 0:
            counter = (arena + tl.load(spec + _NONFINITE_COUNT)).to(tl.pointer_type(tl.int64))
            tl.atomic_add(counter, nonfinite_count.to(tl.int64), sem="relaxed")
        if (flags & _SUM) != 0:
            partials = (arena + tl.load(spec + _PARTIALS)).to(tl.pointer_type(tl.float64))
            _store_partials(segment, tile, partials, sums, ROWS, LEVELS)
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
    segment, tile = _program(arena, tiles)
    sums = tl.zeros((1 << LEVELS,), dtype=tl.float64)
    counts = tl.zeros((1 << LEVELS,), dtype=tl.int32)
    for block in range(_block_count(segment, tile, ROWS, CHUNK, LEVELS)):
        _, first, offsets, near, inside = _elements(segment, tile, block, ROWS, CHUNK, LEVELS)
        selected = _unmasked(arena, segment, first, offsets, near, inside)
        sums += tl.where(selected, _weights(arena, segment, first, offsets, near), 0.0)
        counts += tl.where(selected, 1, 0)
    partials = (arena + tl.load(segment + _WEIGHT_PARTIALS)).to(tl.pointer_type(tl.float64))
    _store_partials(segment, tile, partials, sums, ROWS, LEVELS)
    if not ROWS:
        counter = (arena + tl.load(segment + _UNMASKED_COUNT)).to(tl.pointer_type(tl.int64))
        tl.atomic_add(counter, tl.sum(counts, axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def fold_kernel(
    arena: tl.tensor,
    tiles: tl.tensor,
    LEVELS: tl.constexpr,
) -> None:
    """Add up the partial sums of some rows of a fold, divide and write them.

    Of more partials than 2^LEVELS, each lane first adds up its own in order, as within a chunk.
    """
    fold, tile = _program(arena, tiles)
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
            sums = _folded(sums, LEVELS - level)


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
        _store(output, 0, row, inside, sums, _FLOAT64)
    elif output_type == _FLOAT32:
        _store(output, 0, row, inside, sums, _FLOAT32)
    elif output_type == _FLOAT16:
        _store(output, 0, row, inside, sums, _FLOAT16)
    else:
        _store(output, 0, row, inside, sums, _BFLOAT16)


# --- where a tile's elements are ---


@triton.jit
def _program(arena: tl.tensor, tiles: tl.tensor):
    """Return the record that this program computes for, and which of its tiles."""
    entry = tiles + 2 * tl.program_id(0).to(tl.int64)
    return (arena + tl.load(entry)).to(tl.pointer_type(tl.int64)), tl.load(entry + 1)


@triton.jit
def _block_count(
    segment: tl.tensor, tile: tl.tensor, ROWS: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr
) -> tl.tensor:
    """Return how many blocks of 2^LEVELS elements the tile has. The last may be a part of one."""
    left = tl.load(segment + _ROW_LENGTH)
    if ROWS:
        left -= (tile % tl.load(segment + _CHUNKS_PER_ROW)) * CHUNK
    else:
        left -= tile * CHUNK
    return (tl.minimum(left, CHUNK).to(tl.int32) + ((1 << LEVELS) - 1)) >> LEVELS


@triton.jit
def _elements(
    segment: tl.tensor,
    tile: tl.tensor,
    block: tl.tensor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Return where the block's elements are.

    That is: each lane's row; the index of a first element, and the lanes' distances from it; whether a lane may be
    loaded and stored, and whether it is an element.
    """
    lane = tl.arange(0, 1 << LEVELS)
    length = tl.load(segment + _ROW_LENGTH)
    if ROWS:
        rows_log2 = tl.load(segment + _ROWS_LOG2).to(tl.int32)
        chunks_per_row = tl.load(segment + _CHUNKS_PER_ROW)
        row = ((tile // chunks_per_row) << rows_log2) + (lane & ((1 << rows_log2) - 1))
        column = (tile % chunks_per_row) * CHUNK + block * (1 << LEVELS) + (lane >> rows_log2)
        inside = (row < tl.load(segment + _ROW_COUNT)) & (column < length)
        near = inside
        first = tile * 0
        offsets = row * length + column
    else:
        row = tile
        first = tile * CHUNK + block * (1 << LEVELS)
        left = tl.minimum(length - first, 1 << LEVELS).to(tl.int32)
        inside = lane < left
        # The same for 16 elements in a row, so that they can be one vector. Blocks own what follows them.
        near = (lane // 16 * 16) < left
        offsets = lane
    return row, first, offsets, near, inside


@triton.jit
def _offset(record: tl.tensor, FIELD: tl.constexpr) -> tl.tensor:
    return tl.multiple_of(tl.load(record + FIELD), 128)


# --- elements in and out ---


@triton.jit
def _load(block: tl.tensor, first: tl.tensor, offsets: tl.tensor, where: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Return elements as the type that they are subtracted in."""
    if TYPE == _FLOAT64:
        elements = tl.load(block.to(tl.pointer_type(tl.float64)) + first + offsets, mask=where, other=0.0)
    elif TYPE == _FLOAT32:
        elements = tl.load(block.to(tl.pointer_type(tl.float32)) + first + offsets, mask=where, other=0.0)
    elif TYPE == _FLOAT16:
        elements = tl.load(block.to(tl.pointer_type(tl.float16)) + first + offsets, mask=where, other=0.0)
        elements = elements.to(tl.float32)
    else:
        # A bfloat16 is the upper half of a float32.
        bits = tl.load(block.to(tl.pointer_type(tl.uint16)) + first + offsets, mask=where, other=0)
        elements = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return elements


@triton.jit
def _weights(arena: tl.tensor, segment: tl.tensor, first: tl.tensor, offsets: tl.tensor, near: tl.tensor) -> tl.tensor:
    flags = tl.load(segment + _SEGMENT_FLAGS)
    block = arena + _offset(segment, _WEIGHT)
    weight = tl.full(offsets.shape, 1.0, tl.float64)
    if (flags & _HAS_WEIGHT) != 0:
        if (flags & _HAS_FLOAT64_WEIGHT) != 0:
            weight = _load(block, first, offsets, near, _FLOAT64)
        else:
            weight = _load(block, first, offsets, near, _FLOAT32).to(tl.float64)
    return weight


@triton.jit
def _unmasked(
    arena: tl.tensor, segment: tl.tensor, first: tl.tensor, offsets: tl.tensor, near: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    is_masked = (tl.load(segment + _SEGMENT_FLAGS) & _HAS_MASK) != 0
    mask = tl.load(arena + _offset(segment, _MASK) + first + offsets, mask=near & is_masked, other=1)
    return inside & ((mask != 0) | (is_masked == 0))


@triton.jit
def _store(
    block: tl.tensor, first: tl.tensor, offsets: tl.tensor, where: tl.tensor, values: tl.tensor, TYPE: tl.constexpr
) -> None:
    """Write float64 values, each rounded once, to nearest even."""
    if TYPE == _FLOAT64:
        tl.store(block.to(tl.pointer_type(tl.float64)) + first + offsets, values, mask=where)
    elif TYPE == _FLOAT32:
        tl.store(block.to(tl.pointer_type(tl.float32)) + first + offsets, values.to(tl.float32), mask=where)
    elif TYPE == _FLOAT16:
        rounded = _rounded_to_odd(values).to(tl.float32, bitcast=True).to(tl.float16)
        tl.store(block.to(tl.pointer_type(tl.float16)) + first + offsets, rounded, mask=where)
    else:
        bits = _rounded_to_odd(values)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(values != values, 0x7FC0, nearest)  # noqa: PLR0124
        tl.store(block.to(tl.pointer_type(tl.int16)) + first + offsets, nearest.to(tl.int16), mask=where)


@triton.jit
def _rounded_to_odd(values: tl.tensor) -> tl.tensor:
    """Return the bits of float64 values as float32, rounded so that rounding again to a half rounds once.

    tensors.py says how and why.
    """
    narrow = values.to(tl.float32)
    back = narrow.to(tl.float64)
    bits = narrow.to(tl.int32, bitcast=True)
    bits = bits - tl.where(tl.abs(back) > tl.abs(values), 1, 0)
    return bits | tl.where(back != values, 1, 0)


@triton.jit
def _float64(field: tl.tensor) -> tl.tensor:
    return tl.load(field).to(tl.float64, bitcast=True)


# --- formulas ---


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


# --- sums ---


@triton.jit
def _folded(values: tl.tensor, LOG2: tl.constexpr) -> tl.tensor:
    """Return 2^(LOG2 - 1) numbers: the first half of 2^LOG2, each with its counterpart in the second added to it."""
    return tl.sum(tl.reshape(values, (2, 1 << (LOG2 - 1))), axis=0)


@triton.jit
def _store_partials(
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
                values = _folded(values, LEVELS - level)
    else:
        for level in tl.static_range(LEVELS):
            values = _folded(values, LEVELS - level)
        tl.store(partials + tile + tl.arange(0, 1), values)
