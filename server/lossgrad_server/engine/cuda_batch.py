"""Batches on their way through a CUDA device: copied in, computed, copied out, each in its lane.

A SmallBatch holds requests gathered in a slot's staging memory; all of it is enqueued at once. A LargeRequest is one
request that is copied from and to its own memory in pieces; between two pieces others may be enqueued, so they wait for
a piece and not for the whole. Its computation is one launch: at the device's bandwidth it is short beside any copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lossgrad_server.engine.cuda_device import Device, Lane, Marker
from lossgrad_server.engine.cuda_launch import compute
from lossgrad_server.engine.cuda_layout import ByteArray, Layout
from lossgrad_server.engine.cuda_results import result_of
from lossgrad_server.engine.cuda_template import Region, Template
from lossgrad_server.engine.host_sums import HostSums
from lossgrad_server.work import WorkItem, WorkResult


class Slot:
    """What one batch has to itself while it is under way: staging memory on the host, an arena on the device."""

    def __init__(self, device: Device, byte_count: int) -> None:
        self.sums = HostSums()
        self.inbound = device.pinned(byte_count)
        self.outbound = device.pinned(byte_count)
        self.arena = device.empty(byte_count)


class SmallBatch:
    """Requests that are gathered, computed and given back together."""

    def __init__(self, device: Device, slot: Slot, items: Sequence[WorkItem], templates: Sequence[Template]) -> None:
        self._device = device
        self._slot = slot
        self._items = items
        self._layout = Layout(templates)
        self._done: Marker | None = None

    def pack(self) -> None:
        """Gather the operands and make the tables, in the slot's staging memory."""
        layout, staging = self._layout, _array(self._slot.inbound)
        memory = staging.data
        for item, template, start in zip(
            self._items, layout.templates, layout.starts[:, Region.INPUT].tolist(), strict=True
        ):
            for buffer, place in zip(item.operands, template.operands, strict=True):
                offset = start + place.offset
                memory[offset : offset + len(buffer)] = buffer
        layout.fill(staging[layout.tables.start : layout.tables.stop])

    def advance(self) -> bool:
        """Enqueue everything. Returns False: there is no more for the host to do."""
        if self._done is None:
            device, layout, slot = self._device, self._layout, self._slot
            upload, download = layout.upload, layout.download
            arena = slot.arena[: layout.byte_count]
            _copy(device, Lane.INBOUND, arena[: upload.stop], slot.inbound[: upload.stop])
            _follow(device, Lane.INBOUND, Lane.COMPUTE)
            device.enqueue(Lane.COMPUTE, lambda: compute(arena, layout))
            _follow(device, Lane.COMPUTE, Lane.OUTBOUND)
            _copy(device, Lane.OUTBOUND, slot.outbound[: download.byte_count], arena[download.start : download.stop])
            self._done = device.record(Lane.OUTBOUND)
        return False

    def is_done(self) -> bool:
        """Return whether the answers have arrived."""
        return self._done is not None and self._done.query()

    def wait(self) -> None:
        """Wait until the answers have arrived."""
        assert self._done is not None  # noqa: S101
        self._done.synchronize()

    def results(self) -> list[WorkResult]:
        """Return the answers, in memory of their own."""
        received = _array(self._slot.outbound)[: self._layout.download.byte_count]
        return [result_of(self._layout, job, received, self._slot.sums, copy=True) for job in range(len(self._items))]


