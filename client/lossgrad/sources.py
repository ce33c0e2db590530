"""Arrays that are too large for one message: any range of their elements, without copying or even reading the rest.

A Source stands for an array of any kind that `read_operand` takes: in memory, memory-mapped, on a GPU, with any strides.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

from lossgrad.tensors import ITEMSIZES, NUMPY, Family, read_mask, read_operand, read_weight
from lossgrad_api.codec import Buffer, WireTensor


class Source:
    """An array whose elements, in C order, can be had in ranges. `name` is what errors call it."""

    def __init__(self, array: Any, name: str) -> None:
        array = as_indexable(array)
        self.name = name
        self.shape: tuple[int, ...] = tuple(array.shape)
        # An empty piece has the type and family of the whole, and is refused for the same reasons.
        empty = array[(slice(0, 0),) * max(1, len(self.shape))] if self.shape else array
        self.family: Family = read_operand(empty, name).family
        self.data_type = self._read(empty).data_type
        self.element_count = math.prod(self.shape)
        self.itemsize = ITEMSIZES[self.data_type]
        self._array = array
        self._element = b""  # where all elements are the same, and there is no array
        self._data: Buffer | None = self._read(array).data if _lies_flat(array) and name != "weight" else None
        self._pages = None if self._data is None else MappedPages.of(array)

    @classmethod
    def of_wire(cls, wire: WireTensor, family: Family, name: str) -> Source:
        """Return a tensor that was read already as a source."""
        source = cls.__new__(cls)
        source.name, source.shape, source.data_type, source.family = name, wire.shape, wire.data_type, family
        source.element_count, source.itemsize = math.prod(wire.shape), ITEMSIZES[wire.data_type]
        source._array, source._data, source._element = None, wire.data, b""
        source._pages = None
        return source

    def expanded(self, shape: tuple[int, ...]) -> Source:
        """Return it broadcast to a shape."""
        if self.shape == shape:
            return self
        if self._array is None:  # a number, or zeros
            source = Source.of_wire(self.whole()._replace(shape=shape), self.family, self.name)
            source._data = None
            source._element = bytes(self.elements(0, 1))
            return source
        is_torch = hasattr(self._array, "expand")
        return Source(self._array.expand(shape) if is_torch else np.broadcast_to(self._array, shape), self.name)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], data_type: int, name: str) -> Source:
        """Return zeros, which take no memory to speak of."""
        source = cls.of_wire(WireTensor(data_type, shape, b""), NUMPY, name)
        source._data = None
        source._element = bytes(source.itemsize)
        return source

    @property
    def byte_count(self) -> int:
        """The bytes of all elements, as they are sent."""
        return self.element_count * self.itemsize

    def elements(self, start: int, stop: int) -> Buffer:
        """Return the bytes of the elements from `start` to before `stop`: a view where they lie so in memory."""
        if self._data is not None:
            return self._data[start * self.itemsize : stop * self.itemsize]
        if self._array is None:
            return self._element * (stop - start)
        pieces = self._pieces(self._array, start, stop)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self, start: int, stop: int) -> None:
        """Take note that these elements were read and sent. Pages of a file that they were read from are let go."""
        if self._pages is not None:
            self._pages.release(start * self.itemsize, stop * self.itemsize)

    def rows(self, start: int, stop: int) -> WireTensor:
        """Return some of the rows (indices of the first dimension) as a tensor."""
        size = math.prod(self.shape[1:])
        return WireTensor(self.data_type, (stop - start, *self.shape[1:]), self.elements(start * size, stop * size))

    def flat(self, start: int, stop: int) -> WireTensor:
        """Return some of the elements as a tensor of one dimension."""
        return WireTensor(self.data_type, (stop - start,), self.elements(start, stop))

    def whole(self) -> WireTensor:
        """Return all of it."""
        return WireTensor(self.data_type, self.shape, self.elements(0, self.element_count))

    def _pieces(self, array: Any, start: int, stop: int) -> list[Buffer]:
        """Return the elements in as few pieces as there are blocks of whole rows, rows of rows, and so on."""
        if start >= stop:
            return []
        if not array.shape or (start == 0 and stop == math.prod(array.shape)):
            return [self._read(array).data]
        size = math.prod(array.shape[1:])
        first, last = start // size, (stop - 1) // size
        if first == last and size > 1:
            return self._pieces(array[first], start - first * size, stop - first * size)
        pieces: list[Buffer] = []
        if start > first * size:
            pieces += self._pieces(array[first], start - first * size, size)
            first += 1
        whole = stop // size
        if whole > first:
            pieces.append(self._read(array[first:whole]).data)
        if stop > whole * size:
            pieces += self._pieces(array[whole], 0, stop - whole * size)
        return pieces

    def _read(self, array: Any) -> WireTensor:
        if self.name == "weight":
            return read_weight(array)
        return read_mask(array) if self.name == "mask" else read_operand(array, self.name).wire


class MappedPages:
    """The pages of a file that a numpy.memmap holds in memory, one after the other as they are touched, unless let go.

    What was written to them is not lost: it is the file's.
    """

    def __init__(self, mapping: mmap.mmap, offset: int) -> None:
        """`offset` is where in the mapping the array begins."""
        self._mapping = mapping
        self._offset = offset

    @classmethod
    def of(cls, array: Any) -> MappedPages | None:
        """Return those of an array that lies in C order; None if it is not mapped, or is a private copy ("c")."""
        owner, is_shared = array, False
        while isinstance(owner, np.ndarray):
            if isinstance(owner, np.memmap):
                is_shared = owner.mode != "c"
            owner = owner.base
        if not (is_shared and isinstance(owner, mmap.mmap) and hasattr(owner, "madvise")):
            return None
        begin = np.frombuffer(owner, np.uint8).ctypes.data
        return cls(owner, array.ctypes.data - begin)

    def release(self, start: int, stop: int) -> None:
        """Let go of the whole pages among these bytes of the array; whoever touches them reads them anew."""
        first = -(-(self._offset + start) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (self._offset + stop) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, length)


def let_go_of_pages(*arrays: Any) -> None:
    """Let go of the pages of files that arrays were read from as a whole; of other arrays, nothing."""
    for array in arrays:
        if isinstance(array, np.ndarray) and array.flags.c_contiguous:
            pages = MappedPages.of(array)
            if pages is not None:
                pages.release(0, array.nbytes)


def as_indexable(array: Any) -> Any:
    """Return an array of which `array[3:5]` are rows 3 and 4, itself if it is one."""
    # A pandas.Series has all this too, and means something else by it.
    is_one = all(hasattr(array, name) for name in ("shape", "dtype", "__getitem__")) and not hasattr(array, "iloc")
    return array if is_one else np.asarray(array)


def _lies_flat(array: Any) -> bool:
    """Whether reading the array as a whole copies nothing."""
    if isinstance(array, np.ndarray):
        return bool(array.flags.c_contiguous) and array.dtype.isnative
    return (
        hasattr(array, "is_contiguous") and array.is_contiguous() and array.device.type == "cpu" and not array.is_neg()
    )
