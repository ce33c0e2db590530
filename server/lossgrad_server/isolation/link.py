"""One device process as the server sees it: its channel, its slots, the batches that it has been given.

Belongs to the keeper until the process is warm, then to the batcher's thread. Only `kill` is called from any thread.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from lossgrad_api.raw_bytes import new_bytes, writable_view
from lossgrad_server.isolation import channel as channels
from lossgrad_server.isolation import records
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.isolation.memory import SharedMemory, sealed_file
from lossgrad_server.isolation.records import ANSWER, ITEM, PLAN, BatchDone, BlockLayout, DeviceMemory, Facts, Kind, Run
from lossgrad_server.work import Buffer, FailureKind, WorkFailure, WorkItem, WorkResult

# A slot has at least this much, and what it needed of the largest batch of late.
LEAST_SLOT_BYTES: Final = 4 << 20
# Pages beyond it are given back where a slot has not been used for this long.
IDLE_SECONDS: Final = 5.0
# Outputs above this are copied without the GIL, into memory that is not filled with zeros first.
_LARGE_BYTES: Final = 32 * 1024


class ProcessLost(Exception):
    """The process is gone, or is to be taken for gone: nothing more comes from it."""


class _Slot:
    __slots__ = ("byte_count", "has_pages", "memory", "number", "used_at")

    def __init__(self, number: int) -> None:
        self.number = number
        self.byte_count = 0
        self.memory: SharedMemory | None = None
        self.used_at = 0.0
        self.has_pages = False


class Batch:
    """Items in a slot, under way."""

    __slots__ = ("byte_count", "done", "items", "layouts", "number", "offsets", "pack_ns", "slot", "started")

    def __init__(self, number: int, slot: _Slot, items: list[WorkItem], layouts: list[BlockLayout]) -> None:
        self.number = number
        self.slot = slot
        self.items = items
        self.layouts = layouts
        self.offsets: list[int] = []
        self.byte_count = 0
        self.pack_ns = 0
        self.started = 0.0  # on time.monotonic's clock
        self.done: BatchDone | None = None


class Link:
    """A device process."""

    def __init__(self, channel: socket.socket, process: int, process_id: int) -> None:
        """`process` is a descriptor of the process; both it and the channel belong to the link from now on."""
        self.channel = channel
        self.process = process
        self.process_id = process_id
        self.loss: Loss | None = None  # why the server ended it
        self.slot_count = 0
        self.memory: DeviceMemory | None = None  # as the process last said
        self._free: list[_Slot] = []  # under the lock, because the keeper trims them
        self._lock = threading.Lock()
        self._under_way: dict[int, Batch] = {}
        self._plans: dict[bytes, int] = {}
        self._next_number = 0
        self._progress_at = 0.0  # when the process last finished a batch

    # ---- Coming up ----

    def receive_facts(self, timeout_seconds: float) -> Facts:
        """Return what the worker says of itself. ValueError where there is no such device, ProcessLost."""
        packet = self._receive(timeout_seconds)
        if records.kind_of(packet) == Kind.REFUSED:
            raise ValueError(records.unpack_text(packet))
        return Facts.unpack(packet)

    def warm_up(self, slot_count: int, timeout_seconds: float | None) -> None:
        """Have the worker warm up, and give it slots. RuntimeError with its reason where it fails, ProcessLost."""
        self._send(records.simple(Kind.WARM_UP))
        packet = self._receive(timeout_seconds)
        if records.kind_of(packet) == Kind.FAILED:
            raise RuntimeError(records.unpack_text(packet))
        self.slot_count = slot_count
        self._free = [_Slot(number) for number in range(slot_count)]

    # ---- Batches ----

    @property
    def under_way(self) -> list[Batch]:
        """The batches that have not been answered."""
        return list(self._under_way.values())

    def begin(self, items: Sequence[WorkItem], layouts: Sequence[BlockLayout]) -> Batch:
        """Copy items into a free slot and let the process compute them. Raises ProcessLost; OSError, MemoryError."""
        with self._lock:
            slot = self._free.pop()
        batch = Batch(self._next_number, slot, list(items), list(layouts))
        began = time.perf_counter_ns()
        try:
            run = self._write(batch)
        except BaseException:
            self._give_back(slot)
            raise
        self._next_number = (self._next_number + 1) & 0xFFFFFFFF
        self._under_way[batch.number] = batch
        batch.started = time.monotonic()
        batch.pack_ns = time.perf_counter_ns() - began
        self._send(run.pack())
        return batch

    def has_free_slot(self) -> bool:
        """Whether `begin` may be called."""
        return bool(self._free)

    def poll(self, timeout_seconds: float) -> bool:
        """Take note of what is done; wait up to so long for the first. Return whether anything was. Raises ProcessLost."""
        has_any = False
        while True:
            packet = self._receive(timeout_seconds, is_optional=True)
            if not packet:
                return has_any
            done = BatchDone.unpack(packet)
            batch = self._under_way.pop(done.number, None)
            if batch is None or batch.slot.number != done.slot:
                raise ProcessLost("it answers what it was not asked")
            batch.done = done
            self.memory = done.memory or self.memory
            self._progress_at = time.monotonic()
            has_any, timeout_seconds = True, 0.0

    def seconds_left(self, batch: Batch, limit_seconds: float, now: float) -> float:
        """Return how long a batch may still take before the process is taken for hung.

        The process does one after another, so what counts is since when it has finished none.
        """
        return max(batch.started, self._progress_at) + limit_seconds - now

    def outcomes(self, batch: Batch) -> list[WorkResult | WorkFailure]:
        """Copy a done batch's answers out, and free its slot."""
        memory = batch.slot.memory
        assert memory is not None  # noqa: S101
        try:
            return [
                _outcome(memory, item, layout, offset)
                for item, layout, offset in zip(batch.items, batch.layouts, batch.offsets, strict=True)
            ]
        finally:
            self._give_back(batch.slot)

    def _give_back(self, slot: _Slot) -> None:
        slot.used_at = time.monotonic()
        with self._lock:
            self._free.append(slot)

    def trim(self) -> None:
        """Give back the pages of slots that are long unused. In any thread."""
        latest = time.monotonic() - IDLE_SECONDS
        with self._lock:
            for slot in self._free:
                if slot.memory is not None and slot.has_pages and slot.used_at <= latest:
                    slot.memory.free_pages()
                    slot.has_pages = False

    # ---- Going down ----

    def kill(self, loss: Loss) -> None:
        """Kill the process. In any thread; the first reason counts."""
        self.loss = self.loss or loss
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)

    def say_goodbye(self) -> None:
        """Tell the process that there will be no more batches: it ends by itself."""
        with suppress(ProcessLost):
            self._send(records.simple(Kind.CLOSE))

    def close(self) -> None:
        """Let go of the process, which ends if it has not, and of its memory."""
        self.channel.close()
        os.close(self.process)
        with self._lock:
            for slot in [*self._free, *(batch.slot for batch in self._under_way.values())]:
                if slot.memory is not None:
                    slot.memory.close()
                    slot.memory = None
            self._free.clear()

    # ---- Inside ----

    def _write(self, batch: Batch) -> Run:
        """Fill a slot."""
        plans = self._plans
        new: dict[bytes, int] = {}
        forgets = len(plans) + len(batch.items) > records.MAX_PLANS and bool(plans)
        if forgets:
            plans.clear()
        numbers: list[int] = []
        for item in batch.items:
            number = plans.get(item.header)
            if number is None:
                number = plans[item.header] = new[item.header] = len(plans)
            numbers.append(number)
        end = len(batch.items) * ITEM.size + len(new) * PLAN.size
        headers: list[int] = []
        for header in new:
            headers.append(end)
            end += len(header)
        try:
            end = records.aligned(end)
            for layout in batch.layouts:
                batch.offsets.append(end)
                end += layout.byte_count
            memory = self._memory(batch.slot, end)
        except BaseException:
            for header in new:
                del plans[header]
            raise
        batch.byte_count = end
        view = memory.view
        for index, (number, offset) in enumerate(zip(numbers, batch.offsets, strict=True)):
            ITEM.pack_into(view, index * ITEM.size, number, offset)
        begin = len(batch.items) * ITEM.size
        for (header, number), offset in zip(new.items(), headers, strict=True):
            PLAN.pack_into(view, begin, number, len(header), offset)
            view[offset : offset + len(header)] = header
            begin += PLAN.size
        write = memory.write
        for item, layout, offset in zip(batch.items, batch.layouts, batch.offsets, strict=True):
            for operand, (begin, _) in zip(item.operands, layout.operands, strict=True):
                write(offset + begin, operand)
        return Run(forgets, batch.slot.number, batch.number, len(batch.items), len(new))

    def _memory(self, slot: _Slot, byte_count: int) -> SharedMemory:
        """Return the slot's memory, new where it is too small."""
        slot.has_pages = True
        if slot.memory is None or slot.byte_count < byte_count:
            size = max(LEAST_SLOT_BYTES, 1 << (byte_count - 1).bit_length())
            descriptor = sealed_file(size)
            try:
                memory = SharedMemory(descriptor, size)
                self._send(records.pack_map(slot.number, size), descriptor)
            finally:
                os.close(descriptor)
            if slot.memory is not None:
                slot.memory.close()
            slot.memory, slot.byte_count = memory, size
        return slot.memory

    def _send(self, packet: bytes, descriptor: int | None = None) -> None:
        try:
            channels.send(self.channel, packet, descriptor)
        except OSError as error:
            raise ProcessLost(str(error)) from None

    def _receive(self, timeout_seconds: float | None, *, is_optional: bool = False) -> bytes:
        """Return the next packet. Where none comes in time: b"" if it is optional, otherwise ProcessLost."""
        try:
            if timeout_seconds != 0 and not channels.is_readable(self.channel, timeout_seconds):
                raise BlockingIOError
            packet, _ = channels.receive(self.channel, is_waiting=False)
        except BlockingIOError:
            if is_optional:
                return b""
            self.kill(Loss.HUNG)
            raise ProcessLost(f"it said nothing for {timeout_seconds} s") from None
        except OSError as error:
            raise ProcessLost(str(error)) from None
        if not packet:
            raise ProcessLost("it ended")
        return packet


