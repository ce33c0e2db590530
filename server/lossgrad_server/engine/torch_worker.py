"""The worker that computes with plain torch operations, request after request, on the CPU or one CUDA device.

Owned by one thread, the batcher's: `warm_up`, `run` and `close` are called from it, and nothing here locks. On CUDA
everything runs on that thread's current stream; `run` waits for it where it needs a sum, and at the end, for an event.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import torch
from torch import Tensor

from lossgrad_server.engine.computation import Computation, Computed, required_bytes
from lossgrad_server.engine.devices import available_bytes, describe
from lossgrad_server.engine.tensors import byte_tensor, read_only_bytes
from lossgrad_server.errors import InternalError
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan, unpack_header
from lossgrad_server.work import (
    SPEC_RESULT,
    UNLIMITED,
    BatchResult,
    Done,
    FailureKind,
    LargeLimits,
    WorkFailure,
    WorkItem,
    WorkResult,
)

logger = logging.getLogger(__name__)

# The elements that are computed at a time. Measured on the CPU with 4e6 elements, one thread: 34 ms at 64k, 26 ms at
# 256k, 41 ms at 1M, where the temporaries no longer stay in the caches. On a GPU a launch
# should have enough to do.
_CPU_PIECE_ELEMENTS = 256 * 1024
_CUDA_PIECE_ELEMENTS = 4 * 1024 * 1024


class TorchWorker:
    """Computes batches with torch. Implements work.DeviceWorker."""

    def __init__(self, device: torch.device, threads: int | None = None, piece_elements: int | None = None) -> None:
        """`threads` is how many threads torch uses in this whole process; None leaves torch's own choice."""
        self._device = device
        self._threads = threads
        default_piece = _CUDA_PIECE_ELEMENTS if device.type == "cuda" else _CPU_PIECE_ELEMENTS
        self._piece_elements = default_piece if piece_elements is None else piece_elements

    @property
    def device(self) -> str:
        """The device's name, as torch writes it."""
        return str(self._device)

    def warm_up(self) -> None:
        """Compute one small job of every loss and type, so that kernels are loaded and the device is known to work."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        for data_type in (DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT32, DataType.FLOAT64):
            outcomes = self.run([_warm_up_item(data_type)]).outcomes
            failures = [outcome.message for outcome in outcomes if isinstance(outcome, WorkFailure)]
            if failures:
                raise RuntimeError(f"device {self.device} failed its first computation: {failures[0]}")
        logger.info("Computing with %s", describe(self._device))

    @property
    def slots(self) -> int:
        """One batch at a time."""
        return 1

    @property
    def inline_work(self) -> int:
        """None: every batch costs more than a hand-over."""
        return 0

    @property
    def is_lost(self) -> bool:
        """It does not watch the device."""
        return False

    def is_large(self, plan: JobPlan) -> bool:
        """Nothing is computed in pieces."""
        return False

    @property
    def large_limits(self) -> LargeLimits:
        """What `is_large` goes by: nothing is."""
        return LargeLimits(UNLIMITED, UNLIMITED)

    def submit(self, items: Sequence[WorkItem]) -> Done:
        """Compute the items at once."""
        return Done(self.run(items))

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        """Compute the items, one after another. An item that fails, fails alone, as a WorkFailure."""
        pack_ns = compute_ns = 0
        launched: list[_Launched | WorkFailure] = []
        with torch.inference_mode():
            for item in items:
                started = packed = perf_counter_ns()
                try:
                    plan = unpack_header(item.header)
                    operands = self._pack(plan, item)
                    packed = perf_counter_ns()
                    launched.append(self._launch(plan, operands))
                except Exception as error:
                    launched.append(self._failure(error, item))
                pack_ns += packed - started
                compute_ns += perf_counter_ns() - packed

            waiting = perf_counter_ns()
            lost = self._wait()
            unpacking = perf_counter_ns()
            compute_ns += unpacking - waiting
            outcomes: list[WorkResult | WorkFailure] = []
            for one in launched:
                if isinstance(one, WorkFailure):
                    outcomes.append(one)
                else:
                    outcomes.append(one.result() if lost is None else lost)
        return BatchResult(outcomes, pack_ns, compute_ns, perf_counter_ns() - unpacking)

    def close(self) -> None:
        """Give torch's unused device memory back to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pack(self, plan: JobPlan, item: WorkItem) -> list[Tensor]:
        operands: list[Tensor] = []
        for buffer, tensor in zip(item.operands, plan.operands, strict=True):
            if len(buffer) != tensor.byte_count:
                raise ValueError(f"an operand has {len(buffer)} bytes, its plan says {tensor.byte_count}")
            # From memory that is not pinned, the driver has read all bytes when this returns.
            operands.append(byte_tensor(buffer).to(self._device, non_blocking=True))
        return operands

    def _launch(self, plan: JobPlan, operands: list[Tensor]) -> _Launched:
        computed = Computation(plan, operands, self._device, self._piece_elements).run()
        if self._device.type == "cpu":
            return _Launched(computed)
        # The device's copies may be reused at once: what comes next on the stream runs after the copy to the host.
        outputs = [_copy_to_host(output) for output in computed.outputs]
        return _Launched(Computed(_copy_to_host(computed.numbers), outputs, computed.totals))

    def _wait(self) -> WorkFailure | None:
        """Wait until all that was launched is done. Returns what to answer where the device failed meanwhile."""
        if self._device.type == "cpu":
            return None
        try:
            torch.cuda.current_stream(self._device).record_event().synchronize()
        except Exception as error:
            return self._failure(error, None)
        return None

    def _failure(self, error: Exception, item: WorkItem | None) -> WorkFailure:
        if isinstance(error, torch.AcceleratorError):
            logger.critical("Device %s failed", self.device, exc_info=error)
            message = f"the device {self.device} failed while it held this request; another server can compute it"
            return WorkFailure(FailureKind.DEVICE_LOST, message)
        if item is not None and _is_out_of_memory(error):
            required = required_bytes(unpack_header(item.header), self._piece_elements)
            try:
                available = available_bytes(self._device)
            except torch.AcceleratorError as lost:
                return self._failure(lost, None)
            logger.warning("Device %s is out of memory: %d bytes required, %d free", self.device, required, available)
            message = (
                f"this request takes about {required} bytes of memory on {self.device}, where {available} are "
                "available; send it in smaller parts, or again when the server is less busy"
            )
            return WorkFailure(FailureKind.OUT_OF_MEMORY, message)
        logger.error("A request failed with an unexpected error", exc_info=error)
        return WorkFailure(FailureKind.INTERNAL, InternalError().message)


