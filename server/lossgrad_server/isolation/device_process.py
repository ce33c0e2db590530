"""What runs in a device process: the engine's worker, told over its channel what to compute in which slot.

One thread, beside those of the engine. It takes batches in their order, as many as the worker has slots for; between two
pieces of a large request it looks whether another has come. It ends when its channel does, because the server has gone, and
with its parent, the nursery. It is the first that the kernel takes where memory runs out, so that the server stays.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from lossgrad_server.isolation import channel as channels
from lossgrad_server.isolation import records
from lossgrad_server.isolation.memory import SharedMemory
from lossgrad_server.isolation.records import (
    ANSWER,
    ITEM,
    PLAN,
    BatchDone,
    BlockLayout,
    DeviceMemory,
    Facts,
    Kind,
    Run,
)
from lossgrad_server.work import (
    UNLIMITED,
    BatchResult,
    Buffer,
    DeviceWorker,
    LargeLimits,
    Pending,
    Retry,
    WorkFailure,
    WorkItem,
    WorkResult,
)

logger = logging.getLogger(__name__)

# Outputs from this size on are computed where the server reads them; smaller ones are copied there, from a batch's own
# memory, because the engine computes them together.
_IN_PLACE_BYTES: Final = 64 * 1024
_MEMORY_SECONDS: Final = 1.0  # how often it is asked for: asking takes 0.1 ms
_PR_SET_PDEATHSIG: Final = 1
_OOM_SCORE: Final = "500"  # of 1000; what is higher is killed first


class Description(NamedTuple):
    """What a worker's results depend on, its GPU's UUID, empty for a CPU, and its device's model."""

    determinism: str
    gpu_uuid: str
    model: str


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends. `parent` is the process of that thread."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(0)


def run(
    channel: socket.socket,
    create_worker: Callable[[], DeviceWorker],
    describe: Callable[[DeviceWorker], Description],
    own_memory: Callable[[DeviceWorker], Mapping[str, int]],
) -> int:
    """Serve the channel to its end; return the process's exit status. `own_memory` gives the fields of DeviceMemory."""
    faulthandler.enable()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    try:
        worker = create_worker()
        description = describe(worker)
    except ValueError as error:
        channel.send(records.pack_text(Kind.REFUSED, str(error)))
        return 0
    limits = getattr(worker, "large_limits", LargeLimits(UNLIMITED, UNLIMITED))
    try:
        channel.send(Facts(worker.device, *description, worker.slots, worker.inline_work, limits).pack())
        return _DeviceProcess(channel, worker, partial(own_memory, worker)).serve()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the server has gone


class _UnderWay:
    """A batch that the worker has begun."""

    __slots__ = ("layouts", "offsets", "pending", "run")

    def __init__(self, run: Run, pending: Pending, offsets: list[int], layouts: list[BlockLayout]) -> None:
        self.run = run
        self.pending = pending
        self.offsets = offsets
        self.layouts = layouts