def _outcome(memory: SharedMemory, item: WorkItem, layout: BlockLayout, offset: int) -> WorkResult | WorkFailure:
    view = memory.view
    kind, length = ANSWER.unpack_from(view, offset + layout.answer)
    if kind:
        begin = offset + layout.answer + ANSWER.size
        return WorkFailure(FailureKind(kind), bytes(view[begin : begin + length]).decode(errors="replace"))
    begin, size = layout.scalars
    scalars = bytes(view[offset + begin : offset + begin + size])
    begin, size = layout.totals
    totals = bytes(view[offset + begin : offset + begin + size]) if size else b""
    if not item.destinations:
        outputs: list[Buffer] = [_copy_of(memory, offset + begin, size) for begin, size in layout.outputs]
        return WorkResult(scalars, tuple(outputs), totals)
    outputs = []
    for wanted, (begin, size) in zip(item.destinations, layout.outputs, strict=True):
        if wanted is not None and len(wanted) == size and not memoryview(wanted).readonly:
            if size:
                memory.read_into(offset + begin, wanted)
            outputs.append(wanted)
        else:
            outputs.append(_copy_of(memory, offset + begin, size))
    return WorkResult(scalars, tuple(outputs), totals)


def _copy_of(memory: SharedMemory, offset: int, size: int) -> bytes:
    if size <= _LARGE_BYTES:
        return bytes(memory.view[offset : offset + size])
    made, address = new_bytes(size)
    memory.read_into(offset, writable_view(address, size))
    return made
