"""What a job needs of the CUDA kernels, as values: memory, records, programs. cuda_builder.py makes them.

A template's places are relative to its job's share of each region of an arena; cuda_layout.py adds where that starts.

A job is direct where input and target have the type that the kernel computes in and outputs the shapes that it writes.
Any other is expanded and converted before the kernel runs, and has its gradients summed back and rounded after it
(cuda_broadcast.py): broadcasting, mixed types.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from lossgrad_server.engine.cuda_fields import (
    ALIGNMENT,
)
from lossgrad_server.jobs import DataType, JobPlan, TensorPlan

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
Int8Array = np.ndarray[Any, np.dtype[np.int8]]


class Region(IntEnum):
    """Where a place is. The parts of an arena, in this order."""

    NOWHERE = 0  # not a place: a plain number
    INPUT = 1  # the operands as they came
    STATE = 2  # the kernels' records, and the divisors known beforehand
    NUMBERS = 3  # the answers' numbers: a SPEC_RESULT for each spec, and SUMS
    OUTPUT = 4  # the answers' tensors
    SCRATCH = 5


class Place(NamedTuple):
    """An offset in a job's share of a region, in bytes."""

    region: Region
    offset: int


class Stage(IntEnum):
    """The kernels, in the order in which they run."""

    WEIGHTS = 0
    WEIGHT_FOLDS = 1
    LOSSES = 2
    LOSS_FOLDS = 3


class Kernel(NamedTuple):
    """A kernel, and what it is compiled for; the loss kernel alone knows types and selection."""

    stage: Stage
    has_rows: bool = False
    is_selected: bool = False
    operand: int = 0
    output: int = 0

    @property
    def code(self) -> int:
        """A number for it; numbers ascend with the stage."""
        return self.stage << 24 | self.operand << 16 | self.output << 8 | self.has_rows << 1 | self.is_selected

    @classmethod
    def of_code(cls, code: int) -> Kernel:
        """Return the kernel with that number."""
        return cls(Stage(code >> 24), bool(code & 2), bool(code & 1), code >> 16 & 0xFF, code >> 8 & 0xFF)


@dataclass(frozen=True, slots=True)
class Expansion:
    """An operand to be broadcast and converted before the kernel runs."""

    source: Place
    tensor: TensorPlan
    target: Place
    data_type: DataType  # UINT8 for masks


@dataclass(frozen=True, slots=True)
class Rounding:
    """Float64 values of the result's shape to be summed back to an output's shape, and rounded, after the kernel ran."""

    source: Place
    target: Place
    tensor: TensorPlan
    is_negated: bool


@dataclass(frozen=True)
class Template:
    """A job's share of a launch."""

    plan: JobPlan
    sizes: tuple[int, ...]  # in bytes, of its share of each Region: multiples of ALIGNMENT
    operands: tuple[Place, ...]
    outputs: tuple[Place, ...]
    weight_sum: Place | None  # where SUMS is computed
    state: Int64Array
    state_regions: Int8Array  # of those of `state` that are places
    numbers: Int64Array  # as they are before the kernels run
    programs: Int64Array  # rows: a Kernel's code, its record's place in STATE, how many tiles
    expansions: tuple[Expansion, ...]
    roundings: tuple[Rounding, ...]

    @cached_property
    def arena_bytes(self) -> int:
        """How many bytes of an arena it takes, its share of the tables of tiles included."""
        return sum(self.sizes) + TILE_BYTES * int(self.programs[:, 2].sum())

    @property
    def required_bytes(self) -> int:
        """About how much device memory the job takes, counted from above."""
        return self.arena_bytes + (40 * self.plan.element_count if self.roundings else 0)


# An entry of a table of tiles: a record's offset, and which of its tiles.
TILE_BYTES: Final = 16
# Weight sum, and count of unmasked elements.
SUMS: Final = struct.Struct("<dq")

# More than any device has, and far from what int64 cannot hold.
MAX_BYTES: Final = 1 << 56


class TooManyBytes(Exception):
    """A job that no device's memory holds."""

    def __init__(self, required_bytes: int) -> None:
        super().__init__(f"{required_bytes} bytes")
        self.required_bytes = required_bytes


def aligned(byte_count: int) -> int:
    """Return the byte count rounded up to whole alignments."""
    return -(-byte_count // ALIGNMENT) * ALIGNMENT
