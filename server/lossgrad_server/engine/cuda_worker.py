"""The worker that computes on one CUDA device, with Triton. Importing this imports triton.

Owned by one thread, the batcher's: all methods, of the worker and of what `submit` returns, are called from it, and
nothing here locks. Up to SLOTS batches are under way at a time, each in a slot; the device copies one in, computes
another and copies a third out at the same time, in three lanes tied by markers (cuda_device.py). The host waits for
markers of single batches only, never for the whole device.

Failures. A batch that fails is split in halves, down to single requests, so that one fails alone. Out of memory is
tried once more after torch has given back what it keeps. An error of the device itself is final: every request under
way, and every one that comes after, fails with DEVICE_LOST, and `is_lost` says so. The process must be restarted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final

import torch

from lossgrad_server.engine.cuda_batch import LargeRequest, Slot, SmallBatch
from lossgrad_server.engine.cuda_builder import template_of
from lossgrad_server.engine.cuda_device import CudaDevice, Device, Lane
from lossgrad_server.engine.cuda_template import Template, TooManyBytes
from lossgrad_server.engine.cuda_warm_up import warm_up_items
from lossgrad_server.errors import InternalError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import (
    UNLIMITED,
    BatchResult,
    FailureKind,
    LargeLimits,
    Retry,
    WorkFailure,
    WorkItem,
    WorkResult,
)

logger = logging.getLogger(__name__)

SLOTS: Final = 3
# Raised whenever the same request may get other bits from this engine than from the one before.
KERNEL_VERSION: Final = 2
_MIB: Final = 1024 * 1024
# More than what is lost because each of a launch's tables starts on an alignment.
_TABLES_ROUNDED_BYTES: Final = 8192


def determinism() -> str:
    """Return what the results' bits depend on, beside the device's model. Equal strings mean equal bits."""
    return f"lossgrad-cuda {KERNEL_VERSION}"


class CudaWorker:
    """Computes batches on a CUDA device. Implements work.DeviceWorker, and `submit`, which does not wait."""

    def __init__(
        self,
        device: torch.device | Device,
        *,
        slot_bytes: int = 32 * _MIB,
        alone_bytes: int = 4 * _MIB,
        piece_bytes: int = 4 * _MIB,
    ) -> None:
        """Make a worker; it takes memory in `warm_up`.

        Each slot keeps `slot_bytes` of device memory, and as much page-locked memory in each direction; no launch of
        several requests takes more. A request of more than `alone_bytes`, answer included, is not gathered with others
        but copied in pieces of `piece_bytes`, and has device memory of its own.
        """
        if piece_bytes > slot_bytes:
            raise ValueError(f"piece_bytes is {piece_bytes}; it must be at most slot_bytes, {slot_bytes}")
        self._device: Device = CudaDevice(device) if isinstance(device, torch.device) else device
        self._slot_bytes = slot_bytes
        self._alone_bytes = alone_bytes
        self._piece_bytes = piece_bytes
        self._free: list[Slot] = []
        self._under_way: list[_Part] = []  # the oldest first
        self._abandoned: list[_Part] = []
        self._lost: WorkFailure | None = None

    @property
    def device(self) -> str:
        """The device's name, as torch writes it."""
        return self._device.name

    @property
    def is_lost(self) -> bool:
        """Whether the device failed in a way that only a new process can recover from."""
        return self._lost is not None

    @property
    def inline_work(self) -> int:
        """None: a launch and the wait for it cost more than a hand-over."""
        return 0

    @property
    def slots(self) -> int:
        """How many batches may be under way at a time."""
        return SLOTS

    def is_large(self, plan: JobPlan) -> bool:
        """Return whether a request is copied in pieces, and has device memory of its own."""
        return plan.input_byte_count + plan.output_byte_count > self._alone_bytes

    @property
    def large_limits(self) -> LargeLimits:
        """What `is_large` goes by."""
        return LargeLimits(UNLIMITED, self._alone_bytes)

    def warm_up(self) -> None:
        """Allocate the slots, and compute every kind of job once, so that all kernels are compiled and loaded."""
        self.allocate()
        for item in warm_up_items():
            failures = [one.message for one in self.run([item]).outcomes if isinstance(one, WorkFailure)]
            if failures:
                raise RuntimeError(f"device {self.device} failed its first computation: {failures[0]}")
        logger.info("Computing with torch %s on %s, with kernels of our own", torch.__version__, self.device)

    def allocate(self) -> None:
        """Do the first half of `warm_up`: take the slots' memory."""
        self._device.open()
        self._free = [Slot(self._device, self._slot_bytes) for _ in range(SLOTS)]

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        """Compute the items and wait for them. An item that fails, fails alone, as a WorkFailure."""
        return self.submit(items).result()

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        """Begin to compute the items.

        Waits only where all slots are taken, and then for the oldest batch under way. Several pendings may be open;
        they need not be asked for in order. Large requests begin, and go on, in the pending's `advance` and `result`.
        """
        pending = Pending(self, items)
        gathered: list[int] = []
        byte_count = 0
        for index, template in enumerate(pending.templates):
            if isinstance(template, WorkFailure):
                pending.give([index], [template])
                continue
            plan, needed = template.plan, template.arena_bytes
            if (
                plan.input_byte_count + plan.output_byte_count > self._alone_bytes
                or needed + _TABLES_ROUNDED_BYTES > self._slot_bytes
            ):
                pending.large.append(index)
                continue
            if byte_count + needed + _TABLES_ROUNDED_BYTES > self._slot_bytes:
                self._begin(pending, gathered)
                gathered, byte_count = [], 0
            gathered.append(index)
            byte_count += needed
        if gathered:
            self._begin(pending, gathered)
        return pending

    def close(self) -> None:
        """Wait for what is under way and give back what `warm_up` took.

        Large requests that have not begun are not: ask every pending for its result first.
        """
        while self._under_way:
            self._finish(self._under_way[0])
        self._free.clear()
        if not self.is_lost:
            self._device.release()

    # --- what Pending asks for ---

    def template(self, item: WorkItem) -> Template | WorkFailure:
        """Return the item's template, its operands checked against it, or why it cannot be computed."""
        if self._lost is not None:
            return self._lost
        try:
            template = template_of(item.header)
            for buffer, operand in zip(item.operands, template.plan.operands, strict=True):
                if len(buffer) != operand.byte_count:
                    raise ValueError(f"an operand has {len(buffer)} bytes, its plan says {operand.byte_count}")
        except TooManyBytes as error:
            return self._out_of_memory(error.required_bytes)
        except Exception as error:
            return _internal(error)
        return template

    def advance(self, pending: Pending) -> bool:
        """Go on by one piece with the pending's large requests, one after another; return whether there is more."""
        part = next((part for part in self._under_way if part.pending is pending and part.is_large), None)
        if part is None:
            if not pending.large:
                return False
            self._begin(pending, [pending.large.pop(0)], is_large=True)
            return True
        assert part.batch is not None  # noqa: S101
        try:
            has_more = part.batch.advance()
        except Exception as error:
            self._fail(part, error)
            return True
        if not has_more:
            self._finish(part)
        return has_more or bool(pending.large)

    def is_done(self, pending: Pending) -> bool:
        """Return whether nothing of the pending is to be waited for."""
        parts = [part for part in self._under_way if part.pending is pending]
        try:
            return not pending.large and all(part.batch is not None and part.batch.is_done() for part in parts)
        except Exception as error:
            if not is_device_lost(error):
                raise
            self._lose(error)
            return True

    def finish(self, pending: Pending) -> None:
        """Wait for all parts of the pending."""
        while (part := next((part for part in self._under_way if part.pending is pending), None)) is not None:
            self._finish(part)

    # --- parts of pendings ---

    def _begin(self, pending: Pending, indices: list[int], *, is_large: bool = False, is_retry: bool = False) -> None:
        slot = self._take_slot()
        if slot is None:
            assert self._lost is not None  # noqa: S101
            pending.give(indices, [self._lost] * len(indices))
            return
        part = _Part(pending, indices, slot, is_large=is_large, is_retry=is_retry)
        self._under_way.append(part)
        items = [pending.items[index] for index in indices]
        templates = [template for index in indices if isinstance(template := pending.templates[index], Template)]
        try:
            if is_large:
                part.batch = LargeRequest(self._device, slot, items[0], templates[0], self._piece_bytes)
            else:
                started = perf_counter_ns()
                batch = SmallBatch(self._device, slot, items, templates)
                batch.pack()
                pending.pack_ns += perf_counter_ns() - started
                batch.advance()
                part.batch = batch
        except Exception as error:
            self._fail(part, error)

    def _take_slot(self) -> Slot | None:
        """Return a slot; None where the device is lost."""
        while self._lost is None and not self._free:
            # A large request is waited for only where there is nothing else: it has pieces to go.
            self._finish(next((part for part in self._under_way if not part.is_large), self._under_way[0]))
        return self._free.pop() if self._lost is None else None

    def _finish(self, part: _Part) -> None:
        """Wait for a part, and give its results to its pending."""
        assert part.batch is not None  # noqa: S101
        try:
            part.batch.wait()
            started = perf_counter_ns()
            results = part.batch.results()
        except Exception as error:
            self._fail(part, error)
            return
        part.pending.unpack_ns += perf_counter_ns() - started
        part.pending.give(part.indices, results)
        self._under_way.remove(part)
        self._free.append(part.slot)

    def _fail(self, part: _Part, error: Exception) -> None:
        """Answer for a part that failed: begin anew with less, or give failures to its pending."""
        part.batch = None
        if is_device_lost(error) or not self._drain():
            self._lose(error)
            return
        self._under_way.remove(part)
        self._free.append(part.slot)
        pending, indices = part.pending, part.indices
        is_memory = is_out_of_memory(error)
        if is_memory:
            self._device.release()
        if len(indices) > 1:
            logger.warning("A batch of %d requests failed; it is split", len(indices), exc_info=error)
            pending.retries.append(Retry.OUT_OF_MEMORY if is_memory else Retry.ERROR)
            middle = len(indices) // 2
            self._begin(pending, indices[:middle])
            self._begin(pending, indices[middle:])
        elif is_memory and not part.is_retry:
            pending.retries.append(Retry.OUT_OF_MEMORY)
            self._begin(pending, indices, is_large=part.is_large, is_retry=True)
        elif is_memory:
            template = pending.templates[indices[0]]
            assert isinstance(template, Template)  # noqa: S101
            pending.give(indices, [self._out_of_memory(template.required_bytes)])
        else:
            pending.give(indices, [_internal(error)])

    def _drain(self) -> bool:
        """Wait until the device uses nothing of what was enqueued; return whether it could."""
        try:
            for lane in Lane:
                self._device.record(lane).synchronize()
        except Exception as error:
            logger.critical("Device %s cannot be waited for", self.device, exc_info=error)
            return False
        return True

    def _lose(self, error: Exception) -> None:
        logger.critical("Device %s failed", self.device, exc_info=error)
        message = f"the device {self.device} failed while it held this request; another server can compute it"
        self._lost = WorkFailure(FailureKind.DEVICE_LOST, message)
        for part in self._under_way:
            part.pending.give(part.indices, [self._lost] * len(part.indices))
        # What they hold stays alive: the device may still write to it.
        self._abandoned = self._under_way
        self._under_way = []

    def _out_of_memory(self, required: int) -> WorkFailure:
        try:
            available = self._device.available_bytes()
        except Exception as error:
            if not is_device_lost(error):
                raise
            self._lose(error)
            assert self._lost is not None  # noqa: S101
            return self._lost
        logger.warning("Device %s is out of memory: %d bytes required, %d free", self.device, required, available)
        message = (
            f"this request takes about {required} bytes of memory on {self.device}, where {available} are "
            "available; send it in smaller parts, or again when the server is less busy"
        )
        return WorkFailure(FailureKind.OUT_OF_MEMORY, message)


