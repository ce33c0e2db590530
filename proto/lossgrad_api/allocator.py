"""How the process's allocator treats large blocks. The server sets it at start; a client may.

glibc maps and unmaps every block above 128 KiB to 32 MiB anew, so each message of that size pays for its page faults and
for zeroing: at 8 MiB and above that alone is two thirds of a call. Told to keep such blocks, it reuses warm memory.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from functools import cache

logger = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_MMAP_THRESHOLD_BYTES = 1 << 30
_TRIM_THRESHOLD_BYTES = (1 << 31) - 1

_MADV_DONTNEED = 4
_IS_MMAPPED = 2
_NON_MAIN_ARENA = 4
_PAGE_BYTES = mmap.PAGESIZE
# Free blocks are looked for from the one size down to the other, and given back in pieces, each in a fraction of a ms.
_LARGEST_BYTES = 256 << 20
_LEAST_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20


class _MallInfo(ctypes.Structure):
    """struct mallinfo2; `fordblks` are the bytes that are free."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")  # and not what may be preloaded in its place
    except OSError:
        return None
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        return None
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


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
    """Give free memory back to the system; return whether any was. It takes tens of milliseconds: call it when idle.

    malloc_trim alone would hold the allocator's lock for all of that time, and stop whoever allocates: the server's event
    loop. So most of the memory is given back beforehand, by whom it belongs to meanwhile: a block is allocated, its pages
    are given back, and it is freed.
    """
    libc = _glibc()
    if libc is None:
        return False
    _give_back_free_blocks(libc)
    return bool(libc.malloc_trim(0) == 1)


def _give_back_free_blocks(libc: ctypes.CDLL) -> None:
    """Give back the pages of free blocks from 1 MiB on, of the arena that all threads share. Nobody waits for it."""
    if not hasattr(libc, "mallinfo2"):  # before glibc 2.33
        return
    libc.mallinfo2.restype = _MallInfo
    left = libc.mallinfo2().fordblks + 2 * _LARGEST_BYTES  # what is asked for in vain makes the arena so much larger
    taken: list[int] = []
    size = _LARGEST_BYTES
    try:
        while size >= _LEAST_BYTES and left >= size:
            end = libc.sbrk(0)
            block = libc.malloc(size)
            if block and (libc.sbrk(0) != end or _is_elsewhere(block)):  # of this size none was free
                libc.free(block)
                block = None
            if not block:
                size //= 2
                continue
            taken.append(block)
            left -= size
            first, last = -(-block // _PAGE_BYTES) * _PAGE_BYTES, (block + size) // _PAGE_BYTES * _PAGE_BYTES
            for at in range(first, last, _PIECE_BYTES):
                libc.madvise(at, min(_PIECE_BYTES, last - at), _MADV_DONTNEED)
    finally:
        for block in taken:
            libc.free(block)


def _is_elsewhere(block: int) -> bool:
    """Whether a block is not the shared arena's: mapped by itself, or another arena's.

    The word before a block holds its size, a multiple of 16, and that in the lowest bits (glibc's malloc.c).
    """
    word = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    return bool(word & (_IS_MMAPPED | _NON_MAIN_ARENA))
