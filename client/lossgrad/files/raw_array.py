"""Arrays whose elements lie in a file as they are: .npy, members of .npz that are not compressed, .safetensors.

Each read maps just its range of the file, and the map goes with the last array that looks into it. So the process never
holds more of a file than the slices that are under way, and nothing is copied.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from lossgrad.files.array_file import ArrayFile, Elements, FileError, unreadable

# What a server takes; lossgrad.tensors has the same list.
_SUPPORTED: Final = frozenset(
    ("float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "bfloat16")
)
_ADVICE: Final = {"uint16": "save it as int32", "uint32": "save it as int64", "uint64": "save it as int64 or float64"}


class RawArray(ArrayFile):
    """An array whose bytes begin at `offset`. `dtype` is uint16 for bfloat16; `fortran` means column-major order."""

    def __init__(
        self,
        name: str,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int,
        *,
        bfloat16: bool = False,
        fortran: bool = False,
    ) -> None:
        super().__init__(name, path, shape, data_type_name(dtype, bfloat16=bfloat16))
        self._dtype = dtype
        self._offset = offset
        self._bfloat16 = bfloat16
        self._end = offset + self.element_count * dtype.itemsize
        self._fortran = fortran
        self._file: IO[bytes] | None = None
        self._whole: _ColumnMajor | None = None
        try:
            self._opened()
        finally:
            self.close()

    def read(self, start: int, stop: int) -> Elements:
        """Return the elements of a range: a view into a map of the file, read-only."""
        fd = self._opened()
        if stop <= start:
            values = np.empty(0, self._dtype)
        elif self._fortran:
            if self._whole is None:
                self._whole = _ColumnMajor(fd, self._end, self.shape, self._dtype, self._offset)
            values = self._whole.read(start, stop)
        else:
            first = self._offset + start * self._dtype.itemsize
            aligned = first - first % mmap.ALLOCATIONGRANULARITY
            length = first - aligned + (stop - start) * self._dtype.itemsize
            window = mmap.mmap(fd, length, access=mmap.ACCESS_READ, offset=aligned)
            values = np.frombuffer(window, self._dtype, stop - start, first - aligned)
        return Elements(_widened(values) if self._bfloat16 else native(values))

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._whole = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _extent(self, file_size: int) -> tuple[int, int]:
        return self._offset, self._end - self._offset

    def _opened(self) -> int:
        """Return the open file's descriptor. Mapping bytes that are not there would end the process with SIGBUS."""
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise unreadable(self.path, error) from error
        if size < self._end:
            raise FileError(
                f"{self.name} is cut short: its {self.data_type}{list(self.shape)} needs {self._end} bytes of the file, "
                f"which has {size}; write it anew"
            )
        return self._file.fileno()


class _ColumnMajor:
    """Reads ranges in C order from an array in Fortran order: copies, through a map that is emptied after each."""

    def __init__(self, fd: int, end: int, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        self._map = mmap.mmap(fd, end, access=mmap.ACCESS_READ)
        self._array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, self._map, offset, order="F")

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        values = np.empty(stop - start, self._array.dtype)
        _copy_range(self._array, start, values)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return values


def _copy_range(array: np.ndarray[Any, Any], start: int, out: np.ndarray[Any, Any]) -> None:
    """Copy the elements from `start` on, in C order, until `out` (flat) is full."""
    if array.ndim == 1:
        out[:] = array[start : start + out.size]
        return
    width = math.prod(array.shape[1:])
    row, within = divmod(start, width)
    done = 0
    while done < out.size:
        left = out.size - done
        if within or left < width:
            count = min(width - within, left)
            _copy_range(array[row], within, out[done : done + count])
            row, within = row + 1, 0
        else:
            rows = left // width
            count = rows * width
            out[done : done + count].reshape(rows, *array.shape[1:])[...] = array[row : row + rows]
            row += rows
        done += count


def data_type_name(dtype: np.dtype[Any], *, bfloat16: bool = False) -> str:
    """Return what an ArrayFile calls a type."""
    return "bfloat16" if bfloat16 else "text" if dtype.kind in "US" else dtype.name


def require_numbers(array: ArrayFile) -> None:
    """Raise FileError unless a server takes the array's type of elements."""
    if array.data_type not in _SUPPORTED:
        advice = _ADVICE.get(array.data_type, "save it as float32 or float64")
        raise FileError(f"{array.name} has data type {array.data_type}, which is not supported; {advice}")


def native(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return values little-endian, as they travel."""
    order = values.dtype.newbyteorder("<")
    return values if values.dtype == order else values.astype(order)


def _widened(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view(ml_dtypes.bfloat16)
