"""Memory for a large answer that is computed where it is sent from: the message's own bytes, with room for what precedes.

An answer's tensor is written by the worker straight into the bytes object that gRPC sends, and what stands before it is
written when it is known. So a large answer is never copied, and needs no thread to be joined in. What room is left is
filled with ComputeLossResponse.padding.

A bytes object is immutable once others see it; until `finish` gives it away, nobody does (lossgrad_api/raw_bytes.py).
"""

from __future__ import annotations

from typing import Final

from lossgrad_api.raw_bytes import new_bytes, writable_view

# More than all that stands before a tensor of 16 dimensions, and an idempotency key.
_ROOM: Final = 768
_ALIGNMENT: Final = 64  # a cache line: what kernels write fastest
_PADDING_TAG: Final = 15 << 3 | 2
_PADDING_HEAD: Final = 3  # its tag, and its length in two bytes


class AnswerMemory:
    """The bytes of one answer: room for a head, then `data`, where the worker writes."""

    __slots__ = ("_address", "_begin", "_message", "_size", "data")

    def __init__(self, byte_count: int) -> None:
        """Allocate an answer whose tensor takes `byte_count` bytes. Raises MemoryError."""
        self._size = _ROOM + _ALIGNMENT + byte_count + _PADDING_HEAD
        self._message, self._address = new_bytes(self._size)
        self._begin = _ROOM + -(self._address + _ROOM) % _ALIGNMENT
        self.data = writable_view(self._address + self._begin, byte_count)

    def finish(self, head: bytes) -> bytes | None:
        """Return the message: `head`, which ends with the head of the tensor's data, and those. None if `head` is too long.

        The memory is the caller's from then on: nothing may be written to `data` any more.
        """
        before = self._begin - len(head)
        if before < _PADDING_HEAD:
            return None
        end = self._begin + len(self.data)
        message = writable_view(self._address, self._size)
        message[: self._begin] = _padding(before) + head
        message[end:] = _padding(self._size - end)
        message.release()
        return self._message


def _padding(size: int) -> bytes:
    """Return a padding field that takes `size` bytes, tag and length included."""
    length = size - _PADDING_HEAD
    return bytes((_PADDING_TAG, length & 0x7F | 0x80, length >> 7)) + bytes(length)