class Pending:
    """A batch under way: what `CudaWorker.submit` returns."""

    def __init__(self, worker: CudaWorker, items: Sequence[WorkItem]) -> None:
        self.items = items
        self.templates = [worker.template(item) for item in items]
        self.large: list[int] = []  # the large requests that have not begun
        self.retries: list[Retry] = []
        self.pack_ns = 0
        self.unpack_ns = 0
        self._worker = worker
        self._outcomes: list[WorkResult | WorkFailure | None] = [None] * len(items)
        self._started_ns = self._ended_ns = perf_counter_ns()

    def advance(self) -> bool:
        """Copy the next piece of a large request, where the batch has one; return whether there are more.

        Between two calls other batches may be submitted; they do not wait for the rest of this one.
        """
        return self._worker.advance(self)

    def is_done(self) -> bool:
        """Return whether `result` would not wait."""
        return self._worker.is_done(self)

    def result(self) -> BatchResult:
        """Wait for all outcomes and return them."""
        while self.advance():
            pass
        self._worker.finish(self)
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        assert len(outcomes) == len(self.items)  # noqa: S101
        elapsed_ns = self._ended_ns - self._started_ns
        compute_ns = max(elapsed_ns - self.pack_ns - self.unpack_ns, 0)
        return BatchResult(outcomes, self.pack_ns, compute_ns, self.unpack_ns, tuple(self.retries))

    def give(self, indices: Sequence[int], outcomes: Sequence[WorkResult | WorkFailure]) -> None:
        """Take in the outcomes of some items. Called by the worker."""
        for index, outcome in zip(indices, outcomes, strict=True):
            self._outcomes[index] = outcome
        self._ended_ns = perf_counter_ns()


@dataclass(eq=False, slots=True)
class _Part:
    """Some of a pending's items, in a slot."""

    pending: Pending
    indices: list[int]
    slot: Slot
    is_large: bool
    is_retry: bool
    batch: SmallBatch | LargeRequest | None = None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, on the device or the host, and nothing else is wrong."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What torch's allocator does not allocate itself, page-locked memory or a kernel's code, has no type of its own.
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def is_device_lost(error: Exception) -> bool:
    """Return whether an error is one after which a CUDA context answers nothing but errors."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith("Triton Error [CUDA]")
    )


def _internal(error: Exception) -> WorkFailure:
    logger.error("A request failed with an unexpected error", exc_info=error)
    return WorkFailure(FailureKind.INTERNAL, InternalError().message)
