"""Predictions and targets side by side, from files, cut into slices that depend on the files alone.

A slice is a batch for `LossClient.evaluate`: SLICE_ELEMENTS consecutive elements of one pair of files, in C order, or what
is left at a file's end. SLICE_ELEMENTS is a multiple of the 4096 elements that the engine sums at a time, so one pair of
files gives the bits of one message. With groups, each group's elements of a slice are evaluated apart.
"""

from __future__ import annotations

import enum
import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np

from lossgrad.files.array_file import ArrayFile, Elements, FileError
from lossgrad.files.shards import DatasetFiles, Shard, group_of, open_shards

SLICE_ELEMENTS: Final = 1 << 20

_Array = np.ndarray[Any, Any]


class NanPolicy(enum.StrEnum):
    """What becomes of elements whose prediction, target or weight is NaN; the names are scipy's.

    An element without a value (null) is left out with OMIT, and an error otherwise.
    """

    PROPAGATE = "propagate"  # the result is NaN, and says of how many elements
    OMIT = "omit"  # they are left out, as a mask would
    RAISE = "raise"  # an error that names the first one


class NanFound(ValueError):
    """A NaN in the data, with NanPolicy.RAISE."""


class Piece(NamedTuple):
    """Where a slice lies: in which pair of files, and its elements there; `offset` counts the elements of files before."""

    shard: int
    start: int
    stop: int
    offset: int


