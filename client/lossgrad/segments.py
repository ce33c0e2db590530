"""Memory shared with a server on this machine: regions that the server hands out, kept and used again by one client.

A region serves one request at a time: its operands, or its answer's tensors. It goes back to the pool when the answer was
read, or when the last array that lies in it is collected. Where it is not known whether the server is done with it (no
answer came in time), it is given up and never used again.

Threads: `SegmentPool` may be used by any number. Its lock is held while the server is asked for a region. Arrays are
collected at any moment, in any thread, perhaps in one that holds the lock: so that only appends to a deque, and the next
use of the pool takes note. A forked child uses nothing of its parent's pool.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import socket
import threading
import time
from bisect import bisect_right, insort
from collections import deque
from functools import lru_cache
from typing import Any, Final

import numpy as np

from lossgrad_api.shared_codec import (
    HANDOVER_MARK,
    HANDOVER_RECORD,
    TOKEN_BYTES,
    HandoverAnswer,
    HandoverAsk,
    SharedPart,
)

logger = logging.getLogger(__name__)

_WAIT_SECONDS: Final = (
    2.0  # for the server's answer; it takes a fraction of a millisecond, or the server's loop is stuck
)
_SMALLEST_BYTES: Final = 1 << 16
# A region that nobody used for so long is given back to the server.
_UNUSED_SECONDS: Final = 30.0
# After being refused a region, none is asked for this long: the requests go without.
_REFUSED_SECONDS: Final = 1.0


class _Connection:
    """The socket over which regions come. The server takes its end for the end of all that it handed out."""

    def __init__(self, address: str) -> None:
        """`address` is "unix-abstract:NAME" or "unix:/path". Raises OSError where there is no way to it."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(_WAIT_SECONDS)
        kind, _, name = address.partition(":")
        self.socket.connect("\0" + name if kind == "unix-abstract" else name)

    def __del__(self) -> None:
        self.socket.close()


class Segment:
    """One region, mapped into this process. The mapping lives as long as anything refers to it."""

    __slots__ = ("address", "byte_count", "connection", "memory", "token", "unused_since")

    def __init__(self, token: bytes, memory: mmap.mmap, byte_count: int, connection: _Connection) -> None:
        self.token = token
        self.memory = memory
        self.byte_count = byte_count
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.connection = connection  # so that it does not end before the arrays that lie here
        self.unused_since = 0.0

    @property
    def whole(self) -> SharedPart:
        """All of it, as requests name it."""
        return SharedPart(self.token, 0, self.byte_count)

    def part(self, offset: int, byte_count: int) -> SharedPart:
        """Return a part of it, as requests name it."""
        return SharedPart(self.token, offset, byte_count)


class Use:
    """One use of a segment. The segment goes back when `room`, and all arrays that lie in it, are collected.

    Until `settle` is called the server may be at it: a use that is dropped before takes the segment with it.
    """

    __slots__ = ("room", "segment")

    def __init__(self, pool: SegmentPool, segment: Segment) -> None:
        self.segment = segment
        # Something that arrays can be made of, that knows when the last of them is gone.
        self.room: Any = _room_type(segment.byte_count).from_buffer(segment.memory)
        self.room.ended, self.room.segment = pool.ended, segment

    def settle(self) -> None:
        """Take note that the server is done with the segment."""
        self.room.is_settled = True

    def bytes(self, offset: int = 0, byte_count: int = -1) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a part of the memory as an array of bytes, which keeps the segment in use."""
        return np.frombuffer(self.room, np.uint8, byte_count, offset)


class _Room:
    """The memory of one use, as ctypes has it; what an array type has beside its bytes."""

    ended: deque[tuple[Segment, bool]]
    segment: Segment
    is_settled = False

    def __del__(self) -> None:
        # A weakref.finalize would do the same, and takes as long to make as all else that `take` does.
        self.ended.append((self.segment, self.is_settled))


@lru_cache(maxsize=64)
def _room_type(byte_count: int) -> Any:
    """Return ctypes' type of so many bytes. Kept, because making one takes longer than using it."""
    return type("Room", (_Room, ctypes.c_ubyte * byte_count), {})


