"""Segments: memory that the server makes, seals, and hands to a caller, who may do nothing to it but read and write.

A segment is an anonymous memory file (memfd) with seals on its size, so a mapping of it can always be touched: computing
in it needs no copy and no check of what the other side does. It has no name in any file system. What a caller says to
use it is 16 random bytes, told to nobody but who was handed the memory. A segment belongs to whom it was made for, a
connection of `handover.py`, and ends with it. Everything here is called in the event loop's thread.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lossgrad_api.shared_codec import TOKEN_BYTES
from lossgrad_server.errors import InvalidRequest, Reason
from lossgrad_server.shared_memory.rules import MAX_PART_BYTES, PART_ALIGNMENT, Budget, check_part, unknown_region

logger = logging.getLogger(__name__)

# A segment that no request has used for this long is given up, so that others find room; its owner is told when it comes
# back, and gets a new one. The owner's own mapping is not touched.
IDLE_SECONDS: Final = 600.0

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
_OVERCOMMIT: Final = Path("/proc/sys/vm/overcommit_memory")


class Segment:
    """One segment, mapped. The mapping lives as long as anything refers to it: a request that computes in it, too."""

    __slots__ = ("byte_count", "memory", "owner", "token", "used_at", "whole")

    def __init__(self, owner: object, memory: mmap.mmap, byte_count: int, now: float) -> None:
        self.owner = owner
        self.memory = memory
        self.whole = memoryview(memory)
        self.byte_count = byte_count
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.used_at = now


class Segments:
    """The segments of one server."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._clock = clock
        self._segments: dict[bytes, Segment] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._segments)

    @property
    def byte_count(self) -> int:
        """How many bytes they have together."""
        return sum(segment.byte_count for segment in self._segments.values())

    def create(self, owner: object, byte_count: int) -> tuple[Segment, int]:
        """Make a segment; return it and a descriptor of its memory, which the caller closes.

        Raises TooLarge where the budget has no room, OSError where the system has none.
        """
        check_part("the region", 0, byte_count, self._budget.max_bytes)
        self._budget.take(byte_count)
        try:
            descriptor, memory = _sealed_memory(byte_count)
        except BaseException:
            self._budget.give_back(byte_count)
            raise
        segment = Segment(owner, memory, byte_count, self._clock())
        self._segments[segment.token] = segment
        return segment, descriptor

    def part(self, what: str, token: bytes, offset: int, byte_count: int) -> memoryview:
        """Return part of a segment, as writable memory. `what` names it in errors. Raises RequestError."""
        segment = self._segments.get(token)
        if segment is None:
            raise unknown_region(
                f"{what} is in a region of shared memory that this server does not know, or has given up because it was "
                "long unused; get another, or send the tensor in the message"
            )
        if not 0 <= offset <= offset + byte_count <= segment.byte_count <= MAX_PART_BYTES:
            check_part(what, offset, byte_count, segment.byte_count)
        if offset % PART_ALIGNMENT:
            raise InvalidRequest(
                f"{what} begins at byte {offset} of its region; it must be a multiple of {PART_ALIGNMENT}",
                reason=Reason.BAD_REGION,
                field="shared_memory.offset",
            )
        segment.used_at = self._clock()
        if byte_count == segment.byte_count:
            return segment.whole
        return segment.whole[offset : offset + byte_count]

    def has_any(self, owner: object) -> bool:
        """Whether a segment is the owner's."""
        return any(segment.owner is owner for segment in self._segments.values())

    def take(self, owner: object, token: bytes) -> Segment | None:
        """Forget one of the owner's segments and return it; None if it has none of that name."""
        segment = self._segments.get(token)
        if segment is None or segment.owner is not owner:
            return None
        return self._forget(segment)

    def take_all(self, owner: object) -> list[Segment]:
        """Forget all of the owner's segments and return them."""
        return [self._forget(segment) for segment in list(self._segments.values()) if segment.owner is owner]

    def give_up_unused(self, idle_seconds: float = IDLE_SECONDS) -> int:
        """Forget the segments that no request has used for so long; return how many."""
        latest = self._clock() - idle_seconds
        unused = [segment for segment in self._segments.values() if segment.used_at <= latest]
        for segment in unused:
            self._forget(segment)
        return len(unused)

    def close(self) -> None:
        """Forget all. What their owners have mapped stays as it is."""
        for segment in list(self._segments.values()):
            self._forget(segment)

    def _forget(self, segment: Segment) -> Segment:
        del self._segments[segment.token]
        self._budget.give_back(segment.byte_count)
        return segment


def free_pages(segment: Segment) -> None:
    """Give a segment's pages back to the system, whoever still has it mapped: they read zeros from then on.

    For segments whose owner has said that it is done with them, or is gone. Without this, memory that was the server's to
    account for would live on for as long as anybody kept a descriptor. Takes a millisecond for some MiB; in any thread.
    """
    try:
        segment.memory.madvise(mmap.MADV_REMOVE)
    except OSError as error:
        logger.warning("The pages of a segment could not be freed: %s", error.strerror)


def why_impossible() -> str:
    """Return why this system cannot have segments; "" where it can."""
    if not (hasattr(os, "memfd_create") and _SEALS):
        return "this system has no sealed memory files"
    try:
        is_strict = _OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    except OSError:
        is_strict = False
    # Then a page of a mapping may be refused when it is first touched, which kills whoever touches it.
    return "vm.overcommit_memory is 2, under which mapped memory may be refused when it is touched" if is_strict else ""


def _sealed_memory(byte_count: int) -> tuple[int, mmap.mmap]:
    descriptor = os.memfd_create("lossgrad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, byte_count)
        # Before anybody else has it. Without the seal on shrinking a caller could cut it short under our mapping.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor, mmap.mmap(descriptor, byte_count)
    except BaseException:
        os.close(descriptor)
        raise
