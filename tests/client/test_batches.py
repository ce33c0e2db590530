"""What a batch may look like, and which pairs of arrays come of it."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from lossgrad import InvalidRequest
from lossgrad.batches import BatchReader, count_of, enumerate_batches, group_name

INPUT = np.arange(6.0).reshape(3, 2)
TARGET = np.ones((3, 2))
Row = namedtuple("Row", "x input target weight mask")
WEIGHT = np.full((3, 2), 0.5)
MASK = np.array([[True, False]] * 3)


@pytest.mark.parametrize(
    ("batch", "selectors"),
    [
        ((INPUT, TARGET, {"weight": WEIGHT, "mask": MASK, "group": "a"}), {}),
        ([INPUT, TARGET, {"weight": WEIGHT, "mask": MASK, "group": "a", "other": 1}], {}),
        ({"input": INPUT, "target": TARGET, "weight": WEIGHT, "mask": MASK, "group": "a", "x": 0}, {}),
        ((TARGET, "a", MASK, INPUT, WEIGHT), {"input": 3, "target": 0, "weight": 4, "mask": 2, "group": 1}),
        (
            {"p": INPUT, "y": TARGET, "w": WEIGHT, "m": MASK},
            {"input": "p", "target": "y", "weight": "w", "mask": "m", "group": lambda _: "a"},
        ),
        (
            (INPUT / 2, TARGET, {"w": WEIGHT, "m": MASK, "g": "a"}),
            {"input": lambda batch: batch[0] * 2, "weight": "w", "mask": "m", "group": "g"},
        ),
        (
            Row(0, INPUT, TARGET, WEIGHT, MASK),
            {"input": "input", "target": "target", "weight": "weight", "mask": "mask", "group": lambda _: "a"},
        ),
    ],
)
def test_operands_are_found_where_they_are_by_default_or_where_the_caller_says(batch: Any, selectors: Any) -> None:
    (part,) = BatchReader(**selectors).parts(batch)
    for found, given in zip(part[:4], (INPUT, TARGET, WEIGHT, MASK), strict=True):
        np.testing.assert_array_equal(found, given)
    assert part.group == "a"


def test_what_is_not_pointed_at_is_left_alone() -> None:
    (part,) = BatchReader().parts((INPUT, TARGET, WEIGHT))
    assert part.weight is None
    (part,) = BatchReader().parts({"input": INPUT, "target": TARGET, "weights": WEIGHT})
    assert part.weight is None
    assert part.group == ""


@pytest.mark.parametrize(
    ("batch", "selectors", "says"),
    [
        (INPUT, {}, r"the batch is a ndarray; give \(input, target\)"),
        ((INPUT,), {}, "a tuple of 1"),
        ({"input": INPUT, "label": TARGET}, {}, r"keys \['input', 'label'\].* or say where it is: target="),
        ((INPUT, TARGET), {"weight": 2}, "weight=2 is not in the batch, which is a tuple of 2"),
        ({"input": INPUT, "target": TARGET}, {"group": "g"}, "group='g' is not in the batch"),
        ((INPUT, TARGET), {"mask": "mask"}, "mask='mask' is not in the batch"),
        (([INPUT, INPUT], [TARGET]), {}, "input is a list of 2 arrays, target a list of 1"),
        (([INPUT, INPUT], TARGET), {}, "target a ndarray; give a list of 2 too"),
        ((INPUT, TARGET, {"group": ["a", "b"]}), {}, "group has 2 names for 3 rows"),
        ((INPUT, TARGET, {"group": np.zeros((3, 2))}), {}, "more than one dimension"),
        (([INPUT] * 2, [TARGET] * 2, {"group": ["a"]}), {}, "group has 1 names for 2 arrays"),
        ((1.0, 2.0, {"group": ["a"]}), {}, "the batch has no dimensions"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_told(batch: Any, selectors: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        BatchReader(**selectors).parts(batch)


def test_a_selector_is_a_key_an_index_or_a_function() -> None:
    with pytest.raises(TypeError, match="weight is a ndarray; it says where the weight is in a batch"):
        BatchReader(weight=WEIGHT)  # type: ignore[arg-type]


def test_lists_of_tensors_are_evaluated_one_by_one_and_lists_of_numbers_are_not() -> None:
    first, second = BatchReader().parts(
        (
            [torch.ones(2), torch.ones(3)],
            [torch.zeros(2), torch.zeros(3)],
            {"group": ["a", "b"], "weight": [None, torch.ones(3)]},
        )
    )
    assert (first.entry, first.group, first.weight) == (0, "a", None)
    assert (second.entry, second.group, second.input.shape) == (1, "b", (3,))
    (part,) = BatchReader().parts(([1.0, 2.0], [np.float64(3.0), 4.0]))
    assert part.entry is None
    assert [part.group for part in BatchReader().parts(([INPUT] * 2, [TARGET] * 2, {"group": "g"}))] == ["g", "g"]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    "names", [["b", "a", "b"], np.array([7, 3, 7]), torch.tensor([7, 3, 7]), [7, torch.tensor(3), np.int64(7)]]
)
def test_each_groups_rows_are_taken_together_in_their_order(kind: str, names: Any) -> None:
    as_kind = torch.tensor if kind == "torch" else np.asarray
    options = {"group": names, "weight": as_kind(WEIGHT), "mask": as_kind(MASK)}
    first, second = BatchReader().parts((as_kind(INPUT), as_kind(TARGET), options))
    assert {first.group, second.group} in ({"a", "b"}, {"3", "7"})
    assert first.rows.tolist() == [0, 2]
    np.testing.assert_array_equal(np.asarray(first.input), INPUT[[0, 2]])
    np.testing.assert_array_equal(np.asarray(second.mask), MASK[[1]])
    assert type(first.weight) is type(as_kind(WEIGHT))


def test_operands_that_are_broadcast_over_the_rows_are_left_whole() -> None:
    row = np.ones(2)
    first, second = BatchReader().parts((INPUT, row, {"group": [0, 1, 0], "weight": np.ones((1, 2))}))
    assert first.target is row
    assert second.weight.shape == (1, 2)
    assert second.input.tolist() == [[2.0, 3.0]]


def test_rows_that_are_all_of_one_group_stay_together() -> None:
    (part,) = BatchReader().parts((INPUT, TARGET, {"group": ["a"] * 3}))
    assert part.input is INPUT
    assert part.rows is None
    (part,) = BatchReader().parts((INPUT[:0], TARGET[:0], {"group": []}))
    assert part.group == ""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a", "a"),
        (3, "3"),
        (np.int32(3), "3"),
        (torch.tensor(3), "3"),
        (np.str_("é"), "é"),
        (True, "True"),
        (0.5, "0.5"),
    ],
)
def test_a_group_is_named_as_it_prints(value: Any, name: str) -> None:
    assert group_name(value) == name


class Indexed:
    """Batches that can be indexed, and say which were."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index * 10


def test_batches_that_are_done_are_not_even_read_where_they_can_be_indexed() -> None:
    batches = Indexed()
    assert list(enumerate_batches(batches, lambda index: index in (0, 3))) == [(1, 10), (2, 20), (4, 40)]
    assert batches.read == [1, 2, 4]
    assert list(enumerate_batches(iter("abc"), lambda index: index == 1)) == [(0, "a"), (2, "c")]


def test_the_number_of_batches_is_known_or_not() -> None:
    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(())

    assert count_of(Indexed()) == 5
    assert count_of(iter([])) is None
    assert count_of(torch.utils.data.DataLoader(Endless())) is None
