"""Stream messages that are written in place: a request is copied once, from the caller's arrays to where it is sent from.

A StreamComputeLossRequest is its requests one behind the other, so each can be written as it comes. Lengths and tags are
varints of a fixed width, which protobuf allows, so that it is known beforehand what a request takes in the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lossgrad_api.raw_bytes import IS_SUPPORTED, new_bytes, write_without_gil
from lossgrad_api.wire import Buffer

_LENGTH_BYTES: Final = 5
_TAG_BYTES: Final = 5
# Within a request's frame: field 1, the tag, with its key; and the key and the length of field 3, the request.
_INNER_BYTES: Final = 1 + _TAG_BYTES + 1 + _LENGTH_BYTES
# What a request takes in a message beside its own bytes.
HEAD_BYTES: Final = 1 + _LENGTH_BYTES + _INNER_BYTES


class MessageBuilder:
    """A message being written. `capacity` is what it takes at most: nothing is copied twice where it becomes full."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._message, self._address = new_bytes(capacity) if IS_SUPPORTED else (b"", 0)
        self._frames: list[Buffer] = []  # where memory cannot be written to
        self._ends: list[tuple[int, int]] = []  # of each request, without its head
        self._size = 0

    def __len__(self) -> int:
        """Return how many requests are in it."""
        return len(self._ends)

    def has_room(self, byte_count: int) -> bool:
        """Whether a request of this size fits."""
        return self._size + HEAD_BYTES + byte_count <= self._capacity

    def add(self, tag: int, parts: Sequence[Buffer], byte_count: int) -> None:
        """Copy a request of this size into it. `tag` is below 2^35."""
        head = b"\x0a%b\x08%b\x1a%b" % (
            _varint(byte_count + _INNER_BYTES),
            _varint(tag),
            _varint(byte_count),
        )
        if IS_SUPPORTED:
            write_without_gil(self._address + self._size, [head, *parts])
        else:
            self._frames.append(b"".join([head, *parts]))
        start = self._size + HEAD_BYTES
        self._size = start + byte_count
        self._ends.append((start, self._size))

    def finish(self) -> tuple[bytes, list[memoryview]]:
        """Return the message, and each request in it. Nothing may be added from here on."""
        if not IS_SUPPORTED:
            message = b"".join(self._frames)
        elif self._size == self._capacity:
            message = self._message
        else:
            message = self._message[: self._size]
        self._message = b""
        view = memoryview(message)
        return message, [view[start:stop] for start, stop in self._ends]


def _varint(value: int) -> bytes:
    """Return a number below 2^35 as a varint of five bytes."""
    return bytes(
        (
            value & 0x7F | 0x80,
            value >> 7 & 0x7F | 0x80,
            value >> 14 & 0x7F | 0x80,
            value >> 21 & 0x7F | 0x80,
            value >> 28,
        )
    )
