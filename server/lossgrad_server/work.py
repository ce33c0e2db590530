"""What crosses between the batcher and a device's worker: bytes and fixed-size headers, never live objects.

So a worker may live in this process (engine/) or in another one behind a socket and shared memory; the batcher cannot
tell. Who fills these in: transport/ makes the items, engine/ the results.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

Buffer = bytes | bytearray | memoryview

# One for each spec: scalar loss (0 where the loss is a tensor), element count, weight sum, non-finite count.
SPEC_RESULT: Final = struct.Struct("<dqdq")


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request to compute: `JobPlan.header`, and each of `JobPlan.operands` as bytes: read-only, at any address."""

    header: bytes
    operands: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class WorkResult:
    """One request computed: a SPEC_RESULT record for each spec, and the bytes of each of `JobPlan.outputs`."""

    scalars: bytes
    outputs: tuple[Buffer, ...]


class FailureKind(IntEnum):
    """Why a worker could not compute an item."""

    INTERNAL = 1
    OUT_OF_MEMORY = 2
    DEVICE_LOST = 3


@dataclass(frozen=True, slots=True)
class WorkFailure:
    """One request that the worker could not compute. `message` is fit for the caller: both values, nothing internal."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch: one outcome for each item, in order, and where the time went, in nanoseconds."""

    outcomes: list[WorkResult | WorkFailure]
    pack_ns: int
    compute_ns: int
    unpack_ns: int


class DeviceWorker(Protocol):
    """Computes batches on one device. All methods but the attributes are called from one thread, the batcher's."""

    @property
    def device(self) -> str:
        """The device's name, as torch writes it: "cpu", "cuda:0"."""

    def warm_up(self) -> None:
        """Do once what must not be done at the first request: compile, allocate, touch the device."""

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        """Compute the items. Never raises for what an item is: an item that fails, fails alone, as a WorkFailure."""

    def close(self) -> None:
        """Give back what `warm_up` took."""
