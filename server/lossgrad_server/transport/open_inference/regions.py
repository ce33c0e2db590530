"""Shared memory as the Open Inference service sees it: an interface, and the regions of a server that shares no memory.

The service calls all of this in the event loop's thread, except what copies: `memory` and `write` of a view. Whoever
implements it owns the rules (who may register what, names, sizes, offsets) and raises RequestError where they are broken:
NOT_FOUND with Reason.UNKNOWN_REGION, ALREADY_EXISTS with REGION_EXISTS, INVALID_ARGUMENT with BAD_REGION.

What a request does with it, in this order: `owner` once; `view` for each tensor that is placed in a region, before it is
queued; `memory` of the inputs' views; for each output either the worker writes straight into `memory`, where that is
`is_direct` (WorkItem.destinations), or `write` copies it in;
`release` for every view, exactly once, whatever became of the request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NoReturn, Protocol

from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.transport.call import Call
from lossgrad_server.work import Buffer


@dataclass(frozen=True, slots=True)
class SystemRegion:
    """A registered region of POSIX shared memory: `byte_size` bytes from `offset` of the object named `key`."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class CudaRegion:
    """A registered region of a GPU's memory."""

    name: str
    device_id: int
    byte_size: int


class RegionView(Protocol):
    """A part of a region while one request uses it. The memory stays mapped until `release`, also when unregistered."""

    @property
    def is_direct(self) -> bool:
        """Whether `memory` is the shared memory itself, which results may be computed into, and not a copy of it."""

    @property
    def executor(self) -> Executor | None:
        """Where `memory` is first asked for, and `write` called, because they may wait for long; None for anywhere."""

    @property
    def memory(self) -> memoryview:
        """The bytes, one-dimensional and of format "B"; read-only unless the view was asked for as writable.

        They may have to be copied when they are first asked for, which may be done in any thread. Raises RequestError.
        """

    def write(self, data: Buffer) -> None:
        """Copy `data` in, from the view's start; it is at most as long. In any thread. Raises RequestError."""

    def release(self) -> None:
        """End the use. Raises RequestError where the memory went away meanwhile, so that a result is worth nothing."""


class SharedMemoryRegions(Protocol):
    """The regions that callers have registered. System and CUDA regions of one owner share one space of names."""

    @property
    def kinds(self) -> Sequence[str]:
        """Which kinds can be registered: "system", "cuda"."""

    def owner(self, call: Call) -> str:
        """Return who a call's regions belong to. Raises RequestError where this caller may not share memory."""

    def register_system(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region. Raises RequestError."""

    def unregister_system(self, owner: str, name: str) -> None:
        """Forget the owner's region of that name; all its system regions if `name` is empty. Unknown ones are ignored."""

    def system_regions(self, owner: str, name: str) -> Sequence[SystemRegion]:
        """Return the owner's region of that name, or all if `name` is empty. Raises RequestError for an unknown one."""

    def register_cuda(
        self, owner: str, name: str, raw_handle: bytes, device_id: int, byte_size: int
    ) -> Awaitable[None] | None:
        """Register a region of a GPU's memory by its cudaIpcMemHandle. Raises RequestError.

        It is done when what this returns is, which may raise RequestError, too.
        """

    def unregister_cuda(self, owner: str, name: str) -> None:
        """As `unregister_system`. Does nothing where there is no GPU: perf_analyzer calls it all the same."""

    def cuda_regions(self, owner: str, name: str) -> Sequence[CudaRegion]:
        """As `system_regions`."""

    def view(self, owner: str, name: str, offset: int, byte_size: int, *, writable: bool) -> RegionView:
        """Return `byte_size` bytes from `offset` of the owner's region. Raises RequestError where they are not in it."""

    def close(self) -> None:
        """Unmap everything. Called when the server has stopped and no request is left."""


class NoRegions:
    """The regions of a server that shares no memory: there are none, and none can be registered."""

    kinds: Sequence[str] = ()

    def owner(self, call: Call) -> str:
        """Nobody owns anything."""
        return ""

    def register_system(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        """Refuse."""
        _refuse()

    def unregister_system(self, owner: str, name: str) -> None:
        """Do nothing: clients begin with this, and it is true afterwards that there is none."""

    def system_regions(self, owner: str, name: str) -> Sequence[SystemRegion]:
        """There are none."""
        return self._none(name)

    def register_cuda(self, owner: str, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Refuse."""
        _refuse()

    def unregister_cuda(self, owner: str, name: str) -> None:
        """Do nothing, as for system regions."""

    def cuda_regions(self, owner: str, name: str) -> Sequence[CudaRegion]:
        """There are none."""
        return self._none(name)

    def view(self, owner: str, name: str, offset: int, byte_size: int, *, writable: bool) -> RegionView:
        """Refuse."""
        _refuse()

    def close(self) -> None:
        """There is nothing to close."""

    def _none(self, name: str) -> Sequence[NoReturn]:
        if name:
            _refuse()
        return ()


def _refuse() -> NoReturn:
    raise RequestError(
        "this server shares no memory with its callers (--allow-shared-memory); send the tensors in raw_input_contents",
        code=Code.UNIMPLEMENTED,
        reason=Reason.SHARED_MEMORY_OFF,
    )
