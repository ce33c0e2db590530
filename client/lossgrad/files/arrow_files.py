"""Columns of .parquet, .arrow and .feather files: numbers, bool, text, and lists that all have the same length. pyarrow.

Parquet is read in runs of rows, row group after row group; Arrow files are mapped and their pages given back as reading
goes on. So either way the process holds little more than the slice that is read. Null stays apart from NaN.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lossgrad.files.array_file import ArrayFile, Elements, FileError, unreadable
from lossgrad.files.members import choose

# How many elements a Parquet file is asked for at a time, and how much of a mapped file may be in memory.
_RUN_ELEMENTS: Final = 1 << 18
_MAPPED_BYTES: Final = 32 * 1024 * 1024


def open_parquet(path: Path, member: str | None) -> ArrayFile:
    """Open one column of a Parquet file."""
    arrow = _pyarrow(path)
    try:
        with _parquet_file(arrow, path) as file:
            schema = file.schema_arrow
            column = choose(path, member, schema.names, "column")
            return _ParquetColumn(arrow, path, column, schema.field(column).type, file)
    except arrow.lib.ArrowException as error:
        raise FileError(f"{str(path)!r} cannot be read as a Parquet file: {_first_line(error)}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def open_arrow(path: Path, member: str | None) -> ArrayFile:
    """Open one column of an Arrow file (Feather version 2 is the same), or of an Arrow stream in a file."""
    arrow = _pyarrow(path)
    try:
        mapped = _mapped(path)
        schema = _reader(arrow, mapped, None).schema
        column = choose(path, member, schema.names, "column")
        index = schema.get_field_index(column)
        if index < 0:
            raise FileError(f"{str(path)!r} has several columns named {column!r}; rename them")
        return _ArrowColumn(arrow, path, column, schema.field(index).type, mapped, index)
    except arrow.lib.ArrowException as error:
        raise FileError(f"{str(path)!r} cannot be read as an Arrow file: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise unreadable(path, error) from error


class _Column(ArrayFile):
    """What both have: rows, each a number or a list of a fixed length, that come in runs."""

    def __init__(self, arrow: Any, path: Path, column: str, kind: Any, row_count: int) -> None:
        self._arrow = arrow
        self._column = column
        self._runs: Iterator[Any] | None = None
        self._run: tuple[int, Any] | None = None  # the first row of the run at hand, and its values
        name = f"{path}:{column}"
        # Before the base class is set up: the length of lists without a declared one is the first row's.
        self.name, self.path = name, path
        inner, data_type = self._inner_shape(kind)
        super().__init__(name, path, (row_count, *inner), data_type)
        self._width = int(np.prod(inner, dtype=np.int64))

    @abstractmethod
    def _runs_from(self, row: int) -> Iterator[tuple[int, Any]]:
        """Give runs of rows in order, each with the number of its first row; the first one has `row` in it."""

    def read(self, start: int, stop: int) -> Elements:
        """Return the elements of a range; views where the file has them as they are."""
        if stop <= start:
            return Elements(np.empty(0, np.str_ if self.data_type == "text" else self.data_type))
        first, last = start // self._width, -(-stop // self._width)
        parts = [self._flat(array, row) for row, array in self._arrays(first, last)]
        skipped = start - first * self._width
        wanted = slice(skipped, skipped + stop - start)
        values = parts[0][0] if len(parts) == 1 else np.concatenate([part for part, _ in parts])
        if all(missing is None for _, missing in parts):
            return Elements(values[wanted])
        flags = [np.zeros(part.size, np.bool_) if missing is None else missing for part, missing in parts]
        return Elements(values[wanted], np.concatenate(flags)[wanted])

    def labels(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], list[str]]:
        """Return the elements of a range as labels; text by Arrow's own dictionaries."""
        if self.data_type != "text" or stop <= start:
            return super().labels(start, stop)
        arrays = []
        for row, array in self._arrays(start, stop):
            plain = array.dictionary_decode() if self._arrow.types.is_dictionary(array.type) else array
            if plain.null_count:
                raise self.null_error(row + int(_nulls(plain).argmax()))
            arrays.append(plain)
        encoded = self._arrow.concat_arrays(arrays).dictionary_encode()
        return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()

    def _arrays(self, first: int, last: int) -> Iterator[tuple[int, Any]]:
        """Give the values of a range of rows, as they come, each with the number of its first row."""
        try:
            while first < last:
                row, array = self._run_with(first)
                count = min(last, row + len(array)) - first
                yield first, array.slice(first - row, count)
                first += count
        except (self._arrow.lib.ArrowException, StopIteration, OSError) as error:
            raise FileError(f"{self.name} cannot be read: {_first_line(error)}; write it anew") from error

    def _run_with(self, row: int) -> tuple[int, Any]:
        if self._run is not None and row < self._run[0]:
            self._runs = None
        if self._runs is None:
            self._runs = self._runs_from(row)
            self._run = None
        while self._run is None or row >= self._run[0] + len(self._run[1]):
            self._run = next(self._runs)
        return self._run

    def _inner_shape(self, kind: Any) -> tuple[tuple[int, ...], str]:
        """Return the shape of each row, and the type of its elements."""
        types = self._arrow.types
        if isinstance(kind, self._arrow.BaseExtensionType):
            kind = kind.storage_type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_fixed_size_list(kind):
            inner, data_type = self._inner_shape(kind.value_type)
            return (kind.list_size, *inner), data_type
        if types.is_list(kind) or types.is_large_list(kind):
            inner, data_type = self._inner_shape(kind.value_type)
            if inner:
                raise FileError(f"{self.name} has lists of lists ({kind}); save it with lists of a fixed size")
            return (self._first_length(),), data_type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return (), "text"
        if types.is_boolean(kind):
            return (), "bool"
        if types.is_integer(kind) or types.is_floating(kind):
            return (), np.dtype(kind.to_pandas_dtype()).name
        raise FileError(f"{self.name} is a column of {kind}; save it as float32 or float64")

    def _first_length(self) -> int:
        for _, array in self._runs_from(0):
            lengths = self._plain(array).value_lengths()
            if len(lengths):
                return int(lengths[0].as_py() or 0)
        return 0

    def _plain(self, array: Any) -> Any:
        if isinstance(array, self._arrow.ExtensionArray):
            array = array.storage
        return array.dictionary_decode() if self._arrow.types.is_dictionary(array.type) else array

    def _flat(self, array: Any, row: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Return the elements of some rows, and where there are none."""
        array = self._plain(array)
        missing = _nulls(array) if array.null_count else None
        types = self._arrow.types
        if types.is_fixed_size_list(array.type):
            size = array.type.list_size
            values, inner = self._flat(array.values.slice(array.offset * size, len(array) * size), row)
            if missing is not None:
                missing = np.repeat(missing, values.size // max(1, len(array)))
                inner = missing if inner is None else inner | missing
            return values, inner
        if types.is_list(array.type) or types.is_large_list(array.type):
            offsets = array.offsets.to_numpy()
            lengths = np.diff(offsets)
            wrong = lengths != self._width if missing is None else (lengths != self._width) | missing
            if wrong.any():
                at = int(wrong.argmax())
                found = "no list (null)" if missing is not None and missing[at] else f"a list of {int(lengths[at])}"
                raise FileError(
                    f"{self.name} has {found} in row {row + at} and of {self._width} in row 0; all rows must have as many"
                )
            return self._flat(array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])), row)
        if types.is_boolean(array.type):
            return array.fill_null(False).to_numpy(zero_copy_only=False), missing
        if self.data_type == "text":
            return array.fill_null("").to_numpy(zero_copy_only=False).astype(np.str_), missing
        dtype = np.dtype(array.type.to_pandas_dtype())
        data = array.buffers()[1]
        if data is None or not len(array):
            return np.zeros(len(array), dtype), missing
        return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize), missing


class _ParquetColumn(_Column):
    def __init__(self, arrow: Any, path: Path, column: str, kind: Any, file: Any) -> None:
        self._file: Any = file
        counts = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self._width = 1
        super().__init__(arrow, path, column, kind, self._starts[-1])
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._runs = self._run = self._file = None

    def _runs_from(self, row: int) -> Iterator[tuple[int, Any]]:
        if self._file is None:
            self._file = _parquet_file(self._arrow, self.path)
        group = bisect_right(self._starts, row) - 1
        start = self._starts[group]
        groups = list(range(group, len(self._starts) - 1))
        rows = max(1, _RUN_ELEMENTS // max(1, self._width))
        for batch in self._file.iter_batches(rows, row_groups=groups, columns=[self._column], use_threads=False):
            yield start, batch.column(0)
            start += batch.num_rows


class _ArrowColumn(_Column):
    def __init__(self, arrow: Any, path: Path, column: str, kind: Any, mapped: mmap.mmap, index: int) -> None:
        self._arrow = arrow
        self._mapped: mmap.mmap | None = mapped
        self._index = index
        self._read_bytes = 0
        self._size = len(mapped)
        counts = [len(array) for array in self._batches(0)]
        self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        super().__init__(arrow, path, column, kind, self._starts[-1])
        self.close()

    def read(self, start: int, stop: int) -> Elements:
        """Return the elements of a range; views into the mapped file where it is not compressed."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise unreadable(self.path, error) from error
        if size < self._size:  # pages that are no longer there would end the process with SIGBUS
            raise FileError(f"{self.name} is cut short: it had {self._size} bytes, now {size}; write it anew")
        if self._read_bytes > _MAPPED_BYTES and self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            # Whoever still looks into these pages gets them back from the file.
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = 0
        elements = super().read(start, stop)
        self._read_bytes += elements.values.nbytes
        return elements

    def close(self) -> None:
        """Let go of the map; it goes when nobody looks into it."""
        self._runs = self._run = self._mapped = None

    def _runs_from(self, row: int) -> Iterator[tuple[int, Any]]:
        first = max(0, bisect_right(self._starts, row) - 1)
        return zip(self._starts[first:], self._batches(first), strict=False)

    def _batches(self, first: int) -> Iterator[Any]:
        if self._mapped is None:
            self._mapped = _mapped(self.path)
        reader = _reader(self._arrow, self._mapped, self._index)
        if hasattr(reader, "get_batch"):
            return (reader.get_batch(index).column(0) for index in range(first, reader.num_record_batches))
        return (batch.column(0) for index, batch in enumerate(reader) if index >= first)


def _parquet_file(arrow: Any, path: Path) -> Any:
    return arrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _reader(arrow: Any, mapped: mmap.mmap, index: int | None) -> Any:
    """Return a reader of one column, of a file or of a stream."""
    source = arrow.BufferReader(arrow.py_buffer(mapped))
    options = arrow.ipc.IpcReadOptions(included_fields=None if index is None else [index], use_threads=False)
    if mapped[:6] == b"ARROW1":
        return arrow.ipc.open_file(source, options=options)
    return arrow.ipc.open_stream(source, options=options)


def _nulls(array: Any) -> np.ndarray[Any, Any]:
    flags: np.ndarray[Any, Any] = array.is_null().to_numpy(zero_copy_only=False)
    return flags


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise FileError(
            f"{str(path)!r} needs {error.name}, which is not installed: pip install 'lossgrad[files]'"
        ) from error
    return pyarrow


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it ends too early"])[0]
