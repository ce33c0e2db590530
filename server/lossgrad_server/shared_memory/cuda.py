"""GPU memory that callers own and the server copies: what Open Inference clients call CUDA shared memory.

A caller gives 64 bytes, a CUDA IPC handle. What it stands for is opened and copied by a process that may die of it
(`cuda_copier.py`); here are the registry and its rules. A handle tells no owner, so only callers that run as the server's
own user may give one: they could read the server's memory anyway. Regions are registered and unregistered in the event
loop's thread, next to the system regions, with which they share the space of names.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import Final, NoReturn

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError
from lossgrad_server.shared_memory.cuda_copier import CopierLost, CudaCopier, Opened, Refused
from lossgrad_server.shared_memory.cuda_records import HANDLE_BYTES, Became
from lossgrad_server.shared_memory.rules import Budget, check_part, shown, unknown_region
from lossgrad_server.shared_memory.system import SystemRegions
from lossgrad_server.transport.open_inference.regions import CudaRegion, RegionView
from lossgrad_server.work import Buffer

logger = logging.getLogger(__name__)

_MAX_DEVICE: Final = (1 << 31) - 1


class _Region:
    """A registered region. It stays open while a running request has a view of it, also when it was unregistered.

    It counts by itself who uses it: a finaliser may run at any moment, in a thread that holds the executor's own lock.
    """

    __slots__ = ("description", "is_registered", "opened", "views")

    def __init__(self, description: CudaRegion) -> None:
        self.description = description
        self.is_registered = True
        self.views = 0
        self.opened: Opened | None = None  # not yet

    def close_if_unused(self, copier: CudaCopier) -> None:
        """Let go of the memory, if nothing needs it any more."""
        if self.is_registered or self.views or self.opened is None:
            return
        opened, self.opened = self.opened, None
        with suppress(RuntimeError):  # the copier is closed, and its process gone
            copier.executor.submit(copier.close_region, opened)


class _View:
    """Part of a region while one request uses it. Implements transport.open_inference.regions.RegionView."""

    is_direct = False

    def __init__(self, copier: CudaCopier, region: _Region, opened: Opened, offset: int, byte_count: int) -> None:
        self._copier = copier
        self._region = region
        self._opened = opened
        self._offset = offset
        self._byte_count = byte_count
        self._memory: memoryview | None = None
        region.views += 1

    @property
    def executor(self) -> Executor:
        """The copier's own thread: a process that hangs must hold up nobody else."""
        return self._copier.executor

    @property
    def memory(self) -> memoryview:
        """A copy of the bytes, made when it is first asked for. Raises RequestError where the process is lost."""
        if self._memory is None:
            # Not a bytearray, which would be filled with zeros first, under the GIL.
            room = memoryview(mmap.mmap(-1, self._byte_count) if self._byte_count else b"")
            with _Translated(self._region):
                self._copier.read(self._opened, self._offset, room)
            self._memory = room.toreadonly()
        return self._memory

    def write(self, data: Buffer) -> None:
        """Copy `data` into the region. Raises RequestError where the process is lost."""
        if len(data) > self._byte_count:
            raise ValueError(f"{len(data)} bytes for a view of {self._byte_count}")
        with _Translated(self._region):
            self._copier.write(self._opened, self._offset, data)

    def release(self) -> None:
        """End the use."""
        self._memory = None
        self._region.views -= 1
        self._region.close_if_unused(self._copier)


class _Translated:
    """Turns the loss of the copier's process into what a caller is told whose region was lost with it."""

    def __init__(self, region: _Region) -> None:
        self._name = region.description.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, CopierLost):
            raise _lost(self._name) from None


