"""Which files belong together: predictions with targets, weights, masks and group labels, and that their shapes agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lossgrad.files.array_file import ArrayFile, FileError
from lossgrad.files.opening import open_arrays
from lossgrad.files.raw_array import require_numbers

_FLOATS: Final = ("float", "bfloat")


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """Where everything is, each as `PATH[:NAME]`; a bare NAME is an array in the files of the predictions.

    `weight`, `mask` and `group` have the predictions' shape, or its first dimensions: then one holds for all elements of a
    row. `group_by_file` makes each file of the predictions a group.
    """

    predictions: str
    targets: str
    weight: str | None = None
    mask: str | None = None
    group: str | None = None
    group_by_file: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A pair of files, and what goes with them."""

    predictions: ArrayFile
    targets: ArrayFile
    weight: ArrayFile | None
    mask: ArrayFile | None
    group: ArrayFile | None

    @property
    def roles(self) -> tuple[ArrayFile | None, ...]:
        """All files of it, None where there is none."""
        return self.predictions, self.targets, self.weight, self.mask, self.group

    def close(self) -> None:
        """Let go of the files."""
        for array in self.roles:
            if array is not None:
                array.close()


def open_shards(files: DatasetFiles) -> list[Shard]:
    """Open all files and put together what belongs together. Raises FileError."""
    predictions = open_arrays(files.predictions)
    targets = _beside(predictions, files.targets, "targets")
    others: list[Sequence[ArrayFile | None]] = [
        [None] * len(predictions) if reference is None else _beside(predictions, reference, role)
        for reference, role in ((files.weight, "--weight"), (files.mask, "--mask"), (files.group, "--group-by"))
    ]
    shards = [Shard(*arrays) for arrays in zip(predictions, targets, *others, strict=True)]
    for shard in shards:
        _check(shard)
    return shards


def group_of(predictions: ArrayFile) -> str:
    """Return the group that a file of predictions is, with group_by_file: its name without the suffix."""
    return predictions.path.stem


def _beside(predictions: Sequence[ArrayFile], reference: str, role: str) -> list[ArrayFile]:
    """Open what goes with the predictions, file by file."""
    arrays = open_arrays(reference, beside=predictions)
    if len(arrays) != len(predictions):
        raise FileError(
            f"the predictions are {_counted(predictions)}, {role} {reference!r} {_counted(arrays)}; give as many of "
            f"both{_first_odd(predictions, arrays)}"
        )
    own = {array.path.stem: position for position, array in enumerate(predictions)}
    for position, array in enumerate(arrays):
        # Files go together in the order of their names. Where both sides use the same names, those must agree.
        if own.get(array.path.stem, position) != position:
            raise FileError(
                f"{array.name} would be put beside {predictions[position].name}, though the predictions have a file of "
                "its name; give folders whose files have the same names"
            )
    return arrays


def _check(shard: Shard) -> None:
    """Raise FileError unless shapes and types agree."""
    own, targets = shard.predictions, shard.targets
    require_numbers(own)
    require_numbers(targets)
    if own.shape != targets.shape:
        advice = "give arrays of equal shapes"
        if own.element_count == targets.element_count:
            advice = f"both have {own.element_count} elements: save one with the shape of the other (numpy.reshape)"
        raise FileError(
            f"the target {targets.name} has shape {list(targets.shape)}, the prediction {own.name} {list(own.shape)}; "
            f"{advice}"
        )
    if not own.data_type.startswith(_FLOATS) and not targets.data_type.startswith(_FLOATS):
        raise FileError(
            f"the prediction {own.name} is {own.data_type} and the target {targets.name} {targets.data_type}; save at "
            "least one as floating point"
        )
    for role, array in (("weight", shard.weight), ("mask", shard.mask), ("group-by", shard.group)):
        if array is None:
            continue
        if not _covers(array.shape, own.shape):
            raise FileError(
                f"--{role} {array.name} has shape {list(array.shape)}, the prediction {own.name} {list(own.shape)}; give "
                "the same shape, or its first dimensions for one a row"
            )
    if shard.weight is not None:
        require_numbers(shard.weight)
    if shard.mask is not None and shard.mask.data_type != "bool":
        raise FileError(
            f"--mask {shard.mask.name} is {shard.mask.data_type}; save it as bool, true where an element counts: mask != 0"
        )


def _covers(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape is the whole, or its first dimensions, perhaps with ones in the place of the others."""
    while shape and len(shape) > 1 and shape[-1] == 1 and shape != whole[: len(shape)]:
        shape = shape[:-1]
    return shape == whole[: len(shape)] and (bool(shape) or not whole or math.prod(whole) == 1)


def _counted(arrays: Sequence[ArrayFile]) -> str:
    return f"{len(arrays)} file{'s' if len(arrays) != 1 else ''}"


def _first_odd(first: Sequence[ArrayFile], second: Sequence[ArrayFile]) -> str:
    """Name the first file without a partner of its name, where both sides use the same names."""
    names = {array.path.stem for array in first} & {array.path.stem for array in second}
    odd = [array.name for array in (*first, *second) if array.path.stem not in names]
    return f"; {odd[0]} has no partner" if names and odd else ""