class LargeRequest:
    """A request that is copied in pieces."""

    def __init__(self, device: Device, slot: Slot, item: WorkItem, template: Template, piece_bytes: int) -> None:
        self._device = device
        self._slot = slot
        self._item = item
        self._layout = Layout([template])
        self._piece_bytes = piece_bytes
        # Before anything of the same size is allocated on the host.
        self._arena = device.empty(self._layout.byte_count)
        self._received: ByteArray = np.empty(0, np.uint8)
        self._steps = self._run()
        self._is_done = False

    def advance(self) -> bool:
        """Copy the next piece. Returns whether there are more."""
        self._is_done = next(self._steps, None) is None
        return not self._is_done

    def is_done(self) -> bool:
        """Return whether the answer has arrived."""
        return self._is_done

    def wait(self) -> None:
        """Copy what is left."""
        while self.advance():
            pass

    def results(self) -> list[WorkResult]:
        """Return the answer."""
        return [result_of(self._layout, 0, self._received, self._slot.sums, copy=False)]

    def _run(self) -> Iterator[bool]:
        device, layout, arena = self._device, self._layout, self._arena
        yield from self._upload()
        _follow(device, Lane.INBOUND, Lane.COMPUTE)
        device.enqueue(Lane.COMPUTE, lambda: compute(arena, layout))
        _follow(device, Lane.COMPUTE, Lane.OUTBOUND)
        yield from self._download()

    def _upload(self) -> Iterator[bool]:
        tables = np.empty(self._layout.tables.byte_count, np.uint8)
        self._layout.fill(tables)
        sources = [(self._layout.tables.start, tables)]
        for buffer, place in zip(self._item.operands, self._layout.templates[0].operands, strict=True):
            sources.append((self._layout.offset(0, place), np.frombuffer(buffer, np.uint8)))
        pieces = _Ring(self._slot.inbound, self._piece_bytes)
        for offset, source in sources:
            for start in range(0, len(source), self._piece_bytes):
                part = source[start : start + self._piece_bytes]
                piece = pieces.next()
                _array(piece)[: len(part)] = part
                target = self._arena[offset + start : offset + start + len(part)]
                _copy(self._device, Lane.INBOUND, target, piece[: len(part)])
                pieces.taken(self._device.record(Lane.INBOUND))
                yield True

    def _download(self) -> Iterator[bool]:
        span = self._layout.download
        self._received = np.empty(span.byte_count, np.uint8)
        pieces = _Ring(self._slot.outbound, self._piece_bytes)
        under_way: list[tuple[int, Tensor, Marker]] = []
        for start in range(0, span.byte_count, self._piece_bytes):
            if len(under_way) == pieces.count:
                self._receive(*under_way.pop(0))
                yield True
            byte_count = min(self._piece_bytes, span.byte_count - start)
            piece = pieces.next()[:byte_count]
            source = self._arena[span.start + start : span.start + start + byte_count]
            _copy(self._device, Lane.OUTBOUND, piece, source)
            marker = self._device.record(Lane.OUTBOUND)
            pieces.taken(marker)
            under_way.append((start, piece, marker))
        for start, piece, marker in under_way:
            self._receive(start, piece, marker)
            yield True

    def _receive(self, start: int, piece: Tensor, marker: Marker) -> None:
        marker.synchronize()
        self._received[start : start + len(piece)] = _array(piece)


class _Ring:
    """Staging memory as pieces that are used in turn, each again when the device is done with it."""

    def __init__(self, staging: Tensor, piece_bytes: int) -> None:
        self.count = len(staging) // piece_bytes
        self._pieces = [staging[index * piece_bytes : (index + 1) * piece_bytes] for index in range(self.count)]
        self._markers: list[Marker | None] = [None] * self.count
        self._index = -1

    def next(self) -> Tensor:
        """Return the next piece, when the device has copied what was in it."""
        self._index = (self._index + 1) % self.count
        marker = self._markers[self._index]
        if marker is not None:
            marker.synchronize()
        return self._pieces[self._index]

    def taken(self, marker: Marker) -> None:
        """Note that the piece last returned is free again after the marker."""
        self._markers[self._index] = marker


def _copy(device: Device, lane: Lane, target: Tensor, source: Tensor) -> None:
    def copy() -> None:
        target.copy_(source, non_blocking=True)

    device.enqueue(lane, copy)


def _follow(device: Device, first: Lane, second: Lane) -> None:
    device.wait(second, device.record(first))


def _array(tensor: Tensor) -> ByteArray:
    array: np.ndarray[Any, np.dtype[np.uint8]] = tensor.numpy()
    return array