class SegmentPool:
    """The regions of one client."""

    def __init__(self, address: str, max_region_bytes: int) -> None:
        """Connect to where the server hands out regions. Raises OSError."""
        self._max_region_bytes = max_region_bytes
        self._lock = threading.Lock()
        self._connection = _Connection(address)
        self._pid = os.getpid()
        self._unused: dict[int, list[Segment]] = {}  # by size, the last used last
        self._in_use: list[tuple[int, Segment]] = []  # ascending by address
        self._refused_until = 0.0
        self._look_at = 0.0
        self.ended: deque[tuple[Segment, bool]] = deque()

    @property
    def in_use(self) -> int:
        """How many segments requests and arrays lie in."""
        return len(self._in_use) - len(self.ended)

    def take(self, byte_count: int) -> Use | None:
        """Return a use of a segment of at least so many bytes; None where the server has no room for it now.

        Raises OSError where the server is gone, or does not answer.
        """
        size = max(_SMALLEST_BYTES, 1 << (byte_count - 1).bit_length())
        if size > self._max_region_bytes:
            size = byte_count
        if size > self._max_region_bytes:
            return None
        with self._lock:
            self._take_note()
            unused = self._unused.get(size)
            segment = unused.pop() if unused else self._ask(size)
            if segment is None:
                return None
            insort(self._in_use, (segment.address, segment), key=_address)
        return Use(self, segment)

    def find(self, data: Any) -> SharedPart | None:
        """Return the part that a buffer lies in, if it lies in a segment in use."""
        if not self._in_use:
            return None
        with self._lock:
            return self._find(_address_of(data), len(data))

    def find_arrays(self, *arrays: Any) -> list[SharedPart]:
        """Return the parts that contiguous NumPy arrays lie in, of those that lie in a segment in use."""
        if not self._in_use:
            return []
        with self._lock:
            found = [self._find(_address_of(array), array.nbytes) for array in arrays]
        return [part for part in found if part is not None]

    def _find(self, address: int, byte_count: int) -> SharedPart | None:
        place = bisect_right(self._in_use, address, key=_address) - 1
        if place < 0:
            return None
        first, segment = self._in_use[place]
        if address + byte_count > first + segment.byte_count:
            return None
        return SharedPart(segment.token, address - first, byte_count)

    def close(self) -> None:
        """Let go of all that is unused. The rest goes with its arrays."""
        if self._pid == os.getpid():
            with self._lock:
                self._take_note()
                for segments in self._unused.values():
                    while segments:
                        self._release(segments.pop())

    def _take_note(self) -> None:
        """Put back what has come to its end, and give the server back what nobody needs."""
        now = time.monotonic()
        while self.ended:
            segment, is_settled = self.ended.popleft()
            del self._in_use[bisect_right(self._in_use, segment.address, key=_address) - 1]
            if is_settled:
                segment.unused_since = now
                self._unused.setdefault(segment.byte_count, []).append(segment)
            else:
                self._release(segment)
        if now >= self._look_at:
            self._look_at = now + _UNUSED_SECONDS / 4
            for segments in self._unused.values():
                while segments and segments[0].unused_since <= now - _UNUSED_SECONDS:
                    self._release(segments.pop(0))

    def _ask(self, byte_count: int) -> Segment | None:
        if time.monotonic() < self._refused_until:
            return None
        asked = HANDOVER_RECORD.pack(HANDOVER_MARK, HandoverAsk.REGION, bytes(TOKEN_BYTES), byte_count)
        self._connection.socket.send(asked)
        message, descriptors, _, _ = socket.recv_fds(self._connection.socket, HANDOVER_RECORD.size + 1, 1)
        try:
            if len(message) != HANDOVER_RECORD.size:
                raise ConnectionError("the server ended the connection over which it shares memory")
            mark, answer, token, size = HANDOVER_RECORD.unpack(message)
            if mark == HANDOVER_MARK and answer == HandoverAnswer.NO_ROOM:
                self._refused_until = time.monotonic() + _REFUSED_SECONDS
                return None
            if mark != HANDOVER_MARK or answer != HandoverAnswer.GRANTED or size != byte_count or not descriptors:
                raise ConnectionError("the server's answer about shared memory cannot be read")
            return Segment(token, _mapped(descriptors[0], size), size, self._connection)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _release(self, segment: Segment) -> None:
        if self._pid != os.getpid():
            return
        record = HANDOVER_RECORD.pack(HANDOVER_MARK, HandoverAsk.RELEASE, segment.token, 0)
        try:
            self._connection.socket.send(record)
        except OSError as error:  # the server is gone, and with it what it handed out
            logger.debug("A region could not be given back: %s", error)


def _mapped(descriptor: int, byte_count: int) -> mmap.mmap:
    """Return memory mapped, once it is certain that nobody can cut it short: touching it would kill this process."""
    if (
        os.fstat(descriptor).st_size < byte_count
        or not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    ):
        raise ConnectionError("the server's shared memory is not sealed")
    return mmap.mmap(descriptor, byte_count)


def _address_of(data: Any) -> int:
    """Return where a buffer lies."""
    if data.flags.writeable if isinstance(data, np.ndarray) else isinstance(data, memoryview) and not data.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(data))  # in a tenth of the time that NumPy takes
    return int((data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)).ctypes.data)


def _address(entry: tuple[int, Segment]) -> int:
    return entry[0]
