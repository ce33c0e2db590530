"""A batch of the caller's -> the pairs of arrays in it, each with its weight, its mask and its group.

A batch is what a DataLoader or any iterable gives. It becomes one part; or one for each tensor where it holds lists of
tensors; or one for each group where its rows belong to different groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any, Final, NamedTuple

import numpy as np

from lossgrad.errors import InvalidRequest
from lossgrad.sources import as_indexable

# Where something is in a batch: a key, an index, or a function of the batch.
Selector = str | int | Callable[[Any], Any]

_NAMES: Final = ("input", "target", "weight", "mask", "group")
_REQUIRED: Final = ("input", "target")


class Part(NamedTuple):
    """A pair of arrays to evaluate. `entry` is its place in the batch's lists; `rows` are its places in its array."""

    input: Any
    target: Any
    weight: Any = None
    mask: Any = None
    group: str = ""
    entry: int | None = None
    rows: Any = None


class BatchReader:
    """Finds in batches what is to be evaluated."""

    def __init__(
        self,
        *,
        input: Selector | None = None,
        target: Selector | None = None,
        weight: Selector | None = None,
        mask: Selector | None = None,
        group: Selector | None = None,
    ) -> None:
        self._selectors = dict(zip(_NAMES, (input, target, weight, mask, group), strict=True))
        for name, selector in self._selectors.items():
            if selector is not None and not (isinstance(selector, (str, Integral)) or callable(selector)):
                raise TypeError(
                    f"{name} is a {type(selector).__name__}; it says where the {name} is in a batch: give a key, an "
                    "index, or "
                    "a function of the batch"
                )
        self._is_plain = not any(selector is not None for selector in self._selectors.values())

    def parts(self, batch: Any) -> list[Part]:
        """Return a batch's parts. Raises InvalidRequest where something is not there or does not fit together."""
        if self._is_plain and type(batch) is tuple and len(batch) == 2:
            input, target = batch
            weight = mask = group = None
        else:
            input, target, weight, mask, group = (self._find(batch, name) for name in _NAMES)
        if _is_list_of_arrays(input):
            return _parts_of_lists(input, target, weight, mask, group)
        if group is None:
            return [Part(input, target, weight, mask)]
        name = group_name(group)
        if name is not None:
            return [Part(input, target, weight, mask, name)]
        return _parts_by_row(input, target, weight, mask, group)

    def _find(self, batch: Any, name: str) -> Any:
        selector = self._selectors[name]
        if selector is None:
            return _find_by_default(batch, name)
        if callable(selector):
            return selector(batch)
        try:
            if isinstance(selector, str) and not isinstance(batch, Mapping):
                if isinstance(batch, (tuple, list)) and batch and isinstance(batch[-1], Mapping):
                    return batch[-1][selector]
                return getattr(batch, selector)
            return batch[selector]
        except (KeyError, IndexError, AttributeError, TypeError):
            raise InvalidRequest(
                f"{name}={selector!r} is not in the batch, which is {_describe(batch)}",
                reason="MISSING_FIELD",
                field=name,
            ) from None


def group_name(group: Any) -> str | None:
    """Return the name of one group; None where `group` is one for each row instead."""
    if isinstance(group, str):
        return group
    if isinstance(group, (list, tuple)) or getattr(group, "shape", None):
        return None
    if hasattr(group, "item"):  # a NumPy scalar, or an array or tensor without dimensions
        group = group.item()
    return str(group)


def _find_by_default(batch: Any, name: str) -> Any:
    if isinstance(batch, Mapping):
        found = batch.get(name)
    elif isinstance(batch, (tuple, list)):
        position = _NAMES.index(name)
        if position < 2:
            found = batch[position] if len(batch) >= 2 else None
        else:
            found = batch[2].get(name) if len(batch) > 2 and isinstance(batch[2], Mapping) else None
    else:
        found = None
    if found is None and name in _REQUIRED:
        raise InvalidRequest(
            f"the batch is {_describe(batch)}; give (input, target) or a mapping with the keys 'input' and 'target', "
            "or say "
            f"where it is: {name}=, as a key, an index or a function of the batch",
            reason="MISSING_FIELD",
            field=name,
        )
    return found