class _DeviceProcess:
    def __init__(
        self, channel: socket.socket, worker: DeviceWorker, own_memory: Callable[[], Mapping[str, int]]
    ) -> None:
        self._channel = channel
        self._worker = worker
        self._slots: dict[int, SharedMemory] = {}
        self._plans: dict[int, tuple[bytes, BlockLayout]] = {}
        self._under_way: list[_UnderWay] = []
        self._waiting: list[Run] = []
        self._is_closing = False
        self._own_memory = own_memory
        self._looked_at = -math.inf  # when it was last asked for

    def serve(self) -> int:
        """Compute until there is no more."""
        while not self._is_closing:
            is_idle = not self._under_way and not self._waiting
            self._receive(is_waiting=is_idle)
            while self._waiting and len(self._under_way) < self._worker.slots:
                self._begin(self._waiting.pop(0))
            self._go_on()
        self._worker.close()
        return 0

    def _receive(self, *, is_waiting: bool) -> None:
        """Take all packets that have come; wait for one, if so asked."""
        while not self._is_closing:
            try:
                packet, descriptor = channels.receive(self._channel, is_waiting=is_waiting)
            except BlockingIOError:
                return
            is_waiting = False
            if not packet:
                os._exit(0)  # the server has gone: nobody waits for anything
            kind = records.kind_of(packet)
            if kind == Kind.RUN:
                self._waiting.append(Run.unpack(packet))
            elif kind == Kind.MAP:
                self._map(packet, descriptor)
            elif kind == Kind.WARM_UP:
                self._warm_up()
            elif kind == Kind.CLOSE:
                self._is_closing = True

    def _warm_up(self) -> None:
        try:
            self._worker.warm_up()
        except Exception as error:
            logger.exception("The worker of %s failed to warm up", self._worker.device)
            self._channel.send(records.pack_text(Kind.FAILED, str(error)))
            return
        gc.collect()
        gc.freeze()  # what is here now stays for good
        self._channel.send(records.simple(Kind.WARM))

    def _map(self, packet: bytes, descriptor: int) -> None:
        slot, byte_count = records.unpack_map(packet)
        self._slots[slot] = SharedMemory(descriptor, byte_count)  # the one before goes with its last view
        os.close(descriptor)

    def _begin(self, run: Run) -> None:
        memory = self._slots[run.slot]
        view = memory.view
        if run.forgets_plans:
            self._plans.clear()
        for index in range(run.plan_count):
            number, length, offset = PLAN.unpack_from(view, run.item_count * ITEM.size + index * PLAN.size)
            header = bytes(view[offset : offset + length])
            self._plans[number] = header, records.layout_of(header)
        items: list[WorkItem] = []
        offsets: list[int] = []
        layouts: list[BlockLayout] = []
        read_only = view.toreadonly()
        for number, offset in ITEM.iter_unpack(view[: run.item_count * ITEM.size]):
            header, layout = self._plans[number]
            operands = tuple([read_only[offset + begin : offset + begin + size] for begin, size in layout.operands])
            destinations: tuple[Buffer, ...] = ()
            if layout.output_bytes >= _IN_PLACE_BYTES:
                destinations = tuple([view[offset + begin : offset + begin + size] for begin, size in layout.outputs])
            items.append(WorkItem(header, operands, destinations))
            offsets.append(offset)
            layouts.append(layout)
        self._under_way.append(_UnderWay(run, self._worker.submit(items), offsets, layouts))

    def _go_on(self) -> None:
        """Do a piece of what is large, and hand back what is done. Wait for the device only where there is nothing else."""
        has_more = has_done = False
        for batch in list(self._under_way):
            if batch.pending.advance():
                has_more = True
            elif batch.pending.is_done():
                has_done = True
                self._finish(batch)
        if self._under_way and not has_more and not has_done:
            if len(self._under_way) < self._worker.slots:
                self._receive(is_waiting=False)
                if self._waiting or self._is_closing:
                    return
            self._finish(self._under_way[0])

    def _finish(self, batch: _UnderWay) -> None:
        result = batch.pending.result()
        self._under_way.remove(batch)
        self._answer(batch, result)
        done = BatchDone(
            self._worker.is_lost,
            batch.run.slot,
            batch.run.number,
            result.pack_ns,
            result.compute_ns,
            result.unpack_ns,
            result.retries.count(Retry.OUT_OF_MEMORY),
            result.retries.count(Retry.ERROR),
            self._memory(),
        )
        self._channel.send(done.pack())

    def _memory(self) -> DeviceMemory | None:
        """Return how much memory the worker has; None where that is not known, or was told a moment ago."""
        now = time.monotonic()
        if now - self._looked_at < _MEMORY_SECONDS or self._worker.is_lost:
            return None
        self._looked_at = now
        found = self._own_memory()
        return DeviceMemory(**found) if found else None

    def _answer(self, batch: _UnderWay, result: BatchResult) -> None:
        """Write the outcomes to where the server looks for them."""
        memory = self._slots[batch.run.slot]
        for offset, layout, outcome in zip(batch.offsets, batch.layouts, result.outcomes, strict=True):
            if isinstance(outcome, WorkFailure):
                message = outcome.message.encode()[: records.MAX_MESSAGE_BYTES]
                memory.write(offset + layout.answer, ANSWER.pack(outcome.kind, len(message)) + message)
            else:
                _write_result(memory, offset, layout, outcome)


def _write_result(memory: SharedMemory, offset: int, layout: BlockLayout, result: WorkResult) -> None:
    if (len(result.scalars), len(result.totals)) != (layout.scalars[1], layout.totals[1]):
        raise RuntimeError("the worker's numbers are not those that the plan says")
    memory.write(offset + layout.answer, ANSWER.pack(0, 0) + result.scalars + result.totals)
    outputs: Sequence[Buffer] = result.outputs
    for output, (begin, size) in zip(outputs, layout.outputs, strict=True):
        if len(output) != size:
            raise RuntimeError(f"the worker gave an output of {len(output)} bytes where the plan says {size}")
        if size and not _is_at(output, memory.address + offset + begin):
            memory.write(offset + begin, output)


def _is_at(output: Buffer, address: int) -> bool:
    """Whether an output is in shared memory already, where it belongs."""
    if not isinstance(output, memoryview) or output.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(output)) == address
