"""What crosses to a device process and back: fixed-size records. Nothing that crosses is ever unpickled or evaluated.

Two kinds of channel, both SOCK_SEQPACKET, so that a record arrives whole or not at all. One leads to the nursery, which
forks device processes; one to each device process. Tensors, and the tables that say where they are, lie in shared memory
(memory.py): a slot for each batch under way. A slot begins with a table of ITEM records, one for each request, and of PLAN
records, one for each plan that the process does not know yet; behind them lie the plans' headers, and a block for each item.

A block's layout follows from the item's plan, so that both sides know it without being told: the operands, an ANSWER record
with the numbers behind it, and the outputs, each from a cache line on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

from lossgrad_server.jobs import unpack_header
from lossgrad_server.work import SPEC_RESULT, SPEC_TOTAL, LargeLimits

CACHE_LINE: Final = 64
MAX_PACKET_BYTES: Final = 4096
# What a failure tells its caller; every such text of ours is shorter.
MAX_MESSAGE_BYTES: Final = 504
# A process forgets the plans that it knows when there are more.
MAX_PLANS: Final = 4096


class Kind(IntEnum):
    """What a packet is: its first byte."""

    # To the nursery, with the process's end of its channel beside it; and back, with a descriptor of the process.
    FORK = 1
    FORKED = 2
    # From the nursery: it has loaded what processes need; one of them has ended, and how.
    LOADED = 3
    ENDED = 4
    # From a process: what it computes with; or that there is no such device.
    FACTS = 5
    REFUSED = 6
    # To a process, and back.
    WARM_UP = 7
    WARM = 8
    FAILED = 9
    # To a process: memory for a slot, its descriptor beside it; a batch in a slot; that there will be no more.
    MAP = 10
    RUN = 11
    CLOSE = 12
    # From a process: a batch is done.
    DONE = 13


_KIND: Final = struct.Struct("<B7x")
_FORKED: Final = struct.Struct("<B3xi")  # kind, process id
_ENDED: Final = struct.Struct("<B3xii4x")  # kind, process id, status as os.waitpid gives it
_TEXT: Final = struct.Struct(f"<BxH4x{MAX_MESSAGE_BYTES}s")  # kind, length, text
# kind, slots, inline work, large work, large bytes; lengths of device, determinism, GPU's UUID, device's model; all four
_FACTS: Final = struct.Struct("<BxHxxxxqqqHHHH64s384s64s128s")
_MAP: Final = struct.Struct("<BxHxxxxq")  # kind, slot, byte count
# kind, whether to forget all plans, slot, number of the batch, items, plans
_RUN: Final = struct.Struct("<B?HIII")
# kind, whether the device is lost, slot, number of the batch, nanoseconds of packing, computing, unpacking; how often a part
# of it was computed once more, out of memory and for other errors; bytes of memory, as in DeviceMemory
_DONE: Final = struct.Struct("<B?HIqqqIIqqq")

ITEM: Final = struct.Struct("<I4xq")  # number of its plan, offset of its block
PLAN: Final = struct.Struct("<IIq")  # its number, the length of its header, where that lies
ANSWER: Final = struct.Struct("<II")  # 0, or the FailureKind; the length of its message


def kind_of(packet: bytes) -> Kind:
    """Return what a packet is."""
    return Kind(packet[0])


def simple(kind: Kind) -> bytes:
    """Return a packet that says all by its kind."""
    return _KIND.pack(kind)


class Facts(NamedTuple):
    """What a worker in another process says of itself."""

    device: str
    determinism: str
    gpu_uuid: str  # empty for a CPU
    model: str  # of the device: "NVIDIA H200"
    slots: int
    inline_work: int
    large: LargeLimits

    def pack(self) -> bytes:
        """Return the packet."""
        texts = [
            text.encode()[:most]
            for text, most in ((self.device, 64), (self.determinism, 384), (self.gpu_uuid, 64), (self.model, 128))
        ]
        return _FACTS.pack(
            Kind.FACTS,
            self.slots,
            self.inline_work,
            self.large.work,
            self.large.byte_count,
            *(len(text) for text in texts),
            *texts,
        )

    @classmethod
    def unpack(cls, packet: bytes) -> Facts:
        """Read the packet."""
        _, slots, inline_work, work, byte_count, *rest = _FACTS.unpack(packet)
        device, determinism, uuid, model = (
            text[:length].decode(errors="replace") for length, text in zip(rest[:4], rest[4:], strict=True)
        )
        return cls(device, determinism, uuid, model, slots, inline_work, LargeLimits(work, byte_count))


def pack_text(kind: Kind, text: str) -> bytes:
    """Return a packet that holds a text: REFUSED or FAILED."""
    encoded = text.encode()[:MAX_MESSAGE_BYTES]
    return _TEXT.pack(kind, len(encoded), encoded)


def unpack_text(packet: bytes) -> str:
    """Return the text of a packet."""
    _, length, text = _TEXT.unpack(packet)
    return bytes(text[:length]).decode(errors="replace")


def pack_forked(process_id: int) -> bytes:
    """Return the FORKED packet."""
    return _FORKED.pack(Kind.FORKED, process_id)


def unpack_forked(packet: bytes) -> int:
    """Return the process's id."""
    process_id: int = _FORKED.unpack(packet)[1]
    return process_id


