"""The memory that the CPU worker keeps between batches, and its calls into machine code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np

from lossgrad_server.engine.cpu_kernel import Call, Kernel
from lossgrad_server.engine.cpu_layout import SCRATCH_BYTES, Walk
from lossgrad_server.engine.cpu_program import Program
from lossgrad_server.work import Buffer

_CACHE_LINE: Final = 64
_ALL_WALKS: Final = -1
# Below this, memory that is filled with zeros costs less than numpy's.
_BYTEARRAY_BYTES: Final = 1 << 13
# Above this, finding out where memory lies costs nothing beside what is done with it.
_ALIGNED_BYTES: Final = 1 << 16

# What the kernels' loops take for granted of an output's address: the alignment of the widest element.
OUTPUT_ALIGNMENT: Final = 8
_MOST_OPERANDS: Final = 4


class OperandMismatch(ValueError):
    """A job's operands are not what its program says."""

    def __init__(self) -> None:
        super().__init__("the operands are not as many contiguous buffers, of such lengths, as the plan says")


class Memory:
    """A block of memory at a fixed address, on a cache line. Grows, and then forgets what it held."""

    def __init__(self, byte_count: int) -> None:
        self._allocate(byte_count)

    def _allocate(self, byte_count: int) -> None:
        self._array = np.empty(byte_count + _CACHE_LINE, np.uint8)
        self.byte_count = byte_count
        self.address = -(-self._array.ctypes.data // _CACHE_LINE) * _CACHE_LINE

    def grow(self, byte_count: int) -> None:
        """Have at least so many bytes."""
        if byte_count > self.byte_count:
            self._allocate(2 * byte_count)


def output_memory(byte_count: int) -> memoryview:
    """Return fresh memory for answers, which leaves with them. Large ones start on a cache line."""
    if byte_count <= _BYTEARRAY_BYTES:
        return memoryview(bytearray(byte_count))
    memory = np.empty(byte_count + _CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % _CACHE_LINE if byte_count > _ALIGNED_BYTES else 0
    return memoryview(memory)[first : first + byte_count]


def _words_at(memory: Memory) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * _MOST_OPERANDS).from_address(memory.address)


class Arena:
    """The scratch memory of each thread, and the state, addresses and results of the batch that is being computed."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self._kernel = kernel
        self._gather = kernel.gather
        self._scratch = [Memory(SCRATCH_BYTES) for _ in range(threads)]
        self._state = Memory(1 << 16)
        self._addresses = Memory(1 << 13)
        self._results = Memory(1 << 13)
        self._spare: list[Memory] = []
        self._call = Call(
            state=self._state.address,
            results=self._results.address,
            scratch=self._scratch[0].address,
            loops=kernel.loops.ctypes.data,
            addresses=self._addresses.address,
            walk=_ALL_WALKS,
        )
        self._call_address = ctypes.addressof(self._call)
        self._words = _words_at(self._addresses)
        self._result_bytes = 0
        self._code = b""
        # Job count, and whether the GIL is held, as they were last written to the call.
        self._batch = (0, False)

    @property
    def threads(self) -> int:
        """How many threads may compute at a time."""
        return len(self._scratch)

    def compute(self, programs: Sequence[Program], buffers: list[Buffer], *, holding_gil: bool) -> bytes:
        """Compute jobs from first to last. Returns their SPEC_RESULT records.

        `buffers` are the jobs' operands and, last, the memory for their outputs. OperandMismatch before anything is
        computed if a job's operands are not what its program says.
        """
        self._gather_all(programs, buffers, holding_gil=holding_gil)
        if not holding_gil:
            self._kernel.compute_without_gil(self._call_address)
        return ctypes.string_at(self._results.address, self._result_bytes)

    def compute_into(self, program: Program, operands: Sequence[Buffer], destination: memoryview) -> bytes | None:
        """Compute a job into the memory that its only output is wanted in; return its SPEC_RESULT record.

        None, and nothing is done, where that is not aligned, or overlaps an operand, which is read more than once.
        OperandMismatch as `compute`. Without the GIL.
        """
        self._gather_all((program,), [*operands, destination], holding_gil=False)
        # Machine code has just found the addresses; NumPy takes ten times as long for one.
        begin = self._call.outputs
        end = begin + len(destination)
        if begin % OUTPUT_ALIGNMENT:
            return None
        for address, operand in zip(self._words, operands, strict=False):
            if begin < address + len(operand) and address < end:
                return None
        self._kernel.compute_without_gil(self._call_address)
        return ctypes.string_at(self._results.address, self._result_bytes)

    def _gather_all(self, programs: Sequence[Program], buffers: list[Buffer], *, holding_gil: bool) -> None:
        first = programs[0]
        code, result_bytes, state_bytes = first.code, first.result_bytes, first.state_bytes
        if len(programs) > 1:
            code = b"".join([program.code for program in programs])
            result_bytes = sum([program.result_bytes for program in programs])
            state_bytes = max([program.state_bytes for program in programs])
        if (
            state_bytes > self._state.byte_count
            or result_bytes > self._results.byte_count
            or 8 * len(buffers) > self._addresses.byte_count
        ):
            self._grow(state_bytes, result_bytes, 8 * len(buffers))
        # Setting a field takes as long as a small job, and most batches are like the last.
        if (len(programs), holding_gil) != self._batch:
            self._batch = len(programs), holding_gil
            self._call.job_count, self._call.computes = self._batch
        self._result_bytes = result_bytes
        self._code = code  # the kernels know its address only, and read it when this has returned
        if self._gather(self._call_address, code, buffers):
            raise OperandMismatch

    def _grow(self, state_bytes: int, result_bytes: int, address_bytes: int) -> None:
        self._state.grow(state_bytes)
        self._results.grow(result_bytes)
        self._addresses.grow(address_bytes)
        self._call.state = self._state.address
        self._call.results = self._results.address
        self._call.addresses = self._addresses.address
        self._words = _words_at(self._addresses)

    def open_job(self, program: Program, buffers: list[Buffer]) -> OpenJob:
        """Prepare to compute one job walk by walk. `buffers` as for `compute`, and it raises the same."""
        state = self._spare.pop() if self._spare else Memory(program.state_bytes)
        state.grow(program.state_bytes)
        return OpenJob(self._kernel, self._scratch, state, program, buffers)

    def close_job(self, job: OpenJob) -> None:
        """Keep the job's memory for the next."""
        self._spare.append(job.state)


class OpenJob:
    """One job that is computed walk by walk, with memory of its own for all that must outlive other jobs in between."""

    def __init__(
        self, kernel: Kernel, scratch: list[Memory], state: Memory, program: Program, buffers: list[Buffer]
    ) -> None:
        self.state = state
        self._kernel = kernel
        self._scratch = scratch
        self._result_bytes = program.result_bytes
        self._results = Memory(program.result_bytes)
        self._addresses = Memory(8 * len(buffers))
        # The kernels know addresses only.
        self._held = (program.code, buffers)
        self._call = Call(
            state=state.address,
            results=self._results.address,
            loops=kernel.loops.ctypes.data,
            addresses=self._addresses.address,
            job_count=1,
        )
        if len(buffers) != program.operand_count + 1 or kernel.gather(
            ctypes.addressof(self._call), program.code, buffers
        ):
            raise OperandMismatch

    def walk(self, which: Walk, begin: int, end: int, thread: int) -> None:
        """Do units of a walk, without the GIL. `thread` says whose scratch memory to use."""
        call = Call.from_buffer_copy(self._call)
        call.scratch = self._scratch[thread].address
        call.walk, call.begin, call.end = which, begin, end
        self._kernel.compute_without_gil(ctypes.addressof(call))

    @property
    def scalars(self) -> bytes:
        """The job's SPEC_RESULT records, once all walks are done."""
        return ctypes.string_at(self._results.address, self._result_bytes)