class Dataset(Sequence[dict[str, Any]]):
    """The slices of a data set; each is read when it is asked for, fastest in order. Raises FileError, NanFound.

    `keep_orders` is for who puts back into its place what comes of groups' elements: see `take_order`.
    """

    def __init__(
        self,
        files: DatasetFiles,
        *,
        nan_policy: NanPolicy = NanPolicy.PROPAGATE,
        slice_elements: int = SLICE_ELEMENTS,
        keep_orders: bool = False,
    ) -> None:
        self.files = files
        self.nan_policy = nan_policy
        self.slice_elements = slice_elements
        self.shards = open_shards(files)
        counts = [shard.predictions.element_count for shard in self.shards]
        self.element_count = sum(counts)
        if not self.element_count:
            raise FileError(f"{self.shards[0].predictions.name} holds no elements; there is nothing to evaluate")
        self._first_slices = _running([-(-count // slice_elements) for count in counts])
        self._offsets = _running(counts)
        self._open_shard = 0
        # With keep_orders, of the slices that were read and not asked for.
        self._orders: dict[int, _Array] | None = {} if keep_orders else None

    def __len__(self) -> int:
        return self._first_slices[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return a slice as `LossClient.evaluate` takes it: a mapping with input, target, and what else there is."""
        shard, piece = self._go_to(index)
        arrays = self._arrays(shard, piece.start, piece.stop)
        if shard.group is not None:
            width = shard.predictions.element_count // shard.group.element_count
            order, names, counts = self._groups(shard.group, width, piece)
            if self._orders is not None:
                self._orders[index] = order
            ends = np.cumsum(counts)[:-1]
            lists: dict[str, Any] = {role: np.split(values[order], ends) for role, values in arrays.items()}
            return {**lists, "group": names}
        return {**arrays, "group": group_of(shard.predictions)} if self.files.group_by_file else arrays

    def piece(self, index: int) -> Piece:
        """Return where a slice lies."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._first_slices, index) - 1
        start = (index - self._first_slices[shard]) * self.slice_elements
        count = self.shards[shard].predictions.element_count
        return Piece(shard, start, min(count, start + self.slice_elements), self._offsets[shard])

    def take_order(self, index: int) -> _Array | None:
        """Return, once, the places in a slice of the elements of its groups, one group after the other; None without groups.

        For data sets made with `keep_orders`, after the slice was read.
        """
        return self._orders.pop(index, None) if self._orders is not None else None

    @staticmethod
    def _groups(group: ArrayFile, width: int, piece: Piece) -> tuple[_Array, list[str], list[int]]:
        """Return a slice's elements in the order of their groups, the groups' names, and how many elements each has."""
        first = piece.start // width
        indexes, names = group.labels(first, -(-piece.stop // width))
        indexes = _spread(indexes, width, piece.start - first * width, piece.stop - piece.start)
        # Sixteen bits are sorted by radix, in a tenth of the time.
        indexes = indexes.astype(np.uint16 if len(names) <= 1 << 16 else np.int64, copy=False)
        counts = np.bincount(indexes, minlength=len(names))
        present = np.flatnonzero(counts)
        return np.argsort(indexes, kind="stable"), [names[each] for each in present], counts[present].tolist()

    def weight_sum(self) -> float:
        """Return the sum of the weights of the elements that take part: what a mean divides by. Reads weights and mask."""
        return math.fsum(self._weight_sum_of(index) for index in range(len(self)))

    def fingerprint(self) -> str:
        """Return a digest of the data and of how it is cut: a checkpoint of another one is not gone on from."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.nan_policy.value, self.slice_elements, self.files.group_by_file)).encode())
        for shard in self.shards:
            digest.update(repr([array and array.fingerprint() for array in shard.roles]).encode())
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; the next slice opens them again."""
        self.shards[self._open_shard].close()

    def _go_to(self, index: int) -> tuple[Shard, Piece]:
        piece = self.piece(index)
        if piece.shard != self._open_shard:
            self.close()
            self._open_shard = piece.shard
        return self.shards[piece.shard], piece

    def _arrays(self, shard: Shard, start: int, stop: int) -> dict[str, _Array]:
        """Return what a slice has of each file, the elements that are not to count masked."""
        arrays: dict[str, _Array] = {}
        left_out: _Array | None = None
        kept = None if shard.mask is None else _values(shard.mask, shard.predictions, start, stop)
        for role, file in (("input", shard.predictions), ("target", shard.targets), ("weight", shard.weight)):
            if file is None:
                continue
            values, missing = _read(file, shard.predictions, start, stop)
            if missing is not None and self.nan_policy is not NanPolicy.OMIT:
                _refuse_null(file, shard.predictions, start, missing if kept is None else missing & kept)
                missing = None
            flags = self._nan_flags(values, missing)
            if flags is not None:
                if self.nan_policy is NanPolicy.RAISE and (wrong := flags if kept is None else flags & kept).any():
                    raise _nan_found(file, shard.predictions, start + int(wrong.argmax()))
                left_out = flags if left_out is None else left_out | flags
            arrays[role] = values
        if left_out is not None and self.nan_policy is NanPolicy.OMIT:
            kept = ~left_out if kept is None else kept & ~left_out
        if kept is not None:
            arrays["mask"] = kept
        return arrays

    def _nan_flags(self, values: _Array, missing: _Array | None) -> _Array | None:
        """Return where there is NaN or no value; None where that is nowhere, or of no interest."""
        if self.nan_policy is NanPolicy.PROPAGATE or values.dtype.kind in "iub":
            return missing
        flags = np.isnan(values)
        if missing is not None:
            flags |= missing
        return flags if flags.any() else None

    def _weight_sum_of(self, index: int) -> float:
        shard, piece = self._go_to(index)
        count = piece.stop - piece.start
        if shard.weight is None and shard.mask is None and self.nan_policy is not NanPolicy.OMIT:
            return float(count)
        arrays = self._arrays(shard, piece.start, piece.stop)
        weight, mask = arrays.get("weight"), arrays.get("mask")
        if weight is None:
            return float(count if mask is None else np.count_nonzero(mask))
        wide = weight.astype(np.float64)
        return math.fsum(wide if mask is None else wide[mask])


def _read(file: ArrayFile, predictions: ArrayFile, start: int, stop: int) -> Elements:
    """Return a range of elements; those of a file with one value a row, spread over the rows."""
    width = predictions.element_count // file.element_count
    if width == 1:
        return file.read(start, stop)
    first = start // width
    values, missing = file.read(first, -(-stop // width))
    skipped, count = start - first * width, stop - start
    return Elements(
        _spread(values, width, skipped, count), None if missing is None else _spread(missing, width, skipped, count)
    )


def _spread(values: _Array, width: int, skipped: int, count: int) -> _Array:
    return values if width == 1 else np.repeat(values, width)[skipped : skipped + count]


def _values(file: ArrayFile, predictions: ArrayFile, start: int, stop: int) -> _Array:
    values, missing = _read(file, predictions, start, stop)
    if missing is not None:
        _refuse_null(file, predictions, start, missing)
    return values


def _refuse_null(file: ArrayFile, predictions: ArrayFile, start: int, missing: _Array) -> None:
    if missing.any():
        position = start + int(missing.argmax())
        raise file.null_error(position * file.element_count // predictions.element_count)


def _nan_found(file: ArrayFile, predictions: ArrayFile, position: int) -> NanFound:
    index = file.index_of(position * file.element_count // predictions.element_count)
    return NanFound(
        f"{file.name} is NaN at {index}; --nan-policy omit leaves such elements out, propagate lets them into the result"
    )


def _running(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts, dtype=np.int64).tolist()]