def pack_ended(process_id: int, status: int) -> bytes:
    """Return the ENDED packet."""
    return _ENDED.pack(Kind.ENDED, process_id, status)


def unpack_ended(packet: bytes) -> tuple[int, int]:
    """Return the process's id and its status, as os.waitpid gives it."""
    _, process_id, status = _ENDED.unpack(packet)
    return process_id, status


def pack_map(slot: int, byte_count: int) -> bytes:
    """Return the MAP packet."""
    return _MAP.pack(Kind.MAP, slot, byte_count)


def unpack_map(packet: bytes) -> tuple[int, int]:
    """Return the slot and its length in bytes."""
    _, slot, byte_count = _MAP.unpack(packet)
    return slot, byte_count


class Run(NamedTuple):
    """A batch in a slot: so many ITEM records, and behind them so many PLAN records."""

    forgets_plans: bool
    slot: int
    number: int
    item_count: int
    plan_count: int

    def pack(self) -> bytes:
        """Return the packet."""
        return _RUN.pack(Kind.RUN, *self)

    @classmethod
    def unpack(cls, packet: bytes) -> Run:
        """Read the packet."""
        return cls(*_RUN.unpack(packet)[1:])


class DeviceMemory(NamedTuple):
    """What the process has of a GPU's memory, and of the host's for it, in bytes: devices.own_memory_bytes says what."""

    allocated: int
    reserved: int
    pinned: int


_NO_MEMORY: Final = DeviceMemory(-1, -1, -1)


class BatchDone(NamedTuple):
    """A batch's answers are in its slot."""

    is_lost: bool
    slot: int
    number: int
    pack_ns: int
    compute_ns: int
    unpack_ns: int
    memory_retries: int = 0
    error_retries: int = 0
    memory: DeviceMemory | None = None  # where it was looked at since the last batch

    def pack(self) -> bytes:
        """Return the packet."""
        return _DONE.pack(Kind.DONE, *self[:-1], *(self.memory or _NO_MEMORY))

    @classmethod
    def unpack(cls, packet: bytes) -> BatchDone:
        """Read the packet."""
        numbers = _DONE.unpack(packet)
        done, memory = cls(*numbers[1:-3]), DeviceMemory(*numbers[-3:])
        return done if memory == _NO_MEMORY else done._replace(memory=memory)


def aligned(offset: int) -> int:
    """Return the first offset from here on that is on a cache line."""
    return -(-offset // CACHE_LINE) * CACHE_LINE


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where everything of one item lies in its block: offset and length of each operand and output, in bytes."""

    operands: tuple[tuple[int, int], ...]
    answer: int  # of the ANSWER record; behind it the scalars and the totals, or the failure's message
    scalars: tuple[int, int]
    totals: tuple[int, int]
    outputs: tuple[tuple[int, int], ...]
    output_bytes: int
    byte_count: int


@lru_cache(maxsize=MAX_PLANS)
def layout_of(header: bytes) -> BlockLayout:
    """Return the layout of the block of an item with this plan. Raises what `unpack_header` raises."""
    plan = unpack_header(header)
    end = 0
    operands: list[tuple[int, int]] = []
    for tensor in plan.operands:
        operands.append((end, tensor.byte_count))
        end = aligned(end + tensor.byte_count)
    answer = end
    scalars = answer + ANSWER.size, SPEC_RESULT.size * len(plan.specs)
    totals = sum(scalars), SPEC_TOTAL.size * len(plan.specs) if plan.wants_totals else 0
    end = aligned(max(sum(totals), answer + ANSWER.size + MAX_MESSAGE_BYTES))
    outputs: list[tuple[int, int]] = []
    for output in plan.outputs:
        outputs.append((end, output.tensor.byte_count))
        end = aligned(end + output.tensor.byte_count)
    return BlockLayout(tuple(operands), answer, scalars, totals, tuple(outputs), plan.output_byte_count, end)