class CudaAndSystemRegions(SystemRegions):
    """System regions, and CUDA regions beside them. Implements transport.open_inference.regions.SharedMemoryRegions."""

    kinds: Sequence[str] = ("system", "cuda")

    def __init__(
        self,
        budget: Budget,
        prefixes: Sequence[str],
        identify: Callable[[str], str | None],
        is_this_user: Callable[[str], bool],
        copier: Callable[[Callable[[int], None]], CudaCopier] = CudaCopier,
    ) -> None:
        """`is_this_user` says of an owner whether it can be nobody but the user that the server runs as (peers.py)."""
        super().__init__(budget, prefixes, identify)
        self._is_this_user = is_this_user
        self._cuda: dict[tuple[str, str], _Region] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.copier = copier(self._on_lost)

    @property
    def cuda_count(self) -> int:
        """How many CUDA regions there are."""
        return len(self._cuda)

    @property
    def cuda_byte_count(self) -> int:
        """How many bytes they have together."""
        return sum(region.description.byte_size for region in self._cuda.values())

    def register_cuda(
        self, owner: str, name: str, raw_handle: bytes, device_id: int, byte_size: int
    ) -> Awaitable[None]:
        """Register the region that a handle stands for; done when what this returns is. Both raise RequestError."""
        if not self._is_this_user(owner):
            raise RequestError(
                "this server takes GPU memory from callers that run as its own user only, and cannot tell that you do; call "
                "it as that user, over the loopback, or over a unix socket that nobody else may write to",
                code=Code.UNIMPLEMENTED,
                reason=Reason.SHARED_MEMORY_OFF,
            )
        self._check_free(owner, name)
        if len(raw_handle) != HANDLE_BYTES:
            raise _bad(f"raw_handle has {len(raw_handle)} bytes; a CUDA IPC handle has {HANDLE_BYTES}", "raw_handle")
        if not 0 <= device_id <= _MAX_DEVICE:
            raise _bad(f"device_id is {device_id}; it must be a device's number, from 0 on", "device_id")
        if byte_size < 1:
            raise _bad(f"byte_size is {byte_size}; a region has at least 1 byte", "byte_size")
        self._budget.take(byte_size)
        # The name is taken from here on, and the region used only once it is open.
        region = self._cuda[owner, name] = _Region(CudaRegion(name, device_id, byte_size))
        self._loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(self._opening(owner, region, raw_handle))
        # A caller that goes away does not end it: its region is registered all the same, and is its user's.
        return asyncio.shield(opening)

    async def _opening(self, owner: str, region: _Region, raw_handle: bytes) -> None:
        name, device_id, byte_size = region.description.name, region.description.device_id, region.description.byte_size
        copier = self.copier
        try:
            opened = await asyncio.get_running_loop().run_in_executor(
                copier.executor, partial(copier.open, raw_handle, device_id, byte_size)
            )
        except BaseException as error:
            self._forget(owner, name, region)
            _refuse(error, device_id, byte_size)
        region.opened = opened
        region.close_if_unused(copier)
        self._forget_lost()
        if not region.is_registered:
            raise _lost(name) if not copier.is_open(opened) else self._unknown(name)

    def unregister_cuda(self, owner: str, name: str) -> None:
        """Forget a region, or all of the owner's. Requests that use one go on to their end."""
        for key in [(owner, name)] if name else [key for key in self._cuda if key[0] == owner]:
            region = self._cuda.get(key)
            if region is not None:
                self._forget(*key, region)

    def cuda_regions(self, owner: str, name: str) -> Sequence[CudaRegion]:
        """Return the owner's region of that name, or all; none that is not open yet, or any more."""
        self._forget_lost()
        if name:
            return (self._opened(owner, name)[0].description,)
        return tuple(
            region.description for key, region in self._cuda.items() if key[0] == owner and region.opened is not None
        )

    def view(self, owner: str, name: str, offset: int, byte_size: int, *, writable: bool) -> RegionView:
        """Return a part of the owner's region, of either kind. Raises RequestError where it is not in it."""
        if (owner, name) not in self._cuda:
            return super().view(owner, name, offset, byte_size, writable=writable)
        region, opened = self._opened(owner, name)
        check_part(f"a tensor in region {shown(name)}", offset, byte_size, region.description.byte_size)
        return _View(self.copier, region, opened, offset, byte_size)

    def close(self) -> None:
        """Forget all, and end the process."""
        super().close()
        for owner in {owner for owner, _ in self._cuda}:
            self.unregister_cuda(owner, "")
        self.copier.close()

    def _is_taken(self, owner: str, name: str) -> bool:
        self._forget_lost()
        return (owner, name) in self._cuda or super()._is_taken(owner, name)

    def _opened(self, owner: str, name: str) -> tuple[_Region, Opened]:
        region = self._cuda.get((owner, name))
        if region is None or region.opened is None:
            raise self._unknown(name)
        return region, region.opened

    def _forget(self, owner: str, name: str, region: _Region) -> None:
        if self._cuda.get((owner, name)) is region:
            del self._cuda[owner, name]
            self._budget.give_back(region.description.byte_size)
            region.is_registered = False
            region.close_if_unused(self.copier)

    def _on_lost(self, generation: int) -> None:
        """Forget what was lost with a process. In the copier's thread."""
        with suppress(RuntimeError):  # the event loop has closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._forget_lost)

    def _forget_lost(self) -> None:
        for (owner, name), region in list(self._cuda.items()):
            if region.opened is not None and not self.copier.is_open(region.opened):
                self._forget(owner, name, region)


def _refuse(error: BaseException, device_id: int, byte_size: int) -> NoReturn:
    """Raise what a caller is told whose region was not opened."""
    if not isinstance(error, (Refused, CopierLost, OSError)):
        raise error
    logger.warning("A CUDA region was not opened: %s", error)
    if isinstance(error, Refused) and error.became is Became.OUTSIDE:
        raise _bad(
            f"byte_size is {byte_size}; the allocation behind raw_handle has {error.allocation_bytes} bytes",
            "byte_size",
        ) from None
    if isinstance(error, Refused) and error.became is Became.REFUSED:
        raise _bad(
            f"raw_handle stands for no memory of GPU {device_id} that this server can open; give the handle of memory that "
            "is there, with the device's number as the server sees it",
            "raw_handle",
        ) from None
    if isinstance(error, Refused):
        raise RequestError(
            "this server's machine has no CUDA driver that it can use; register system shared memory, or send the tensors "
            "in raw_input_contents",
            code=Code.UNIMPLEMENTED,
            reason=Reason.SHARED_MEMORY_OFF,
        ) from None
    raise RequestError(
        "the process that opens GPU memory for this server ended, or gave no answer, while it opened this region; register "
        "it again if its memory is still there",
        code=Code.UNAVAILABLE,
        reason=Reason.BAD_REGION,
    ) from None


def _lost(name: str) -> RequestError:
    return unknown_region(
        f"region {shown(name)} was lost: the process that copies GPU memory for this server ended, or gave no answer. All "
        "CUDA regions are unregistered; register yours again if its memory is still there"
    )


def _bad(message: str, field: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.BAD_REGION, field=field)