@dataclass(frozen=True, slots=True)
class _Launched:
    """An item whose answer is, or will be when the stream has come that far, in the host's memory."""

    computed: Computed

    def result(self) -> WorkResult:
        scalars = b"".join(
            SPEC_RESULT.pack(scalar, int(element_count), weight_sum, int(nonfinite_count))
            for scalar, element_count, weight_sum, nonfinite_count in self.computed.numbers.tolist()
        )
        outputs = tuple(read_only_bytes(output) for output in self.computed.outputs)
        return WorkResult(scalars, outputs, b"".join(total.pack() for total in self.computed.totals))


def _copy_to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no type of its own for memory that the CPU's allocator cannot have.
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def _warm_up_item(data_type: DataType) -> WorkItem:
    """Return a job that takes every path: all losses, all reductions, weight, mask, gradients, broadcasting."""
    specs = tuple(
        SpecPlan(kind, 0.5 if kind in (LossKind.SMOOTH_L1, LossKind.HUBER) else 0.0, reduction, include_gradient=True)
        for kind, reduction in zip(LossKind, list(Reduction)[1:], strict=True)
    )
    specs += (SpecPlan(LossKind.SMOOTH_L1, 0.0, Reduction.NONE, include_gradient=True),)
    shape = (2, 3)
    plan = JobPlan(
        specs,
        input=TensorPlan(data_type, shape),
        target=TensorPlan(data_type, (3,)),
        weight=TensorPlan(data_type, shape),
        mask=TensorPlan(DataType.BOOL, shape),
    )
    return WorkItem(plan.header, tuple(bytes(operand.byte_count) for operand in plan.operands))
