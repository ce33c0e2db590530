"""POSIX shared memory that callers make and name: what Open Inference clients call system shared memory.

Its maker can cut such an object short at any time, and whoever touches the lost part of a mapping is killed (SIGBUS). It
cannot be sealed against that. So nothing is mapped here: tensors are copied in by pread and results copied out by pwrite,
which come back short or fail instead. At 16 MiB a tensor that costs twice the computing, and still a fifth of the wire.

An object is opened once, at registration: by its canonical name, in the directory where shm_open looks, never through a
link, and only if it is a plain file of the caller's own. The server cannot be made to open for somebody what that one
could not open himself. `register`, `view` and the like are called in the event loop's thread; `memory` and `write` of a
view copy, and may be called in any.
"""

from __future__ import annotations

import logging
import os
import stat
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError
from lossgrad_server.shared_memory.peers import user_of
from lossgrad_server.shared_memory.rules import (
    Budget,
    canonical_key,
    check_name,
    check_part,
    shown,
    unknown_region,
)
from lossgrad_server.transport.call import Call
from lossgrad_server.transport.open_inference.regions import CudaRegion, RegionView, SystemRegion
from lossgrad_server.work import Buffer

logger = logging.getLogger(__name__)

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - where shm_open's objects are, on Linux
_OPEN_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_ROOT: Final = 0


class _Region:
    """A registered region. Its descriptor lives as long as anything refers to it: a view of a running request, too."""

    __slots__ = ("__weakref__", "description", "descriptor")

    def __init__(self, descriptor: int, description: SystemRegion) -> None:
        self.descriptor = descriptor
        self.description = description
        weakref.finalize(self, os.close, descriptor)


class _View:
    """Part of a region while one request uses it. Implements transport.open_inference.regions.RegionView."""

    executor = None

    def __init__(self, region: _Region, offset: int, byte_count: int, *, writable: bool) -> None:
        self._region = region
        self._offset = region.description.offset + offset
        self._byte_count = byte_count
        self._is_writable = writable
        self._memory: memoryview | None = None

    @property
    def is_direct(self) -> bool:
        """Whether results may be computed into `memory`: never, it is a copy."""
        return False

    @property
    def memory(self) -> memoryview:
        """A copy of the bytes, made when it is first asked for. Raises RequestError where they are gone."""
        if self._memory is None:
            data = os.pread(self._region.descriptor, self._byte_count, self._offset)
            if len(data) != self._byte_count:
                raise self._cut_short()
            self._memory = memoryview(data)
        return self._memory

    def write(self, data: Buffer) -> None:
        """Copy `data` into the region. Raises RequestError where the region is gone, or the system has no memory."""
        view = memoryview(data)
        if len(view) > self._byte_count or not self._is_writable:
            raise ValueError(f"{len(view)} bytes for a view of {self._byte_count}")
        # Writing behind the end would make the object long again, which is harmless, but the result would be nobody's.
        if os.fstat(self._region.descriptor).st_size < self._offset + len(view):
            raise self._cut_short()
        written = 0
        while written < len(view):
            try:
                written += os.pwrite(self._region.descriptor, view[written:], self._offset + written)
            except OSError as error:
                logger.warning("A region could not be written: %s", error.strerror)
                raise RequestError(
                    f"region {shown(self._region.description.name)} has no memory behind some of its bytes, and the system "
                    "has none left for it; make room, or send the tensors in raw_input_contents",
                    code=Code.RESOURCE_EXHAUSTED,
                    reason=Reason.REGIONS_FULL,
                ) from None

    def release(self) -> None:
        """End the use."""
        self._memory = None

    def _cut_short(self) -> RequestError:
        return InvalidRequest(
            f"region {shown(self._region.description.name)} has fewer bytes than when it was registered; leave it as it is "
            "while it is registered",
            reason=Reason.BAD_REGION,
            field="shared_memory_region",
        )