def _describe(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with the keys {list(map(str, batch))}"
    return f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {kind}"


def _is_list_of_arrays(value: Any) -> bool:
    """Whether it is a list of tensors, each to be evaluated by itself, and not just numbers in lists."""
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(bool(getattr(each, "shape", None)) for each in value)
    )


def _parts_of_lists(inputs: Any, targets: Any, weights: Any, masks: Any, group: Any) -> list[Part]:
    count = len(inputs)
    columns: list[Any] = [inputs]
    for name, values in (("target", targets), ("weight", weights), ("mask", masks)):
        if values is None and name != "target":
            columns.append([None] * count)
        elif not isinstance(values, (list, tuple)) or len(values) != count:
            size = f" of {len(values)}" if isinstance(values, (list, tuple)) else ""
            raise InvalidRequest(
                f"input is a list of {count} arrays, {name} a {type(values).__name__}{size}; give a list of {count} "
                "too",
                reason="SHAPE_MISMATCH",
                field=name,
            )
        else:
            columns.append(values)
    one = "" if group is None else group_name(group)
    names = _names_of(group, count, "arrays") if one is None else [one] * count
    return [
        Part(input, target, weight, mask, name, entry)
        for entry, (input, target, weight, mask, name) in enumerate(zip(*columns, names, strict=True))
    ]


def _parts_by_row(input: Any, target: Any, weight: Any, mask: Any, group: Any) -> list[Part]:
    operands = [None if each is None else as_indexable(each) for each in (input, target, weight, mask)]
    rank = max(len(each.shape) for each in operands if each is not None)
    if rank == 0:
        raise InvalidRequest(
            "group is one for each row, but the batch has no dimensions; give one group",
            reason="BAD_SHAPE",
            field="group",
        )
    rows = max(each.shape[0] for each in operands if each is not None and len(each.shape) == rank)
    names = _names_of(group, rows, "rows")
    distinct = list(dict.fromkeys(names))
    if len(distinct) <= 1:
        return [Part(input, target, weight, mask, distinct[0] if distinct else "")]
    places = np.asarray(names, dtype=object)
    parts = []
    for name in distinct:
        index = np.flatnonzero(places == name)
        input, target, weight, mask = (_take(each, index, rank, rows) for each in operands)
        parts.append(Part(input, target, weight, mask, name, rows=index))
    return parts


def _names_of(group: Any, count: int, what: str) -> list[str]:
    values = group.tolist() if hasattr(group, "tolist") else list(group)
    if len(values) != count:
        raise InvalidRequest(
            f"group has {len(values)} names for {count} {what}; give one for the batch, or one for each",
            reason="SHAPE_MISMATCH",
            field="group",
        )
    names = [group_name(each) for each in values]
    if None in names:
        raise InvalidRequest(
            "group has more than one dimension; give one for the batch, or one for each row",
            reason="BAD_SHAPE",
            field="group",
        )
    return [name for name in names if name is not None]


def _take(array: Any, index: Any, rank: int, rows: int) -> Any:
    """Return the rows of an array that has them; one that is broadcast over them is left as it is."""
    if array is None or len(array.shape) < rank or array.shape[0] != rows:
        return array
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return array[torch.as_tensor(index, device=array.device)]
    return array[index]


def enumerate_batches(batches: Any, is_done: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
    """Give each batch that is not done with its number. Those of a sequence that are done are not even read."""
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, Mapping):
        for index in range(len(batches)):
            if not is_done(index):
                yield index, batches[index]
        return
    for index, batch in enumerate(batches):
        if not is_done(index):
            yield index, batch


def count_of(batches: Any) -> int | None:
    """Return how many batches there are; None where they have no length."""
    try:
        return len(batches)
    except TypeError:  # no length, or, as a DataLoader over an iterable data set, none that it knows
        return None
