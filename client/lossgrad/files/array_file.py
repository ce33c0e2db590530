"""What every reader gives: an array in a file, of which any range of elements can be read; and how it fails.

A reader is used by one thread at a time. What it gives stays valid after the next read, and after `close`.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

# What a fingerprint reads of a file: this many samples of this many bytes, evenly over it.
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


class FileError(ValueError):
    """A file that cannot be used. The message names it and says what to change."""


class Elements(NamedTuple):
    """A range of an array's elements, flat, in C order."""

    values: np.ndarray[Any, Any]
    # Where a column has no value (null); None where it has all.
    missing: np.ndarray[Any, np.dtype[np.bool_]] | None = None


class ArrayFile(ABC):
    """An array in a file.

    `name` is what errors call it: the path, and the name inside it after a colon. `data_type` is NumPy's name for the
    type of the elements, "bfloat16" or "text". The elements of a bfloat16 array come as ml_dtypes.bfloat16 where
    ml_dtypes is installed, and otherwise as float32, which holds each of them exactly.
    """

    def __init__(self, name: str, path: Path, shape: tuple[int, ...], data_type: str) -> None:
        self.name = name
        self.path = path
        self.shape = shape
        self.data_type = data_type
        self.element_count = math.prod(shape)

    @abstractmethod
    def read(self, start: int, stop: int) -> Elements:
        """Return the elements from `start` to `stop`, counted in C order. Ascending ranges are read fastest."""

    def labels(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], list[str]]:
        """Return the elements of a range as labels: for each the index of its label in the list.

        Raises FileError for floating-point numbers, and where there is no value.
        """
        if self.data_type.startswith(("float", "bfloat")):
            raise FileError(f"{self.name} holds {self.data_type}; groups are named by integers, text or bool")
        values, missing = self.read(start, stop)
        if missing is not None and missing.any():
            raise self.null_error(start + int(missing.argmax()))
        names, indexes = np.unique(values, return_inverse=True)
        return indexes, [_label(name) for name in names.tolist()]

    def null_error(self, position: int) -> FileError:
        """Return the error for an element without a value."""
        return FileError(f"{self.name} has no value (null) at {self.index_of(position)}; fill it in")

    def index_of(self, position: int) -> list[int]:
        """Return the index of an element from its position in C order."""
        return [int(index) for index in np.unravel_index(position, self.shape)] if self.shape else []

    def fingerprint(self) -> str:
        """Return a digest of name in the file, type, shape, and samples from all over it; not of its path or age."""
        member = self.name.removeprefix(str(self.path))
        digest = hashlib.blake2b(f"{member} {self.data_type} {list(self.shape)} ".encode(), digest_size=16)
        try:
            with self.path.open("rb") as file:
                start, size = self._extent(os.fstat(file.fileno()).st_size)
                digest.update(size.to_bytes(8, "little"))
                last = max(0, size - _SAMPLE_BYTES)
                for position in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
                    file.seek(start + position)
                    digest.update(file.read(min(_SAMPLE_BYTES, size - position)))
        except OSError as error:
            raise unreadable(self.path, error) from error
        return digest.hexdigest()

    def _extent(self, file_size: int) -> tuple[int, int]:
        """Return where in the file the array's bytes lie, and how many they are."""
        return 0, file_size

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; the next read opens it again. A data set may have more files than a process may open."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.data_type}{list(self.shape)})"


def unreadable(path: Path | str, error: Exception) -> FileError:
    """Return the error for a file that the system does not give."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return FileError(f"{str(path)!r} cannot be read: {reason}")


def _label(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value).lower() if isinstance(value, bool) else str(value)
