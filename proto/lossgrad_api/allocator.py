"""How the process's allocator treats large blocks. The server sets it at start; a client may.

glibc maps and unmaps every block above 128 KiB to 32 MiB anew, so each message of that size pays for its page faults and
for zeroing: at 8 MiB and above that alone is two thirds of a call. Told to keep such blocks, it reuses warm memory.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache

logger = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_MMAP_THRESHOLD_BYTES = 1 << 30
_TRIM_THRESHOLD_BYTES = (1 << 31) - 1


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@cache
def keep_large_blocks() -> bool:
    """Tell glibc to keep large blocks; return whether it took it. Call it early, before threads have arenas of their own.

    It changes the whole process: memory that was freed stays with it until `release_free_memory`. Elsewhere than on glibc
    it does nothing.
    """
    libc = _glibc()
    if libc is None:
        logger.debug("The allocator is not glibc's; large blocks are left to it")
        return False
    # One arena, because a block that one thread frees is otherwise of no use to the next thread that needs one.
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES),
    )
    return all(libc.mallopt(option, value) == 1 for option, value in settings)


def release_free_memory() -> bool:
    """Give free memory back to the system; return whether any was. It takes milliseconds: call it when idle."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1
