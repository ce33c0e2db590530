"""The gradients that `lossgrad evaluate --gradient-out` writes: .npy files, filled slice by slice, never in memory.

While it is not complete, a file has the suffix `.partial`. It gets its whole size at once, so that a full disk is known
before anything is computed.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lossgrad.cli.losses import label_of
from lossgrad.cli.outcome import UsageError, cause
from lossgrad.cli.report_output import check_folder
from lossgrad.files import Dataset
from lossgrad.losses import Loss

_PLACE: Final = "{loss}"


class GradientFiles:
    """A file for each loss. Several processes may write to them, each its own slices."""

    def __init__(self, pattern: str, losses: Sequence[Loss], data: Dataset) -> None:
        """Check what is asked for. `pattern` has the place of the loss's name where there are several."""
        if len(losses) > 1 and _PLACE not in pattern:
            raise UsageError(
                f"--gradient-out {pattern!r} names one file for {len(losses)} losses; write {_PLACE} where the name of the "
                f"loss is to stand, such as 'gradient-{_PLACE}.npy'"
            )
        self._data = data
        self._paths = [Path(pattern.replace(_PLACE, _file_name(loss))) for loss in losses]
        if len(set(self._paths)) < len(self._paths):
            raise UsageError(f"--gradient-out {pattern!r} names the same file for two losses; give each loss once")
        for path in self._paths:
            check_folder("--gradient-out", path)
            if path.is_dir():
                raise UsageError(f"--gradient-out {str(path)!r} cannot be written: it is a folder")
        self._shape, self._dtype = _shape_and_type(data)
        header = io.BytesIO()
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(header, description)
        self._header = header.getvalue()
        self._size = len(self._header) + math.prod(self._shape) * self._dtype.itemsize
        self._files: list[int] = []

    @property
    def names(self) -> list[str]:
        """The files' names, in the order of the losses."""
        return list(map(str, self._paths))

    def create(self) -> None:
        """Begin anew."""
        for path in map(_partial, self._paths):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                self._files.append(fd)
                os.pwrite(fd, self._header, 0)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, self._size)
                else:
                    os.ftruncate(fd, self._size)
            except OSError as error:
                self.discard()
                raise _unwritable(path, error) from error

    def reopen(self) -> None:
        """Go on with the files of a run that was interrupted."""
        for path in map(_partial, self._paths):
            try:
                fd = os.open(path, os.O_RDWR)
                self._files.append(fd)
                if os.fstat(fd).st_size != self._size or os.pread(fd, len(self._header), 0) != self._header:
                    raise UsageError(
                        f"--gradient-out: {str(path)!r} is not what the run of the checkpoint wrote; remove the checkpoint "
                        "to begin anew"
                    )
            except OSError as error:
                raise UsageError(
                    f"--gradient-out: {str(path)!r}, which the run of the checkpoint began, cannot be had: {cause(error)}; "
                    "remove the checkpoint to begin anew"
                ) from error

    def are_finished(self) -> bool:
        """Whether the files are all there, complete, of an earlier run."""
        return all(path.is_file() and path.stat().st_size == self._size for path in self._paths)

    def put(self, index: int, gradients: Sequence[Any]) -> None:
        """Write one slice's gradients, one for each loss; lists of them where the slice has groups."""
        piece = self._data.piece(index)
        order = self._data.take_order(index)
        offset = len(self._header) + (piece.offset + piece.start) * self._dtype.itemsize
        for fd, path, gradient in zip(self._files, self._paths, gradients, strict=True):
            values = gradient
            if isinstance(gradient, list):
                values = np.empty(piece.stop - piece.start, self._dtype)
                values[order] = np.concatenate(gradient)
            try:
                _write(fd, np.ascontiguousarray(values, self._dtype).data.cast("B"), offset)
            except OSError as error:
                raise _unwritable(path, error) from error

    def flush(self) -> None:
        """Make sure that what was written outlives a crash of the machine."""
        for fd in self._files:
            os.fsync(fd)

    def finish(self) -> None:
        """Give the files their names. Does nothing where they have them already."""
        self.flush()
        for path in self._paths if self._files else []:
            try:
                _partial(path).replace(path)
            except OSError as error:
                raise _unwritable(path, error) from error

    def close(self) -> None:
        """Close them as they are."""
        while self._files:
            os.close(self._files.pop())

    def discard(self) -> None:
        """Remove what is not complete and will not be."""
        self.close()
        for path in map(_partial, self._paths):
            path.unlink(missing_ok=True)


def _shape_and_type(data: Dataset) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return what the gradient of the whole data set looks like: files one behind the other, along the first dimension."""
    first = data.shards[0].predictions
    for shard in data.shards:
        own = shard.predictions
        if not own.data_type.startswith(("float", "bfloat")):
            raise UsageError(
                f"--gradient-out: {own.name} is {own.data_type}; a gradient needs floating-point predictions"
            )
        if (own.data_type, own.shape[1:]) != (first.data_type, first.shape[1:]) or (
            len(data.shards) > 1 and not own.shape
        ):
            raise UsageError(
                f"--gradient-out puts the files one behind the other, but {first.name} is "
                f"{first.data_type}{list(first.shape)} and {own.name} {own.data_type}{list(own.shape)}; evaluate them apart"
            )
    # NumPy's files have no bfloat16; float32 holds each of them exactly.
    dtype = np.dtype("<f4" if first.data_type == "bfloat16" else first.data_type).newbyteorder("<")
    if len(data.shards) == 1:
        return first.shape, dtype
    return (sum(shard.predictions.shape[0] for shard in data.shards), *first.shape[1:]), dtype


def _file_name(loss: Loss) -> str:
    return label_of(loss).replace("(", "-").replace(")", "")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--gradient-out {str(path)!r} cannot be written: {cause(error)}")
