"""Memory that the server and a device process both see: an anonymous memory file whose size is sealed.

It has no name in any file system, and goes with the last of those who have it. The seals keep either side from cutting it
short under the other's mapping.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
from typing import Final

from lossgrad_api.raw_bytes import copy_without_gil
from lossgrad_server.work import Buffer

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
# Below this a copy is over before another thread could use the time.
_HOLDING_GIL_BYTES: Final = 32 * 1024


def why_impossible() -> str:
    """Return why there can be no device process on this system; "" where there can."""
    has_all = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open") and _SEALS
    return "" if sys.platform == "linux" and has_all else "it needs Linux 5.3 or newer: sealed memory files and pidfds"


def sealed_file(byte_count: int) -> int:
    """Return the descriptor of a new memory file of so many bytes, for good. Raises OSError."""
    descriptor = os.memfd_create("lossgrad-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, byte_count)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class SharedMemory:
    """A memory file, mapped."""

    def __init__(self, descriptor: int, byte_count: int) -> None:
        """Map it; the descriptor remains the caller's."""
        self._map = mmap.mmap(descriptor, byte_count)
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)
        self.view = memoryview(self._map)
        self.byte_count = byte_count

    def write(self, offset: int, data: Buffer) -> None:
        """Copy contiguous bytes in. Other threads run while many are copied."""
        size = len(data)
        if size <= _HOLDING_GIL_BYTES:
            self.view[offset : offset + size] = data
            return
        if not 0 <= offset <= self.byte_count - size:
            raise ValueError(f"{size} bytes at {offset} do not fit into {self.byte_count}")
        copy_without_gil(self.address + offset, data)

    def read_into(self, offset: int, destination: Buffer) -> None:
        """Copy bytes out into writable memory of their length. Other threads run while many are copied."""
        size = len(destination)
        target = memoryview(destination)
        if size <= _HOLDING_GIL_BYTES:
            target[:] = self.view[offset : offset + size]
        else:
            first = (ctypes.c_char * size).from_buffer(target)
            copy_without_gil(ctypes.addressof(first), self.view[offset : offset + size])

    def free_pages(self) -> None:
        """Give the pages back to the system; they read zeros from then on, and come back as they are written to."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Unmap it. There must be no views of it left but its own."""
        self.view.release()
        del self._first
        self._map.close()
