"""Requests whose tensors are in shared memory, written as bytes; and the records spoken over the handover socket."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

from lossgrad_api.wire import LENGTH, Buffer, WireTensor, scalar_field, string_field, tensor_head, varint

# Where the answer's tensors begin in the memory that is given for them: on the next multiple of this.
OUTPUT_ALIGNMENT: Final = 64

TOKEN_BYTES: Final = 16
# Both ways: a mark with the version, what is asked or what became of it, the region's name, its size in bytes.
HANDOVER_RECORD: Final = struct.Struct(f"<4sI{TOKEN_BYTES}sQ")
HANDOVER_MARK: Final = b"LGM1"

_PLACE: Final = struct.Struct(f"<2s{TOKEN_BYTES}scQcQ")
# Tags: field number * 8 + wire type.
_MASK, _WEIGHT, _TARGET, _INPUT, OUTPUTS_TAG = (number << 3 | LENGTH for number in (4, 5, 6, 7, 8))
SHARED_MEMORY_TAG: Final = 4 << 3 | LENGTH  # of Tensor
_OUTPUTS_HEAD: Final = varint(OUTPUTS_TAG) + varint(_PLACE.size)


class HandoverAsk(IntEnum):
    """What a caller asks for."""

    REGION = 1  # a region of so many bytes; answered with its name, and its descriptor beside it
    RELEASE = 2  # to end the region of this name: its bytes are gone. Not answered


class HandoverAnswer(IntEnum):
    """What became of it."""

    GRANTED = 0
    MALFORMED = 1  # and the connection is closed
    NO_ROOM = 2  # the server shares as much as it may, or the system has no memory


class SharedPart(NamedTuple):
    """The fields of SharedMemory, in order."""

    region: bytes
    offset: int
    byte_count: int


class SharedTensor(NamedTuple):
    """A tensor whose elements are in shared memory."""

    data_type: int
    shape: tuple[int, ...]
    part: SharedPart


def encode_shared_request(
    specs: Sequence[bytes],
    input: WireTensor | SharedTensor,
    target: WireTensor | SharedTensor,
    *,
    weight: WireTensor | SharedTensor | None = None,
    mask: WireTensor | SharedTensor | None = None,
    outputs: SharedPart | None = None,
    allow_broadcast: bool = False,
    idempotency_key: str = "",
) -> list[Buffer]:
    """Return a ComputeLossRequest as parts to join. `specs` are serialised LossSpec messages."""
    head = b"".join(b"\x0a" + varint(len(spec)) + spec for spec in specs)
    if allow_broadcast:
        head += b"\x10\x01"
    parts: list[Buffer] = [head + string_field(3, idempotency_key)]
    for tag, tensor in ((_MASK, mask), (_WEIGHT, weight), (_TARGET, target), (_INPUT, input)):
        if isinstance(tensor, SharedTensor):
            parts.append(_shared_tensor(tag, tensor))
        elif tensor is not None:
            parts += (tensor_head(tag, tensor.data_type, tensor.shape, len(tensor.data)), tensor.data)
    if outputs is not None:
        parts.append(_OUTPUTS_HEAD + _place(outputs))
    return parts


def _shared_tensor(tag: int, tensor: SharedTensor) -> bytes:
    return _shared_tensor_head(tag, tensor.data_type, tensor.shape) + _place(tensor.part)


@lru_cache(maxsize=1024)
def _shared_tensor_head(tag: int, data_type: int, shape: tuple[int, ...]) -> bytes:
    """Return everything of a Tensor field up to its place."""
    head = scalar_field(1, data_type)
    if shape:
        head += b"\x12" + varint(8 * len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    head += varint(SHARED_MEMORY_TAG) + varint(_PLACE.size)
    return varint(tag) + varint(len(head) + _PLACE.size) + head


def _place(part: SharedPart) -> bytes:
    return _PLACE.pack(b"\x0a\x10", part.region, b"\x11", part.offset, b"\x19", part.byte_count)
