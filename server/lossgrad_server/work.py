"""What crosses between the batcher and a device's worker: bytes and fixed-size headers, never live objects.

So a worker may live in this process (engine/) or in another one behind a socket and shared memory; the batcher cannot
tell. Who fills these in: transport/ makes the items, engine/ the results.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, Protocol

from lossgrad_server.jobs import JobPlan

Buffer = bytes | bytearray | memoryview

# One for each spec: scalar loss (0 where the loss is a tensor), element count, weight sum, non-finite count.
SPEC_RESULT: Final = struct.Struct("<dqdq")
# The most doubles that an exact sum of doubles takes: each covers 53 of the 2,098 bits that a double may have.
MAX_PARTIALS: Final = 40
# One for each spec of a job that wants totals: the fields of SpecTotal, each sum as a count and room for so many.
SPEC_TOTAL: Final = struct.Struct(f"<ddq{MAX_PARTIALS}dq{MAX_PARTIALS}d")


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request to compute: `JobPlan.header`, and each of `JobPlan.operands` as bytes: read-only, at any address.

    `destinations` is empty, or says for each of `JobPlan.outputs` where its bytes are wanted: writable memory of its
    length at any address, or None for wherever the worker likes. A destination may be the very bytes of an operand of the
    same length, and otherwise overlaps none. A worker that writes there returns that buffer as the output. A worker need
    not: then whoever made the item copies.
    """

    header: bytes
    operands: tuple[Buffer, ...]
    destinations: tuple[Buffer | None, ...] = ()


class WorkResult(NamedTuple):
    """One request computed: a SPEC_RESULT record for each spec, and the bytes of each of `JobPlan.outputs`.

    `totals` holds a SPEC_TOTAL record for each spec where the plan wants them. A tuple, because a frozen dataclass takes a
    quarter of a microsecond longer to make, and there is one for each of a batch of small requests.
    """

    scalars: bytes
    outputs: tuple[Buffer, ...]
    totals: bytes = b""


@dataclass(frozen=True, slots=True)
class SpecTotal:
    """What a spec's losses over a part of the elements add to those over others: the exact sums, before any division.

    The elements are cut into chunks of 4096 from the job's start. The losses of each chunk, times their weights, become
    one float64, and so do its weights; the sums are exactly those of the chunks' numbers. So parts of a tensor that is cut
    between two chunks add up, in any order, to what the whole one gives. Its sum is, to the bit, the first of `partials`
    (0.0 where there is none), and its mean the first two of them over the first of `weight_partials`.

    A sum is the float64 nearest to it, then the one nearest to what that leaves, and so on until nothing is left: none
    for 0. It is one infinity where the sum is beyond float64, and one NaN where a term is NaN, or infinities differ.
    """

    # Of the elements' losses times their weights, as they are before they are rounded to the output's type; masked ones
    # and NaN left out. inf and -inf where no element is left.
    minimum: float
    maximum: float
    partials: tuple[float, ...]
    # Of the weights of the elements that are not masked; their number where there are no weights.
    weight_partials: tuple[float, ...]

    def pack(self) -> bytes:
        """Return the SPEC_TOTAL record."""
        sums: list[float] = []
        for partials in (self.partials, self.weight_partials):
            sums += [len(partials), *partials, *[0.0] * (MAX_PARTIALS - len(partials))]
        return SPEC_TOTAL.pack(self.minimum, self.maximum, *sums)


def unpack_totals(totals: bytes) -> list[SpecTotal]:
    """Return the records of `WorkResult.totals`."""
    records: list[SpecTotal] = []
    for minimum, maximum, *sums in SPEC_TOTAL.iter_unpack(totals):
        partials, weight_partials = sums[: MAX_PARTIALS + 1], sums[MAX_PARTIALS + 1 :]
        records.append(
            SpecTotal(
                minimum,
                maximum,
                tuple(partials[1 : 1 + partials[0]]),
                tuple(weight_partials[1 : 1 + weight_partials[0]]),
            )
        )
    return records


class FailureKind(IntEnum):
    """Why a worker could not compute an item."""

    INTERNAL = 1
    OUT_OF_MEMORY = 2
    DEVICE_LOST = 3
    WORKER_CRASHED = 4  # its worker's process died of it, more than once


@dataclass(frozen=True, slots=True)
class WorkFailure:
    """One request that the worker could not compute. `message` is fit for the caller: both values, nothing internal."""

    kind: FailureKind
    message: str


class Retry(StrEnum):
    """Why a worker computed something once more."""

    OUT_OF_MEMORY = "out_of_memory"  # with less at a time, or after memory was given back
    ERROR = "error"  # in smaller parts, so that what fails does so alone
    WORKER_LOST = "worker_lost"  # a request by itself, in the next process


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch: one outcome for each item, in order, and where the time went, in nanoseconds.

    `retries` says for each time that the batch, or a part of it, was computed once more, why.
    """

    outcomes: list[WorkResult | WorkFailure]
    pack_ns: int
    compute_ns: int
    unpack_ns: int
    retries: tuple[Retry, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The `Pending` of a batch that was computed while it was submitted."""

    batch_result: BatchResult

    def advance(self) -> bool:
        """There is nothing to do."""
        return False

    def is_done(self) -> bool:
        """It is."""
        return True

    def result(self) -> BatchResult:
        """Return what became of the items."""
        return self.batch_result


class Pending(Protocol):
    """A batch under way on a device. Belongs to the thread that submitted it."""

    def advance(self) -> bool:
        """Do the next piece of a large request; return whether there are more. At once False for a batch of small ones.

        Other batches may be submitted between two pieces, and do not wait for the rest of this one.
        """

    def is_done(self) -> bool:
        """Return whether `result` would not wait."""

    def result(self) -> BatchResult:
        """Do what is left, wait for the device, and return what became of the items."""


class LargeLimits(NamedTuple):
    """Above which sizes a worker computes a request in pieces: work (elements times losses), bytes with the answer's."""

    work: int
    byte_count: int

    def is_above(self, plan: JobPlan) -> bool:
        """Return whether a request is."""
        return plan.work > self.work or plan.byte_count > self.byte_count


# Nothing is that large.
UNLIMITED: Final = (1 << 63) - 1


class DeviceWorker(Protocol):
    """Computes batches on one device. `is_large` is called from any thread, all else by one at a time."""

    @property
    def device(self) -> str:
        """The device's name, as torch writes it: "cpu", "cuda:0"."""

    @property
    def slots(self) -> int:
        """How many batches may be under way at a time."""

    @property
    def inline_work(self) -> int:
        """Batches of at most this much work, elements times losses, cost less than handing them to another thread."""

    @property
    def is_lost(self) -> bool:
        """Whether the device failed for good, so that only a new process can use it again."""

    def is_large(self, plan: JobPlan) -> bool:
        """Return whether a request is to be submitted alone, because it is computed in pieces."""

    def warm_up(self) -> None:
        """Do once what must not be done at the first request: compile, allocate, touch the device."""

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        """Begin to compute items: one large one, or any number of others.

        Never raises for what an item is: an item that fails, fails alone, as a WorkFailure.
        """

    def close(self) -> None:
        """Give back what `warm_up` took."""
