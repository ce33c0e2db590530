"""The worker that computes on the CPU with the compiled kernels. Needs neither torch nor a GPU.

Owned by one thread, the batcher's: all methods are called from it, and nothing here locks. It computes small requests by
itself, a batch of them in one call into machine code. Large ones are cut into pieces, and each piece is shared with the
worker's other threads; whoever advances a pending decides what else runs between two pieces. While machine code runs, nobody
holds the GIL, unless it is over sooner than taking it back would be.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import Final

from lossgrad_server.engine.cpu_kernel import load_kernel
from lossgrad_server.engine.cpu_layout import CHUNK, LANES
from lossgrad_server.engine.cpu_memory import Arena, OperandMismatch, output_memory
from lossgrad_server.engine.cpu_pieces import PendingPieces, Pieces
from lossgrad_server.engine.cpu_program import Program, program_of
from lossgrad_server.engine.placement import JobOutputs, has_destinations, only_destination
from lossgrad_server.errors import InternalError
from lossgrad_server.jobs import JobPlan, unpack_header
from lossgrad_server.work import (
    UNLIMITED,
    BatchResult,
    Buffer,
    Done,
    FailureKind,
    LargeLimits,
    Pending,
    Retry,
    WorkFailure,
    WorkItem,
    WorkResult,
)

logger = logging.getLogger(__name__)

# Raised whenever the same request may get other bits from this engine than from the one before.
KERNEL_VERSION: Final = 2

# Requests of more work than this, elements times losses, are computed in pieces of this much for each thread. At 0.3 to
# 0.5 ns an element this is half a millisecond: what a small request waits at most.
PIECE_WORK: Final = 1 << 20
# Batches of less work than this keep the GIL: they take less time than another thread may keep us waiting for it.
_HOLDING_GIL_WORK: Final = 1 << 15
# Batches of at most this much work may be computed in the event loop's thread, which takes some 100 us: no more than a
# hand-over to another thread and back. At 1 MiB it was 1.08 and 1.14 times as fast for one caller and for eight, where
# cases that it cannot change moved by 0.94 and 0.85: so it is no loss, and not shown to be a gain.
INLINE_WORK: Final = 1 << 18

Outcome = WorkResult | WorkFailure


def determinism() -> str:
    """Return what the results' bits depend on. Equal strings mean equal bits; x86-64 CPUs of any age give the same."""
    return f"lossgrad-cpu {KERNEL_VERSION}; chunks of {CHUNK}, {LANES} lanes folded in half, added exactly"


