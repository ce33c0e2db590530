"""Where the CPU worker writes one job's outputs: into memory of its own, or where the item says that they are wanted."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from typing import Final

import numpy as np

from lossgrad_server.engine.cpu_layout import JOB, OUTPUT, SPEC
from lossgrad_server.engine.cpu_memory import OUTPUT_ALIGNMENT, output_memory
from lossgrad_server.engine.cpu_program import Program
from lossgrad_server.work import Buffer, WorkItem

_WORD: Final = struct.Struct("=q")
_OFFSET_FIELD: Final = int(OUTPUT.fields["offset"][1]) if OUTPUT.fields else 0


class JobOutputs:
    """The memory of one job's outputs, and the program that writes there.

    `parts` are the outputs, in the order of `JobPlan.outputs`; one that is written where it is wanted is the item's
    destination itself. An operand is never overwritten, because the kernels read it again: a chunk that holds NaN or
    infinity a second time, and every chunk once for each loss.
    """

    def __init__(self, program: Program, item: WorkItem) -> None:
        """MemoryError if there is no room for the outputs."""
        addresses = _destinations(program, item)
        self.program = program
        self.memory = output_memory(OUTPUT_ALIGNMENT if addresses and all(addresses) else program.output_bytes)
        parts: list[Buffer] = [self.memory[begin:end] for begin, end in program.output_spans]
        if any(addresses):
            self.program = _redirected(program, addresses, _address(self.memory))
            for index, address in enumerate(addresses):
                destination = item.destinations[index]
                if address and destination is not None:
                    parts[index] = destination
        self.parts = tuple(parts)


def only_destination(program: Program, item: WorkItem) -> memoryview | None:
    """Return where the item wants its output, if it has one only and writable memory of its size is given for it."""
    if len(item.destinations) != 1 or len(program.output_spans) != 1:
        return None
    destination = item.destinations[0]
    begin, end = program.output_spans[0]
    if not isinstance(destination, memoryview) or destination.readonly or len(destination) != end - begin or begin:
        return None
    return destination


def has_destinations(item: WorkItem) -> bool:
    """Return whether the item says where any of its outputs are wanted."""
    return any(destination is not None for destination in item.destinations)


def _destinations(program: Program, item: WorkItem) -> list[int]:
    """Return for each output the address where it is wanted and can be written; 0 where the worker's memory is taken."""
    if len(item.destinations) != len(program.output_spans):
        return [0] * len(program.output_spans)
    operands = [(address, address + len(operand)) for operand in item.operands if (address := _address(operand))]
    addresses: list[int] = []
    for destination, (begin, end) in zip(item.destinations, program.output_spans, strict=True):
        size = end - begin
        address = 0
        if size and destination is not None and len(destination) == size and not memoryview(destination).readonly:
            address = _address(destination)
        if address % OUTPUT_ALIGNMENT or any(first < address + size and address < last for first, last in operands):
            address = 0
        addresses.append(address)
    return addresses


def _redirected(program: Program, addresses: list[int], base: int) -> Program:
    """Return the program with outputs at addresses of their own; the kernels add offsets to `base`."""
    code = bytearray(program.code)
    first = JOB.itemsize + program.spec_count * SPEC.itemsize + _OFFSET_FIELD
    for index, address in enumerate(addresses):
        if address:
            _WORD.pack_into(code, first + index * OUTPUT.itemsize, address - base)
    return replace(program, code=bytes(code))


def _address(buffer: Buffer) -> int:
    if not len(buffer):
        return 0
    if isinstance(buffer, memoryview) and not buffer.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # in a sixth of the time that NumPy takes
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
