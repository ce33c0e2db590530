"""The form of a ComputeLossRequest whose tensors are in shared memory: what it has in common with the next of its kind.

Callers send the same kind of request again and again. Of such a one all bytes are equal and in the same positions but the
regions, the offsets into them, and the data of small tensors that came along. As with KnownRequests, a request is taken for
one of a form only if all its other bytes are compared and equal: what is read is what parsing it would have given. The one
who sends them writes them so, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

from lossgrad_api.request_codec import REQUEST_LAYOUT
from lossgrad_api.shared_codec import OUTPUTS_TAG, SHARED_MEMORY_TAG, TOKEN_BYTES, SharedPart
from lossgrad_api.wire import FIXED64, LENGTH, TENSOR_DATA, read_length, read_tag, skip

_MAX_FIXED_BYTES: Final = 2048
_OPERANDS: Final = ("input", "target", "weight", "mask")
# Of SharedMemory: the region's name, the offset, the number of bytes.
_REGION: Final = 1 << 3 | LENGTH
_OFFSET: Final = 2 << 3 | FIXED64
_BYTE_COUNT: Final = 3 << 3 | FIXED64

_new: Final = tuple.__new__  # a NamedTuple's own constructor takes three times as long


class Places(NamedTuple):
    """Where one request's tensors are, in the order of a form's `names`: in shared memory, or came along."""

    operands: tuple[SharedPart | memoryview, ...]
    outputs: SharedPart | None


class _DataAt(NamedTuple):
    """Where in a request the data of a tensor are that came along."""

    begin: int
    end: int


class _PartAt(NamedTuple):
    """Which of the values that are unpacked are a part's region and offset; the number of its bytes is always the same.

    Without an offset, which is how 0 is written, there is none.
    """

    region: int
    offset: int | None
    byte_count: int


class SharedForm(NamedTuple):
    """What is the same in all requests of one form and length. `names` are those of the operands that they have.

    `layout` tells forms apart whose bytes are in other positions: those of one layout have `unpack` and `fixed` in common,
    and differ in what `fixed` picks from what was unpacked.
    """

    names: tuple[str, ...]
    layout: str
    unpack: Callable[[bytes, int], tuple[Any, ...]]
    pack: Callable[..., bytes]
    fixed: Callable[[tuple[Any, ...]], Any]
    values: tuple[Any, ...]  # of the request that the form was made of
    operands: tuple[_DataAt | _PartAt, ...]
    outputs: _PartAt | None

    def places(self, values: tuple[Any, ...], data: bytes, start: int) -> Places:
        """Return the places of the request of this form at `start`, of which `values` were unpacked."""
        operands = [_place(one, values, data, start) for one in self.operands]
        return _new(Places, (tuple(operands), None if self.outputs is None else _part(self.outputs, values)))

    def write(self, operands: Sequence[SharedPart], outputs: SharedPart | None) -> bytes | None:
        """Return the request of this form whose tensors are in these places; None where it is not of this form."""
        wanted = self.operands if outputs is None else (*self.operands, self.outputs)
        parts = operands if outputs is None else (*operands, outputs)
        values = list(self.values)
        if len(wanted) != len(parts) or (outputs is None) != (self.outputs is None):
            return None
        for one, (region, offset, byte_count) in zip(wanted, parts, strict=True):
            if not isinstance(one, _PartAt) or one.offset is None or one.byte_count != byte_count:
                return None
            values[one.region] = region
            values[one.offset] = offset
        return self.pack(*values)


def _place(one: _DataAt | _PartAt, values: tuple[Any, ...], data: bytes, start: int) -> SharedPart | memoryview:
    if isinstance(one, _PartAt):
        return _part(one, values)
    return memoryview(data)[start + one.begin : start + one.end]


def _part(one: _PartAt, values: tuple[Any, ...]) -> SharedPart:
    region, offset, byte_count = one
    return _new(SharedPart, (values[region], 0 if offset is None else values[offset], byte_count))


def shared_form(data: bytes, start: int, end: int) -> SharedForm | None:
    """Return the form of the request `data[start:end]`, which was read before without an error.

    None where it has a key of its own, a field twice, a region whose name is none of ours, or more than is worth keeping.
    """
    reader = _Reader(data, start)
    found: dict[int, _DataAt | _PartAt | None] = {}
    position = start
    while position < end:
        tag, position = read_tag(data, position, end)
        if tag == REQUEST_LAYOUT.key or tag in found:
            return None
        begin = position
        position = skip(data, tag, position, end)
        if tag == OUTPUTS_TAG or tag in REQUEST_LAYOUT.operands:
            begin, position = read_length(data, begin, end)
            found[tag] = reader.part(begin, position) if tag == OUTPUTS_TAG else reader.tensor(begin, position)
            if found[tag] is None:
                return None
    reader.keep(end, end, "")
    outputs = found.pop(OUTPUTS_TAG, None)
    assert not isinstance(outputs, _DataAt)  # noqa: S101 - for the type checker
    by_name = {name: found.get(tag) for name, tag in zip(_OPERANDS, REQUEST_LAYOUT.operands, strict=True)}
    operands = {name: one for name, one in by_name.items() if one is not None}
    return reader.form(tuple(operands), tuple(operands.values()), outputs)


class _Reader:
    """Walks over a request once, and notes which bytes change from one to the next."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._start = start
        self._kept = start  # the bytes up to here are in `_format`
        self._format = "<"
        self._count = 0  # of the values that it gives
        self._fixed: list[int] = []

    def keep(self, begin: int, end: int, code: str) -> int:
        """Take `data[begin:end]` for something that changes; return which of the unpacked values it is, if it is one."""
        self._format += f"{begin - self._kept}s{code}"
        self._fixed.append(self._count)
        self._count += 1
        self._kept = end
        if not code or code.endswith("x"):
            return -1
        self._count += 1
        return self._count - 1

    def tensor(self, position: int, end: int) -> _DataAt | _PartAt | None:
        """Return where the elements of the tensor `data[position:end]` are."""
        place: _DataAt | _PartAt | None = None
        while position < end:
            tag, position = read_tag(self._data, position, end)
            begin = position
            position = skip(self._data, tag, position, end)
            if tag in (TENSOR_DATA, SHARED_MEMORY_TAG):
                begin, position = read_length(self._data, begin, end)
                if place is not None:
                    return None
                if tag == SHARED_MEMORY_TAG:
                    place = self.part(begin, position)
                else:
                    self.keep(begin, position, f"{position - begin}x")
                    place = _DataAt(begin - self._start, position - self._start)
                if place is None:
                    return None
        return place

    def part(self, position: int, end: int) -> _PartAt | None:
        """Return where the SharedMemory `data[position:end]` has its fields."""
        found: dict[int, int] = {}
        while position < end:
            tag, position = read_tag(self._data, position, end)
            begin = position
            position = skip(self._data, tag, position, end)
            if tag in found or tag not in (_REGION, _OFFSET, _BYTE_COUNT):
                return None
            if tag == _REGION:
                begin, position = read_length(self._data, begin, end)
                if position - begin != TOKEN_BYTES:
                    return None
                found[tag] = self.keep(begin, position, f"{TOKEN_BYTES}s")
            elif tag == _OFFSET:
                found[tag] = self.keep(begin, position, "Q")
            else:
                (found[tag],) = struct.unpack_from("<Q", self._data, begin)
        if _REGION not in found:
            return None
        return _PartAt(found[_REGION], found.get(_OFFSET), found.get(_BYTE_COUNT, 0))

    def form(
        self, names: tuple[str, ...], operands: tuple[_DataAt | _PartAt, ...], outputs: _PartAt | None
    ) -> SharedForm | None:
        """Return what was found; None where there is too much of it."""
        layout = struct.Struct(self._format)
        fixed = itemgetter(*self._fixed)
        values = layout.unpack_from(self._data, self._start)
        if sum(len(values[index]) for index in self._fixed) > _MAX_FIXED_BYTES:
            return None
        return SharedForm(names, self._format, layout.unpack_from, layout.pack, fixed, values, operands, outputs)
