"""The protobuf wire format itself: varints, tags, skipping what is unknown; and Tensor, which both directions share.

Reading works on one `bytes` object and offsets into it, because slicing would copy. Nothing read here is trusted: every
length is checked against the end of what holds it.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final, NamedTuple

VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
START_GROUP: Final = 3
END_GROUP: Final = 4
FIXED32: Final = 5

# A tag and a length are 32-bit numbers, at most five bytes as a varint; the generated classes refuse longer ones too.
_MAX_TAG_BYTES: Final = 5

# Groups are not in our messages. An unknown one is skipped, within bounds: walking one costs time for each byte.
_MAX_GROUP_DEPTH: Final = 32
_MAX_GROUP_BYTES: Final = 64 * 1024

Buffer = bytes | bytearray | memoryview
EMPTY: Final = memoryview(b"")

# The tag (field number * 8 + wire type) of Tensor.data.
TENSOR_DATA: Final = 3 << 3 | LENGTH


class WireTensor(NamedTuple):
    """A tensor: the number of its DataType, its shape, and its elements as contiguous little-endian bytes."""

    data_type: int
    shape: tuple[int, ...]
    data: Buffer


class CodecError(ValueError):
    """Bytes that are not the protobuf message that they should be. The text is fit for the sender to read."""


class HeaderTooLarge(CodecError):
    """A message with more bytes beside its tensor data than a message may have."""


def varint(value: int) -> bytes:
    """Return a non-negative integer as a varint."""
    if value < 0x4000:
        return _LAST_VARINTS[value]
    out = b""
    while value >= 0x4000:
        out += _INNER_VARINTS[value & 0x3FFF]
        value >>= 14
    return out + _LAST_VARINTS[value]


# Two bytes' worth at a time, looked up: a loop over bytes costs three times as much, and every message is full of these.
_LAST_VARINTS: Final = tuple(
    bytes((value,)) if value < 0x80 else bytes((value & 0x7F | 0x80, value >> 7)) for value in range(0x4000)
)
_INNER_VARINTS: Final = tuple(bytes((value & 0x7F | 0x80, value >> 7 | 0x80)) for value in range(0x4000))


def signed_varint(value: int) -> bytes:
    """Return an int64 as protobuf writes it: two's complement, ten bytes when negative."""
    return varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return the varint at `position`, as an unsigned 64-bit number, and the position behind it."""
    # By hand for one and two bytes, which most have: the loop takes twice as long.
    if end - position >= 2:
        value = data[position]
        if value < 0x80:
            return value, position + 1
        byte = data[position + 1]
        if byte < 0x80:
            return value & 0x7F | byte << 7, position + 2
    value = 0
    shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
        if shift >= 70:
            raise CodecError(f"the varint at byte {position} is longer than 10 bytes")
    raise CodecError(f"the message ends inside a varint at byte {position}")


def read_length(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return where the length-delimited value at `position` (behind its tag) starts, and where it ends."""
    length, start = read_varint(data, position, end)
    if start - position > _MAX_TAG_BYTES:
        raise CodecError(f"the length at byte {position} is longer than {_MAX_TAG_BYTES} bytes")
    if length > end - start:
        raise CodecError(f"the field at byte {position} says that it has {length} bytes, only {end - start} are left")
    return start, start + length


def to_signed(value: int) -> int:
    """Return the int64 that an unsigned 64-bit varint stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value


def read_tag(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return the tag (field number * 8 + wire type) at `position`, which is before `end`, and the position behind it."""
    tag = data[position]
    behind = position + 1
    if tag >= 0x80:
        tag, behind = read_varint(data, position, end)
    if not 8 <= tag < 1 << 32 or behind - position > _MAX_TAG_BYTES:
        raise CodecError(f"the tag {tag} at byte {position} is not a field's")
    return tag, behind


def skip(data: bytes, tag: int, position: int, end: int, depth: int = 0) -> int:
    """Return the position behind the value of the field `tag`, which starts at `position`."""
    wire_type = tag & 7
    if wire_type == VARINT:
        return read_varint(data, position, end)[1]
    if wire_type == LENGTH:
        return read_length(data, position, end)[1]
    if wire_type == START_GROUP:
        return _skip_group(data, tag, position, end, depth)
    if wire_type not in (FIXED64, FIXED32):
        raise CodecError(f"the field at byte {position} has wire type {wire_type}, which no field here has")
    behind = position + (8 if wire_type == FIXED64 else 4)
    if behind > end:
        raise CodecError(f"the message ends inside the field at byte {position}")
    return behind


def _skip_group(data: bytes, start_tag: int, position: int, end: int, depth: int) -> int:
    if depth >= _MAX_GROUP_DEPTH:
        raise CodecError(f"groups are nested more than {_MAX_GROUP_DEPTH} deep at byte {position}")
    is_cut = end - position > _MAX_GROUP_BYTES
    if is_cut:
        end = position + _MAX_GROUP_BYTES
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag & 7 == END_GROUP:
            if tag >> 3 != start_tag >> 3:
                raise CodecError(f"the group that ends at byte {position} is not the one that began")
            return position
        position = skip(data, tag, position, end, depth + 1)
    if is_cut:
        raise HeaderTooLarge(f"a group takes more than {_MAX_GROUP_BYTES} bytes; no field of ours is one")
    raise CodecError("the message ends inside a group")


@lru_cache(maxsize=4096)
def tensor_head(tag: int, data_type: int, shape: tuple[int, ...], byte_count: int) -> bytes:
    """Return everything of a Tensor field up to its data."""
    head = scalar_field(1, data_type)
    if shape:
        head += b"\x12" + varint(8 * len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    if byte_count:
        head += b"\x1a" + varint(byte_count)
    return varint(tag) + varint(len(head) + byte_count) + head


def scalar_field(field: int, value: int) -> bytes:
    """Return an integer field; nothing for 0, as proto3 has it."""
    return varint(field << 3) + signed_varint(value) if value else b""


@lru_cache(maxsize=256)
def string_field(field: int, value: str) -> bytes:
    """Return a string field; nothing for "", as proto3 has it."""
    data = value.encode()
    return varint(field << 3 | 2) + varint(len(data)) + data if data else b""
