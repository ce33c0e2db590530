"""The seam between the CUDA worker and CUDA: memory, lanes that run at the same time, markers in them.

A lane is a stream. What is enqueued in one runs in order, later, while the host goes on; a marker stands for all that
was enqueued in its lane before it. There is no way here to wait for the whole device. The tests put other devices in
this one's place: one that runs everything at once, and one that runs it as late as markers allow.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from lossgrad_server.engine.devices import available_bytes


class Lane(IntEnum):
    """The three things that a device does at the same time, for successive batches."""

    INBOUND = 0
    COMPUTE = 1
    OUTBOUND = 2


class Marker(Protocol):
    """A point in a lane."""

    def synchronize(self) -> None:
        """Wait until the lane has come this far."""

    def query(self) -> bool:
        """Return whether it has."""


class Device(Protocol):
    """What the worker computes on."""

    @property
    def name(self) -> str:
        """The device's name, as torch writes it."""

    def open(self) -> None:
        """Make the lanes. Called from the thread that will enqueue."""

    def empty(self, byte_count: int) -> Tensor:
        """Allocate device memory, uninitialized bytes. It may be freed when no lane uses it."""

    def pinned(self, byte_count: int) -> Tensor:
        """Allocate host memory that the device copies from and to while the host goes on."""

    def enqueue(self, lane: Lane, work: Callable[[], None]) -> None:
        """Have torch and Triton calls go to a lane. They may run now, but their effects come in the lane's order."""

    def record(self, lane: Lane) -> Marker:
        """Return a marker for what was enqueued in the lane so far."""

    def wait(self, lane: Lane, marker: Marker) -> None:
        """Have what is enqueued in the lane from now on run after the marker. Does not wait here."""

    def available_bytes(self) -> int:
        """Return how much memory could still be allocated."""

    def release(self) -> None:
        """Give memory that is kept for later back to the device."""


class CudaDevice:
    """A CUDA device through torch. Implements Device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []

    @property
    def name(self) -> str:
        """The device's name, as torch writes it."""
        return str(self._device)

    def open(self) -> None:
        """Make a stream for each lane."""
        self._streams = [torch.cuda.Stream(self._device) for _ in Lane]  # type: ignore[no-untyped-call]

    def empty(self, byte_count: int) -> Tensor:
        """Allocate device memory, uninitialized bytes."""
        return torch.empty(byte_count, dtype=torch.uint8, device=self._device)

    def pinned(self, byte_count: int) -> Tensor:
        """Allocate page-locked host memory."""
        return torch.empty(byte_count, dtype=torch.uint8, device="cpu", pin_memory=True)

    def enqueue(self, lane: Lane, work: Callable[[], None]) -> None:
        """Run torch and Triton calls with the lane's stream as the current one."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams[lane]):
            work()

    def record(self, lane: Lane) -> Marker:
        """Record an event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._streams[lane])
        return event

    def wait(self, lane: Lane, marker: Marker) -> None:
        """Have the stream wait for the event."""
        assert isinstance(marker, torch.cuda.Event)  # noqa: S101
        self._streams[lane].wait_event(marker)

    def available_bytes(self) -> int:
        """Return how much memory could still be allocated, what torch keeps unused included."""
        return available_bytes(self._device)

    def release(self) -> None:
        """Give torch's unused memory back to the device."""
        torch.cuda.empty_cache()