class SystemRegions:
    """The system regions of one server's callers. Implements transport.open_inference.regions.SharedMemoryRegions."""

    kinds: Sequence[str] = ("system",)

    def __init__(
        self,
        budget: Budget,
        prefixes: Sequence[str],
        identify: Callable[[str], str | None],
        *,
        directory: Path = DIRECTORY,
    ) -> None:
        """`identify` gives a caller's owner (peers.py) by its address, None for one on another machine."""
        self._budget = budget
        self._prefixes = tuple(prefixes)
        self._identify = identify
        self._directory = directory
        self._regions: dict[tuple[str, str], _Region] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._regions)

    @property
    def byte_count(self) -> int:
        """How many bytes they have together."""
        return sum(region.description.byte_size for region in self._regions.values())

    def owner(self, call: Call) -> str:
        """Return who a call's regions belong to. Raises RequestError for a caller on another machine."""
        owner = self._identify(call.peer)
        if owner is None:
            raise RequestError(
                "this server shares memory with callers on its own machine only, which reach it over the loopback or a "
                "unix socket; send the tensors in raw_input_contents",
                code=Code.UNIMPLEMENTED,
                reason=Reason.SHARED_MEMORY_OFF,
            )
        return owner

    def register_system(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region of the object `key`. Raises RequestError."""
        self._check_free(owner, name)
        object_name = canonical_key(key, self._prefixes)
        if byte_size < 1:
            raise InvalidRequest(
                f"byte_size is {byte_size}; a region has at least 1 byte", reason=Reason.BAD_REGION, field="byte_size"
            )
        self._budget.take(byte_size)
        try:
            descriptor = self._open(owner, key, object_name, offset, byte_size)
        except BaseException:
            self._budget.give_back(byte_size)
            raise
        self._regions[owner, name] = _Region(descriptor, SystemRegion(name, key, offset, byte_size))

    def unregister_system(self, owner: str, name: str) -> None:
        """Forget a region, or all of the owner's. Requests that use one go on to their end."""
        for key in [(owner, name)] if name else [key for key in self._regions if key[0] == owner]:
            region = self._regions.pop(key, None)
            if region is not None:
                self._budget.give_back(region.description.byte_size)

    def system_regions(self, owner: str, name: str) -> Sequence[SystemRegion]:
        """Return the owner's region of that name, or all."""
        if name:
            return (self._find(owner, name).description,)
        return tuple(region.description for key, region in self._regions.items() if key[0] == owner)

    def register_cuda(
        self, owner: str, name: str, raw_handle: bytes, device_id: int, byte_size: int
    ) -> Awaitable[None] | None:
        """Refuse: a handle tells no owner and its memory may be freed under us, so cuda.py is asked for by itself."""
        raise RequestError(
            "this server shares no GPU memory (--allow-cuda-shared-memory); register system shared memory, or send the "
            "tensors in raw_input_contents",
            code=Code.UNIMPLEMENTED,
            reason=Reason.SHARED_MEMORY_OFF,
        )

    def unregister_cuda(self, owner: str, name: str) -> None:
        """Do nothing: there is none, and perf_analyzer asks for it all the same."""

    def cuda_regions(self, owner: str, name: str) -> Sequence[CudaRegion]:
        """There are none."""
        if name:
            raise self._unknown(name)
        return ()

    def view(self, owner: str, name: str, offset: int, byte_size: int, *, writable: bool) -> RegionView:
        """Return a part of the owner's region. Raises RequestError where it is not in it."""
        region = self._find(owner, name)
        check_part(f"a tensor in region {shown(name)}", offset, byte_size, region.description.byte_size)
        return _View(region, offset, byte_size, writable=writable)

    def close(self) -> None:
        """Forget all."""
        for owner in {owner for owner, _ in self._regions}:
            self.unregister_system(owner, "")

    def _check_free(self, owner: str, name: str) -> None:
        """Check that a name may be given to a region. Raises RequestError."""
        check_name(name)
        if self._is_taken(owner, name):
            raise RequestError(
                f"region {shown(name)} is registered already; unregister it first, or choose another name",
                code=Code.ALREADY_EXISTS,
                reason=Reason.REGION_EXISTS,
            )

    def _is_taken(self, owner: str, name: str) -> bool:
        return (owner, name) in self._regions

    def _find(self, owner: str, name: str) -> _Region:
        region = self._regions.get((owner, name))
        if region is None:
            raise self._unknown(name)
        return region

    def _unknown(self, name: str) -> RequestError:
        return unknown_region(f"you have registered no region {shown(name)}; register it first")

    def _open(self, owner: str, key: str, object_name: str, offset: int, byte_size: int) -> int:
        """Return a descriptor of an object that this owner may use. Raises RequestError, without saying what is there."""
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            logger.warning("%s cannot be opened: %s", self._directory, error.strerror)
            raise _not_yours(key) from None
        try:
            descriptor = os.open(object_name, _OPEN_FLAGS, dir_fd=directory)
        except OSError:
            raise _not_yours(key) from None
        finally:
            os.close(directory)
        try:
            status = os.fstat(descriptor)
            if not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and _may_use(owner, status)):
                raise _not_yours(key)
            if offset < 0 or offset + byte_size > status.st_size:
                raise InvalidRequest(
                    f"{shown(key)} has {status.st_size} bytes; {byte_size} bytes from byte {offset} on are not in it",
                    reason=Reason.BAD_REGION,
                    field="byte_size",
                )
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _may_use(owner: str, status: os.stat_result) -> bool:
    """Whether an object is the caller's own; root may use anybody's. Who is not known is taken for this server's user."""
    user = user_of(owner)
    return (os.geteuid() if user is None else user) in (status.st_uid, _ROOT)


def _not_yours(key: str) -> RequestError:
    return InvalidRequest(
        f"there is no shared memory object {shown(key)} of yours that this server can open; make it first, as the user "
        "that calls, readable and writable for the server, and where both see the same shared memory (in containers: the "
        "same IPC namespace or /dev/shm)",
        reason=Reason.BAD_REGION,
        field="key",
    )
