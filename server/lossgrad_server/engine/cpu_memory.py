"""The memory that the CPU worker keeps between batches, and its calls into machine code."""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from lossgrad_server.engine.cpu_kernel import Call, Kernel
from lossgrad_server.engine.cpu_layout import SCRATCH_BYTES, Walk
from lossgrad_server.work import SPEC_RESULT, Buffer

_CACHE_LINE: Final = 64
_PY_BUFFER_WORDS: Final = 10
_BATCH: Final = -1


class Memory:
    """A block of memory at a fixed address, on a cache line. Grows, and then forgets what it held."""

    def __init__(self, byte_count: int) -> None:
        self._allocate(byte_count)

    def _allocate(self, byte_count: int) -> None:
        self._array = np.empty(byte_count + _CACHE_LINE, np.uint8)
        self.byte_count = byte_count
        self.address = -(-self._array.ctypes.data // _CACHE_LINE) * _CACHE_LINE
        first = self.address - self._array.ctypes.data
        self.view = memoryview(self._array)[first : first + byte_count]

    def grow(self, byte_count: int) -> None:
        """Have at least so many bytes."""
        if byte_count > self.byte_count:
            self._allocate(2 * byte_count)


def output_memory(byte_count: int) -> memoryview:
    """Return fresh memory for answers, which leaves with them."""
    return memoryview(np.empty(byte_count, np.uint8))


class BufferTable:
    """Finds out where buffers are and how long they are."""

    def __init__(self, kernel: Kernel) -> None:
        self._resolve = kernel.resolve
        self._addresses = Memory(8 * 1024)
        self._lengths = Memory(8 * 1024)
        self._py_buffer = Memory(8 * _PY_BUFFER_WORDS)

    def resolve(self, operands: list[Buffer], outputs: memoryview, sizes: bytes) -> tuple[int, int]:
        """Return the address of the array of the operands' addresses, and the address of the outputs' memory.

        ValueError unless the operands have the `sizes`, int64 in bytes. What is returned holds until the next call.
        """
        count = len(operands) + 1
        self._addresses.grow(8 * count)
        self._lengths.grow(8 * count)
        buffers = [*operands, outputs]
        resolved = self._resolve(buffers, count, self._addresses.address, self._lengths.address, self._py_buffer.address)
        if resolved != count:
            raise ValueError(f"operand {resolved} of {len(operands)} is no contiguous buffer")
        lengths = self._lengths.view[: 8 * len(operands)].tobytes()
        if lengths != sizes:
            got, expected = np.frombuffer(lengths, np.int64).tolist(), np.frombuffer(sizes, np.int64).tolist()
            raise ValueError(f"the operands have {got} bytes, their plans say {expected}")
        (address,) = self._addresses.view[8 * len(operands) : 8 * count].cast("q")
        return self._addresses.address, address

    def copy(self, count: int) -> Memory:
        """Return a copy of the first addresses that the last call of `resolve` found."""
        copy = Memory(8 * count)
        copy.view[:] = self._addresses.view[: 8 * count]
        return copy


class Arena:
    """The scratch memory of each thread, and the state and results of the batch that is being computed."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self._kernel = kernel
        self._scratch = [Memory(SCRATCH_BYTES) for _ in range(threads)]
        self._state = Memory(1 << 16)
        self._results = Memory(1 << 16)
        self._spare: list[Memory] = []
        self._call = Call(scratch=self._scratch[0].address, loops=kernel.loops.ctypes.data, walk=_BATCH)
        self._call_address = ctypes.addressof(self._call)

    @property
    def threads(self) -> int:
        """How many threads may compute at a time."""
        return len(self._scratch)

    def compute(self, code: bytes, operands: int, outputs: int, *, state_bytes: int, spec_count: int, job_count: int,
                holding_gil: bool) -> bytes:  # fmt: skip
        """Compute jobs from first to last. Returns their SPEC_RESULT records."""
        self._state.grow(state_bytes)
        self._results.grow(SPEC_RESULT.size * spec_count)
        call = self._call
        call.program = _address_of_bytes(code)
        call.operands = operands
        call.outputs = outputs
        call.results = self._results.address
        call.state = self._state.address
        call.job_count = job_count
        if holding_gil:
            self._kernel.compute_holding_gil(self._call_address)
        else:
            self._kernel.compute_without_gil(self._call_address)
        return self._results.view[: SPEC_RESULT.size * spec_count].tobytes()

    def walk(self, frame: dict[str, int], thread: int, walk: Walk, begin: int, end: int) -> None:
        """Do units of a walk of one job. Called by one of the threads, for which `thread` is the scratch memory."""
        call = Call(
            **frame,
            scratch=self._scratch[thread].address,
            loops=self._kernel.loops.ctypes.data,
            walk=int(walk),
            begin=begin,
            end=end,
        )
        self._kernel.compute_without_gil(ctypes.addressof(call))

    def take_state(self, byte_count: int) -> Memory:
        """Return memory for the state of a job that is computed in pieces; to be given back."""
        memory = self._spare.pop() if self._spare else Memory(byte_count)
        memory.grow(byte_count)
        return memory

    def give_back(self, memory: Memory) -> None:
        """Keep the memory for the next job."""
        self._spare.append(memory)


def _address_of_bytes(data: bytes) -> int:
    # c_char_p keeps the address of the bytes object's own memory.
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
