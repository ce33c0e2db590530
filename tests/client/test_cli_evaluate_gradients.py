"""`lossgrad evaluate --gradient-out`: each element's derivative in its place, whatever the data are cut and grouped into."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lossgrad.cli import evaluate as evaluate_module
from tests.client.evaluating import LOSSES, Evaluate, gradient, make_pair, save_shards


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "SLICE_ELEMENTS", 1 << 16)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_gradient_of_the_mean_over_all_is_written(dtype: str, workers: int, evaluate: Evaluate) -> None:
    predictions, targets = make_pair((50_000, 3), dtype)
    np.save("p.npy", predictions)
    np.save("t.npy", targets)
    losses = " ".join(f"--loss {loss}" for loss in LOSSES)
    with_gradient = evaluate.losses(f"p.npy t.npy {losses} --gradient-out g-{{loss}}.npy --workers {workers}")
    assert with_gradient == evaluate.losses(f"p.npy t.npy {losses}")
    names = ["smooth_l1-beta=0.5", "huber-delta=2", "l1", "mse"]
    for loss, name in zip(LOSSES, names, strict=True):
        written = np.load(f"g-{name}.npy", allow_pickle=False)
        assert (written.dtype, written.shape) == (np.dtype(dtype), (50_000, 3))
        expected = (gradient(loss, predictions, targets) / 150_000).astype(dtype)
        np.testing.assert_allclose(written, expected, rtol=1e-2 if dtype == "float16" else 1e-5, atol=1e-7)
    assert not list(Path().glob("*.partial"))


def test_the_gradient_of_the_sum_is_written(evaluate: Evaluate) -> None:
    predictions, targets = make_pair(100_000, np.float64)
    np.save("p.npy", predictions)
    np.save("t.npy", targets)
    evaluate.losses("p.npy t.npy --loss mse --gradient-out g --gradient-of sum")
    np.testing.assert_allclose(np.load("g"), 2 * (predictions - targets), rtol=1e-15)


@pytest.mark.parametrize("workers", [1, 2])
def test_groups_shards_weights_and_masks_leave_each_element_in_its_place(
    folder: Path, workers: int, evaluate: Evaluate
) -> None:
    predictions, targets = make_pair((60_000, 2), np.float64)
    rng = np.random.default_rng(2)
    arrays = {"p": predictions, "t": targets, "g": rng.integers(0, 5, 60_000), "w": rng.random(60_000)}
    save_shards(folder, {**arrays, "m": rng.random((60_000, 2)) < 0.5}, 3)
    mask = np.concatenate([np.load(path) for path in sorted(Path("m").iterdir())])
    report = evaluate.json(
        f"p t --group-by g --weight w --mask m --loss huber:delta=2 --gradient-out g.npy --workers {workers}"
    )
    weights = np.where(mask, arrays["w"][:, None], 0.0)
    written = np.load("g.npy")
    assert written.shape == (60_000, 2)
    expected = gradient("huber:delta=2", predictions, targets) * weights / weights.sum()
    np.testing.assert_allclose(written, expected, rtol=1e-12, atol=1e-300)
    plain = evaluate.json("p t --group-by g --weight w --mask m --loss huber:delta=2")
    assert (report["losses"], report["groups"]) == (plain["losses"], plain["groups"])


def test_what_is_left_out_as_nan_has_no_gradient(evaluate: Evaluate) -> None:
    predictions, targets = make_pair(70_000)
    predictions[5] = np.nan
    np.save("p.npy", predictions)
    np.save("t.npy", targets)
    evaluate.losses("p.npy t.npy --loss l1 --gradient-out g.npy --nan-policy omit")
    written = np.load("g.npy")
    assert written[5] == 0
    np.testing.assert_allclose(written[6:], np.sign(predictions - targets)[6:] / 69_999, rtol=1e-6)


def test_the_gradient_of_bfloat16_is_written_as_float32(evaluate: Evaluate) -> None:
    predictions, targets = make_pair(1000, ml_dtypes.bfloat16)
    save_file({"p": predictions, "t": targets}, "d.safetensors")
    evaluate.losses("d.safetensors:p t --loss mse --gradient-out g.npy")
    written = np.load("g.npy")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, gradient("mse", predictions, targets) / 1000, rtol=1e-2)


def make_wrong_files() -> None:
    np.savez("d.npz", p=np.ones((4, 2)), t=np.ones((4, 2)), none=np.zeros((4, 2), bool), ints=np.ones((4, 2), int))
    for side, shapes in (("a", [(2, 3), (2, 3)]), ("b", [(2, 3), (2, 4)])):
        Path(side).mkdir()
        for index, shape in enumerate(shapes):
            np.save(f"{side}/{index}.npy", np.ones(shape, np.float32 if (side, index) != ("a", 1) else np.float64))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "d.npz:p t --loss l1 --loss mse --gradient-out g",
            "--gradient-out 'g' names one file for 2 losses; write {loss}",
        ),
        ("d.npz:p t --gradient-out no/g.npy", "--gradient-out 'no/g.npy' cannot be written: 'no' is no folder"),
        ("d.npz:p t --gradient-out .", "--gradient-out '.' cannot be written: it is a folder"),
        (
            "d.npz:p t --gradient-out g --keep-going",
            "--keep-going leaves slices out, and --gradient-out needs them all",
        ),
        ("d.npz:ints t --gradient-out g", "--gradient-out: d.npz:ints is int64; a gradient needs floating-point"),
        (
            "d.npz:p t --mask none --gradient-out g",
            "--gradient-out: the weights of all elements that take part add up to 0",
        ),
        ("a a --gradient-out g", "a/0.npy is float32[2, 3] and a/1.npy float64[2, 3]; evaluate them apart"),
        ("b b --gradient-out g", "b/0.npy is float32[2, 3] and b/1.npy float32[2, 4]; evaluate them apart"),
        ("d.npz:p t --gradient-out g --gradient-of max", "argument --gradient-of: invalid choice: 'max'"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_exits_2(arguments: str, says: str, evaluate: Evaluate) -> None:
    make_wrong_files()
    assert evaluate.run(arguments) == 2
    assert (evaluate.out, evaluate.err.count("\n")) == ("", 1)
    assert says in evaluate.err
    assert not list(Path().glob("g*"))


def test_a_full_disk_is_known_before_anything_is_computed(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    make_wrong_files()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert evaluate.run("d.npz:p t --gradient-out g.npy") == 2
    assert evaluate.err == "lossgrad: --gradient-out 'g.npy.partial' cannot be written: No space left on device\n"
    assert not list(Path().glob("g.npy*"))
