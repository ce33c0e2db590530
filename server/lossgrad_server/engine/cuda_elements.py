"""Where the CUDA kernels find the elements of a tile, and elements in and out of memory: every data type.

Offsets, tiles and rows are as cuda_kernel.py has them. Rounding is to nearest even, once, from float64.
"""

# Triton's language looks like Python's and is not: it has its own types, and its own conventions for compile-time values.
# mypy: ignore-errors
# ruff: noqa: N803, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from lossgrad_server.engine.cuda_fields import SegmentField, SegmentFlag
from lossgrad_server.jobs import DataType

# Kernels can see globals only as constexpr.
_FLOAT16 = tl.constexpr(int(DataType.FLOAT16))
_FLOAT32 = tl.constexpr(int(DataType.FLOAT32))
_FLOAT64 = tl.constexpr(int(DataType.FLOAT64))
_SEGMENT_FLAGS = tl.constexpr(int(SegmentField.FLAGS))
_WEIGHT = tl.constexpr(int(SegmentField.WEIGHT))
_MASK = tl.constexpr(int(SegmentField.MASK))
_ROW_COUNT = tl.constexpr(int(SegmentField.ROW_COUNT))
_ROW_LENGTH = tl.constexpr(int(SegmentField.ROW_LENGTH))
_ROWS_LOG2 = tl.constexpr(int(SegmentField.ROWS_LOG2))
_CHUNKS_PER_ROW = tl.constexpr(int(SegmentField.CHUNKS_PER_ROW))
_HAS_WEIGHT = tl.constexpr(int(SegmentFlag.WEIGHT))
_HAS_FLOAT64_WEIGHT = tl.constexpr(int(SegmentFlag.FLOAT64_WEIGHT))
_HAS_MASK = tl.constexpr(int(SegmentFlag.MASK))


@triton.jit
def program_of(arena: tl.tensor, tiles: tl.tensor):
    """Return the record that this program computes for, and which of its tiles."""
    entry = tiles + 2 * tl.program_id(0).to(tl.int64)
    return (arena + tl.load(entry)).to(tl.pointer_type(tl.int64)), tl.load(entry + 1)


@triton.jit
def block_count_of(
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
def elements_of(
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
def offset_of(record: tl.tensor, FIELD: tl.constexpr) -> tl.tensor:
    """Return the offset of a block that a record's field names: a multiple of cuda_fields.ALIGNMENT."""
    return tl.multiple_of(tl.load(record + FIELD), 128)


@triton.jit
def load(block: tl.tensor, first: tl.tensor, offsets: tl.tensor, where: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
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
def weights_of(
    arena: tl.tensor, segment: tl.tensor, first: tl.tensor, offsets: tl.tensor, near: tl.tensor
) -> tl.tensor:
    """Return the elements' weights as float64, 1 where there are none."""
    flags = tl.load(segment + _SEGMENT_FLAGS)
    block = arena + offset_of(segment, _WEIGHT)
    weight = tl.full(offsets.shape, 1.0, tl.float64)
    if (flags & _HAS_WEIGHT) != 0:
        if (flags & _HAS_FLOAT64_WEIGHT) != 0:
            weight = load(block, first, offsets, near, _FLOAT64)
        else:
            weight = load(block, first, offsets, near, _FLOAT32).to(tl.float64)
    return weight


@triton.jit
def unmasked(
    arena: tl.tensor, segment: tl.tensor, first: tl.tensor, offsets: tl.tensor, near: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Return which lanes are elements that are not masked."""
    is_masked = (tl.load(segment + _SEGMENT_FLAGS) & _HAS_MASK) != 0
    mask = tl.load(arena + offset_of(segment, _MASK) + first + offsets, mask=near & is_masked, other=1)
    return inside & ((mask != 0) | (is_masked == 0))


@triton.jit
def store(
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
def float64_at(field: tl.tensor) -> tl.tensor:
    """Return the float64 of which a record's field has the bits."""
    return tl.load(field).to(tl.float64, bitcast=True)
