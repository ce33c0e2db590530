"""The records that tell the CUDA kernels what to do: int64 fields, by position. cuda_builder.py fills them.

Offsets are in bytes from the start of the arena, the one block of device memory in which a launch lives. Float64
parameters stand in the records as their bits.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

# Each row of a segment is cut into chunks of this length from its own start; each has one partial sum.
CHUNK_ELEMENTS: Final = 4096
# A power of two: how many elements a program has in hand at a time, and how many lanes add them up.
BLOCK_ELEMENTS: Final = 1024
BLOCK_LOG2: Final = BLOCK_ELEMENTS.bit_length() - 1
# Every block in an arena starts on a multiple of this, and owns what follows it up to the next one. The kernels load
# and store groups of 16 elements of up to 8 bytes whole, so that their accesses stay vectors at a segment's end.
ALIGNMENT: Final = 128


class LossCode(IntEnum):
    """The formula of a spec: a loss's kind, with the limits of smooth_l1 as kinds of their own."""

    SMOOTH_L1 = 1
    HUBER = 2
    L1 = 3
    MSE = 4
    SMOOTH_L1_INFINITE = 5  # beta = inf


class SegmentFlag(IntFlag):
    """What a segment has beside input and target."""

    WEIGHT = 1
    FLOAT64_WEIGHT = 2  # float32 without this
    MASK = 4


class SegmentField(IntEnum):
    """A segment: operands of equal length, and the specs that are computed over them in one reading."""

    FLAGS = 0
    INPUT = 1
    TARGET = 2
    WEIGHT = 3
    MASK = 4  # bytes; any but 0 is true
    ROW_COUNT = 5  # 1 unless the specs reduce each sample by itself
    ROW_LENGTH = 6
    ROWS_LOG2 = 7  # a program computes 2^this rows, or one chunk of a row
    CHUNKS_PER_ROW = 8
    SPECS = 9  # the first of its specs' records
    SPEC_COUNT = 10
    WEIGHT_PARTIALS = 11  # float64, for each row its chunks' sums of weights
    UNMASKED_COUNT = 12  # int64, added to; counted where the rows are one


class SpecFlag(IntFlag):
    """What a spec asks of the kernel."""

    SUM = 1
    DIVISOR = 2  # divides the gradient
    WRITE_LOSS = 4
    WRITE_GRADIENT = 8


class SpecField(IntEnum):
    """A spec over a segment."""

    CODE = 0
    FLAGS = 1
    PARAMETER = 2  # float64
    HALF_PARAMETER = 3  # float64
    GRADIENT_SCALE = 4  # float64
    DIVISOR = 5  # float64
    DIVISOR_STRIDE = 6  # 1: a divisor for each row; 0: one for all
    LOSS = 7
    GRADIENT = 8
    PARTIALS = 9  # float64, for each row its chunks' sums of losses
    NONFINITE_COUNT = 10  # int64, added to


class FoldFlag(IntFlag):
    """What a fold does beside adding up."""

    DIVISOR = 1


class FoldField(IntEnum):
    """A fold: the partial sums of each of some rows added up, divided and written."""

    FLAGS = 0
    PARTIALS = 1
    ROW_COUNT = 2
    PARTIALS_PER_ROW = 3
    ROWS_LOG2 = 4  # a program folds 2^this rows
    DIVISOR = 5
    DIVISOR_STRIDE = 6
    OUTPUT_TYPE = 7  # a DataType
    OUTPUT = 8