class CpuWorker:
    """Computes batches on the CPU. Implements work.DeviceWorker."""

    def __init__(self, threads: int = 1, *, piece_work: int = PIECE_WORK) -> None:
        """`threads` is how many threads share a piece of a large request, the caller's included."""
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self._threads = threads
        self._piece_work = piece_work
        self._retries: list[Retry] = []  # of the batch that is being computed

    @property
    def device(self) -> str:
        """The device's name, as torch writes it."""
        return "cpu"

    @property
    def slots(self) -> int:
        """Two: a large request that is under way, and the batches that run between its pieces."""
        return 2

    @property
    def inline_work(self) -> int:
        """Above this, a core's time on it would hold up others for longer than a hand-over takes."""
        return INLINE_WORK

    @property
    def is_lost(self) -> bool:
        """Never: a CPU does not fail alone."""
        return False

    def is_large(self, plan: JobPlan) -> bool:
        """Return whether a request is computed in pieces."""
        return plan.element_count * len(plan.specs) > self._piece_work

    @property
    def large_limits(self) -> LargeLimits:
        """What `is_large` goes by."""
        return LargeLimits(self._piece_work, UNLIMITED)

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        """Compute the items at once, but a large one that comes alone in the pieces that its pending is advanced by."""
        if len(items) != 1 or not self.is_large(unpack_header(items[0].header)):
            return Done(self.run(items))
        started = perf_counter_ns()
        try:
            pieces = self.begin(items[0])
        except Exception as error:
            return Done(BatchResult([failure(error, program_of(items[0].header))], 0, 0, 0))
        return PendingPieces(pieces, lambda error: failure(error, program_of(items[0].header)), started)

    def warm_up(self) -> None:
        """Compile the kernels, or read them from the cache, and allocate what is kept between batches."""
        self._arena = Arena(load_kernel(), self._threads)
        self._pool = ThreadPoolExecutor(self._threads - 1, "lossgrad-cpu") if self._threads > 1 else None

    def close(self) -> None:
        """Stop the other threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        """Compute the items. An item that fails, fails alone, as a WorkFailure."""
        times = [0, 0, 0]
        self._retries.clear()
        started = perf_counter_ns()
        try:
            programs = [program_of(item.header) for item in items]
            if any(program.work > self._piece_work for program in programs):
                programs.clear()
        except Exception:
            programs = []
        if programs:
            times[0] = perf_counter_ns() - started
            outcomes = self._run_small(items, programs, times)
            return BatchResult(outcomes, times[0], times[1], times[2], tuple(self._retries))
        return self._run_mixed(items)

    def _run_mixed(self, items: Sequence[WorkItem]) -> BatchResult:
        """Compute items of which some are large, or not as they should be."""
        times = [0, 0, 0]
        outcomes: dict[int, Outcome] = {}
        small: dict[int, Program] = {}
        for index, item in enumerate(items):
            try:
                program = program_of(item.header)
            except Exception as error:
                outcomes[index] = failure(error, None)
                continue
            if program.work > self._piece_work:
                outcomes[index] = self._run_large(item, times)
            else:
                small[index] = program
        computed = self._run_small([items[index] for index in small], list(small.values()), times)
        outcomes.update(zip(small, computed, strict=True))
        in_order = [outcomes[index] for index in range(len(items))]
        return BatchResult(in_order, times[0], times[1], times[2], tuple(self._retries))

    def begin(self, item: WorkItem) -> Pieces:
        """Prepare to compute one item piece by piece: call `advance` on what this returns until it is done.

        Other items may be run between two pieces. Raises what is wrong with the item.
        """
        return Pieces(self._arena, self._pool, program_of(item.header), item, self._piece_work)

    def _run_large(self, item: WorkItem, times: list[int]) -> Outcome:
        started = perf_counter_ns()
        try:
            pieces = self.begin(item)
            packed = perf_counter_ns()
            while not pieces.advance():
                pass
            computed = perf_counter_ns()
            result = pieces.result()
        except Exception as error:
            return failure(error, program_of(item.header))
        times[0] += packed - started
        times[1] += computed - packed
        times[2] += perf_counter_ns() - computed
        return result

    def _run_small(self, items: Sequence[WorkItem], programs: list[Program], times: list[int]) -> list[Outcome]:
        """Compute items in one call. Where that cannot be done, one by one, so that the culprit fails alone."""
        if not items:
            return []
        if any(map(has_destinations, items)):
            return self._run_placed(items, programs, times)
        started = perf_counter_ns()
        output_bytes = work = 0
        buffers: list[Buffer] = []
        try:
            for item, program in zip(items, programs, strict=True):
                if len(item.operands) != program.operand_count:
                    raise OperandMismatch
                buffers += item.operands
                output_bytes += program.output_bytes
                work += program.work
            memory = output_memory(output_bytes)
            buffers.append(memory)
            packed = perf_counter_ns()
            records = self._arena.compute(programs, buffers, holding_gil=work < _HOLDING_GIL_WORK)
        except Exception as error:
            if len(items) == 1:
                return [failure(error, programs[0])]
            self._retries.append(Retry.OUT_OF_MEMORY if isinstance(error, MemoryError) else Retry.ERROR)
            return [self._run_small([item], [program], times)[0] for item, program in zip(items, programs, strict=True)]
        computed = perf_counter_ns()
        outcomes: list[Outcome] = []
        first_byte = first_result = 0
        for program in programs:
            last_result = first_result + program.result_bytes
            outputs = tuple([memory[first_byte + begin : first_byte + end] for begin, end in program.output_spans])
            outcomes.append(program.result(records[first_result:last_result], outputs))
            first_result = last_result
            first_byte += program.output_bytes
        times[0] += packed - started
        times[1] += computed - packed
        times[2] += perf_counter_ns() - computed
        return outcomes

    def _run_placed(self, items: Sequence[WorkItem], programs: list[Program], times: list[int]) -> list[Outcome]:
        """Compute items of which some say where outputs are wanted: those by themselves, the others in one call."""
        outcomes: dict[int, Outcome] = {}
        others = [index for index, item in enumerate(items) if not has_destinations(item)]
        computed = self._run_small([items[index] for index in others], [programs[index] for index in others], times)
        outcomes.update(zip(others, computed, strict=True))
        for index, (item, program) in enumerate(zip(items, programs, strict=True)):
            if index in outcomes:
                continue
            started = packed = perf_counter_ns()
            try:
                if len(item.operands) != program.operand_count:
                    raise OperandMismatch
                only = only_destination(program, item) if program.work >= _HOLDING_GIL_WORK else None
                if only is not None and (record := self._arena.compute_into(program, item.operands, only)) is not None:
                    outcomes[index] = program.result(record, (only,))
                    continue
                outputs = JobOutputs(program, item)
                packed = perf_counter_ns()
                buffers: list[Buffer] = [*item.operands, outputs.memory]
                scalars = self._arena.compute([outputs.program], buffers, holding_gil=program.work < _HOLDING_GIL_WORK)
                outcomes[index] = program.result(scalars, outputs.parts)
            except Exception as error:
                outcomes[index] = failure(error, program)
            finally:
                times[0] += packed - started
                times[1] += perf_counter_ns() - packed
        return [outcomes[index] for index in range(len(items))]


def failure(error: Exception, program: Program | None) -> WorkFailure:
    """Return what a caller is told of an error; the log has the rest."""
    if isinstance(error, MemoryError) and program is not None:
        required = program.output_bytes + program.state_bytes
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        logger.warning("Out of memory: %d bytes required, %d available", required, available)
        message = (
            f"this request takes about {required} bytes of memory on cpu, where {available} are available; "
            "send it in smaller parts, or again when the server is less busy"
        )
        return WorkFailure(FailureKind.OUT_OF_MEMORY, message)
    logger.error("A request failed with an unexpected error", exc_info=error)
    return WorkFailure(FailureKind.INTERNAL, InternalError().message)
