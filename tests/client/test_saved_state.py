"""Accumulations and checkpoints, as values and as files: exact, merged in any order, refused where they are damaged."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad import L1, MSE, Accumulation, BatchResult, Checkpoint, Huber, InvalidRequest, SmoothL1
from lossgrad.accumulation import summary_of
from lossgrad.checkpoint import CheckpointFile, DoneBatches
from lossgrad.losses import loss_from_dict
from lossgrad.state_file import write_state
from tests.server.accumulating import totals

LOSSES = (SmoothL1(beta=math.inf, gradient=True, gradient_scale=3.0), MSE(reduction="sum"), Huber(denominator=7.0))
PLAIN = (SmoothL1(beta=math.inf), MSE(reduction="sum"), Huber(denominator=7.0))

parts = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", "é"]), st.tuples(totals(), totals(), totals())), min_size=1, max_size=8
)


def of(slices: Any) -> list[Accumulation]:
    return [
        Accumulation.of_groups(LOSSES, {group: each}, element_count=max(total.element_count for total in each))
        for group, each in slices
    ]


@given(parts, st.randoms(use_true_random=False))
def test_any_merge_tree_gives_the_same_bytes(slices: Any, shuffle: random.Random) -> None:
    states = of(slices)
    expected = Accumulation.merge(*states)
    while len(states) > 1:
        shuffle.shuffle(states)
        count = shuffle.randint(1, min(3, len(states) - 1))
        taken, states = states[: count + 1], states[count + 1 :]
        states.append(taken[0].merge(*taken[1:]))
    assert states[0] == expected
    assert json.dumps(states[0].to_content()) == json.dumps(expected.to_content())
    assert states[0].report().to_json() == expected.report().to_json()


@given(parts)
def test_what_is_saved_or_pickled_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, slices: Any) -> None:
    state = Accumulation.merge(*of(slices))
    path = tmp_path_factory.mktemp("state") / "part.lossgrad"
    state.save(path)
    for copy in (Accumulation.load(str(path)), pickle.loads(pickle.dumps(state))):  # noqa: S301
        assert copy == state
        assert hash(copy) == hash(state)
        assert copy.losses == PLAIN
        assert copy.report().to_json() == state.report().to_json()


def test_losses_that_differ_do_not_merge() -> None:
    for other in ([SmoothL1(beta=2.0)], [SmoothL1(reduction="sum")], [SmoothL1(), L1()], [SmoothL1(denominator=2)]):
        with pytest.raises(InvalidRequest, match="merge those of the same losses"):
            Accumulation([SmoothL1()]).merge(Accumulation(other))
    assert Accumulation([SmoothL1(gradient=True)]).merge(Accumulation([SmoothL1()])).losses == (SmoothL1(),)
    with pytest.raises(TypeError, match="give Accumulations"):
        Accumulation([L1()]).merge([Accumulation([L1()])])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "loss", [*PLAIN, L1(), SmoothL1(beta=0.1, denominator=0.5), Huber(delta=1e-300, reduction="sum")]
)
def test_a_loss_is_its_description(loss: Any) -> None:
    assert loss_from_dict(loss.to_dict()) == loss


def file_of(path: Path, **changes: Any) -> Path:
    """Write a file as `save` does, but for these changes, with a checksum that fits them."""
    content = {**Accumulation(PLAIN).to_content(), **changes}
    write_state(path, changes.pop("kind", "lossgrad.accumulation"), content)
    return path


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _: "", "is not a lossgrad.accumulation file"),
        (lambda text: text[:-3], "is not a lossgrad.accumulation file"),
        (lambda _: "[]", "is not a lossgrad.accumulation file"),
        (
            lambda text: text.replace('"lossgrad.accumulation"', '"lossgrad.checkpoint"'),
            "is not a lossgrad.accumulation",
        ),
        (lambda text: text.replace('"version":1', '"version":2'), "has version 2, this lossgrad reads 1"),
        (lambda text: text.replace('"denominator":7.0', '"denominator":8.0'), "is damaged: its checksum does not fit"),
        (lambda text: text.replace('"sha256"', '"sha"'), "is damaged"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, damage: Any, says: str) -> None:
    path = file_of(tmp_path / "part.lossgrad")
    path.write_text(damage(path.read_text()))
    with pytest.raises(InvalidRequest, match=f"part.lossgrad {says}"):
        Accumulation.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [{"name": "hinge"}]},
        {"losses": [MSE().to_dict()] * 3},
        {"losses": 3},
        {"losses": [{"name": "smooth_l1", "beta": -1.0, "reduction": "mean"}] * 3},
        {"state": "!"},
        {"state": base64.b64encode(b"\xff\xff\xff").decode()},
        {"state": None},
    ],
)
def test_a_file_that_holds_no_state_is_refused(tmp_path: Path, changes: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot be used"):
        Accumulation.load(file_of(tmp_path / "part.lossgrad", **changes))


def test_a_file_that_is_not_there_is_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Accumulation.load(tmp_path / "none")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path / "part.lossgrad")
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        Accumulation([L1()]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(st.sets(st.integers(0, 60)), st.randoms(use_true_random=False))
def test_done_batches_are_a_set(numbers: set[int], shuffle: random.Random) -> None:
    done = DoneBatches()
    order = sorted(numbers)
    shuffle.shuffle(order)
    for number in order:
        done.add(number)
    assert {number for number in range(62) if number in done} == numbers
    assert len(done) == len(numbers)
    ranges = done.ranges()
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))
    assert DoneBatches(ranges).ranges() == ranges


@pytest.mark.parametrize("ranges", [[(2, 2)], [(3, 1)], [(-1, 2)], [(0, 2), (2, 3)], [(5, 6), (0, 1)], [("0", 1)]])
def test_what_is_no_set_of_batches_is_refused(ranges: Any) -> None:
    with pytest.raises(ValueError, match=r"no range of batches|not in order"):
        DoneBatches(ranges)


def checkpoint(path: Path, *, losses: Any = PLAIN, key: str = "", per_batch: bool = True) -> CheckpointFile:
    return CheckpointFile(Checkpoint(path, key=key), losses, per_batch=per_batch)


@given(parts)
def test_a_checkpoint_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, slices: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "run.lossgrad"
    state = Accumulation.merge(*of(slices))
    batches = [
        BatchResult(
            index, group or None, tuple(summary_of(loss, total) for loss, total in zip(PLAIN, each, strict=True))
        )
        for index, (group, each) in enumerate(slices)
    ]
    checkpoint(path).write(state, DoneBatches([(0, len(slices)), (90, 91)]), batches)
    saved = checkpoint(path, losses=LOSSES).read()
    assert saved is not None
    assert saved.accumulation == state
    assert saved.done.ranges() == [(0, len(slices)), (90, 91)]
    assert str([batch.to_dict() for batch in saved.batches or []]) == str([batch.to_dict() for batch in batches])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"losses": (L1(),)}, r"is of an evaluation of .*SmoothL1.*this one is of \[L1\(\)\]"),
        ({"key": "coco"}, "has the key '', this evaluation 'coco': it is of other data"),
        ({"per_batch": True}, "was written without per_batch"),
    ],
)
def test_a_checkpoint_of_another_evaluation_is_refused(tmp_path: Path, options: Any, says: str) -> None:
    path = tmp_path / "run.lossgrad"
    checkpoint(path, per_batch=False).write(Accumulation(PLAIN), DoneBatches(), [])
    with pytest.raises(InvalidRequest, match=says):
        checkpoint(path, **{"per_batch": False, **options}).read()


def test_there_is_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert checkpoint(tmp_path / "run.lossgrad").read() is None
    Accumulation(PLAIN).save(tmp_path / "part.lossgrad")
    with pytest.raises(InvalidRequest, match=r"is not a lossgrad\.checkpoint file"):
        checkpoint(tmp_path / "part.lossgrad").read()
