"""`lossgrad evaluate`: the numbers, whatever the files are and however they are cut; groups, weights, masks, NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

import lossgrad
from lossgrad.cli import evaluate as evaluate_module
from lossgrad.cli import main
from tests.client.array_files import WRITERS
from tests.client.evaluating import LOSSES, Evaluate, close, elementwise, make_pair, save_shards

ALL = " ".join(f"--loss {loss}" for loss in LOSSES)

TABLE = """\
loss                 group  mean  sum  elements   min   max  non-finite
l1                   all     inf  inf         6     1   inf           1
                     cat     inf  inf         4     1   inf           1
                     dog     3.5  7.0         2     3     4           0
smooth_l1(beta=0.5)  all     inf  inf         6  0.75   inf           1
                     cat     inf  inf         4  0.75   inf           1
                     dog    3.25  6.5         2  2.75  3.75           0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "SLICE_ELEMENTS", 1 << 16)  # so that small files have several slices
    return tmp_path


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("folder")
def test_sums_are_those_of_float64(dtype: str, evaluate: Evaluate) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    predictions, targets = make_pair(dtype=kind)
    save_file({"p": predictions, "t": targets}, "data.safetensors")
    report = evaluate.json(f"data.safetensors:p t {ALL}")
    assert report["element_count"] == 300_000
    assert [loss["name"] for loss in report["losses"]] == ["smooth_l1", "huber", "l1", "mse"]
    for name, loss in zip(LOSSES, report["losses"], strict=True):
        each = elementwise(name, predictions, targets)
        assert close(loss["sum"], math.fsum(each), kind), name
        assert math.isclose(loss["mean"], loss["sum"] / 300_000, rel_tol=3e-16)
        assert loss["min"] == pytest.approx(each.min(), rel=1e-6)
        assert loss["max"] == pytest.approx(each.max(), rel=1e-6)
        assert (loss["element_count"], loss["weight_sum"], loss["nonfinite_count"]) == (300_000, 300_000, 0)
    (server,) = report["servers"]
    assert server["target"] == evaluate.target


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.usefixtures("folder")
def test_every_kind_of_file_gives_the_bits_of_one_message(kind: str, evaluate: Evaluate) -> None:
    predictions, targets = make_pair((50_000, 4))
    suffix, write = WRITERS[kind]
    write(Path(f"data{suffix}"), {"p": predictions, "t": targets})
    with lossgrad.LossClient(evaluate.target) as client:
        expected = client.mse(predictions, targets, reduction="sum").value
    (loss,) = evaluate.losses(f"data{suffix}:p t --loss mse")
    assert loss["sum"] == expected


@pytest.mark.usefixtures("folder")
def test_the_table_has_a_line_for_each_loss_and_group(evaluate: Evaluate) -> None:
    np.save("p.npy", np.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.inf]], np.float32))
    np.save("t.npy", np.zeros((3, 2), np.float32))
    np.save("g.npy", np.array(["cat", "dog", "cat"]))
    assert evaluate.run("p.npy t.npy --loss l1 --loss smooth_l1:beta=0.5 --group-by g.npy") == 0
    assert evaluate.out == TABLE
    assert "warning: 1 losses are NaN or infinite" in evaluate.err


@pytest.mark.usefixtures("folder")
def test_groups_weights_and_masks_count_as_numpy_counts_them(evaluate: Evaluate) -> None:
    predictions, targets = make_pair((40_000, 5), np.float64)
    rng = np.random.default_rng(1)
    scene, weight = rng.integers(0, 9, 40_000), rng.random(40_000)
    mask = rng.random((40_000, 5)) < 0.7
    np.savez("data.npz", p=predictions, t=targets, scene=scene, w=weight, m=mask)
    report = evaluate.json(f"data.npz:p t --group-by scene --weight w --mask m {ALL}")
    assert sorted(report["groups"]) == [str(number) for number in range(9)]
    weights = np.where(mask, weight[:, None], 0.0)
    for position, name in enumerate(LOSSES):
        each = elementwise(name, predictions, targets) * weights
        total = report["losses"][position]
        assert close(total["sum"], math.fsum(each.ravel()), np.float64)
        assert math.isclose(total["mean"], math.fsum(each.ravel()) / math.fsum(weights.ravel()), rel_tol=1e-15)
        for number in range(9):
            group = report["groups"][str(number)][position]
            assert math.isclose(group["sum"], math.fsum(each[scene == number].ravel()), rel_tol=1e-14)
            assert group["element_count"] == np.count_nonzero(mask[scene == number])


@pytest.mark.usefixtures("folder")
def test_text_groups_come_from_columns(evaluate: Evaluate) -> None:
    predictions, targets = make_pair(150_000)
    names = np.array(["kitchen", "garage", "bath"])[np.random.default_rng(0).integers(0, 3, 150_000)]
    table = pa.table({"p": predictions, "t": targets, "room": pa.array(names.tolist()).dictionary_encode()})
    pyarrow.parquet.write_table(table, "data.parquet", row_group_size=40_000)
    report = evaluate.json("data.parquet:p t --group-by room --loss l1")
    for room in ("kitchen", "garage", "bath"):
        expected = math.fsum(elementwise("l1", predictions, targets)[names == room])
        assert close(report["groups"][room][0]["sum"], expected, np.float32)


def test_shards_give_the_same_bits_in_any_order_and_with_any_number_of_workers(
    folder: Path, evaluate: Evaluate
) -> None:
    predictions, targets = make_pair(700_000)
    save_shards(folder, {"p": predictions, "t": targets}, 7)
    expected = evaluate.losses(f"p t {ALL}")
    for workers in (2, 4):
        assert evaluate.losses(f"p t {ALL} --workers {workers}") == expected
    for position, place in enumerate([3, 0, 6, 2, 5, 1, 4]):
        for side in "pt":
            Path(side, f"{position:03}.npy").rename(Path(side, f"x{place}.npy"))
    assert evaluate.losses(f"p t {ALL}") == expected
    assert evaluate.losses(f"p/*.npy t/x*.npy {ALL} --workers 2") == expected
    for name, loss in zip(LOSSES, expected, strict=True):
        assert close(loss["sum"], math.fsum(elementwise(name, predictions, targets)), np.float32)


@pytest.mark.usefixtures("folder")
def test_each_file_may_be_a_group_and_workers_change_nothing(folder: Path, evaluate: Evaluate) -> None:
    predictions, targets = make_pair(300_000)
    save_shards(folder, {"p": predictions, "t": targets}, 3)
    report = evaluate.json("p t --group-by-file")
    assert list(report["groups"]) == ["000", "001", "002"]
    again = evaluate.json("p t --group-by-file --workers 3")
    assert (again["losses"], again["groups"]) == (report["losses"], report["groups"])


def save_nan() -> None:
    predictions, targets = make_pair(200_000, np.float64)
    predictions[[7, 70_000]] = np.nan
    targets[199_999] = np.nan
    np.save("p.npy", predictions)
    np.save("t.npy", targets)


@pytest.mark.usefixtures("folder")
def test_nan_goes_through_is_left_out_or_is_an_error(evaluate: Evaluate) -> None:
    save_nan()
    assert evaluate.run("p.npy t.npy --loss mse") == 0
    assert "nan" in evaluate.out
    assert evaluate.err.endswith(
        "lossgrad: warning: 3 losses are NaN or infinite, and so may be the results; --nan-policy omit leaves out what is "
        "NaN\n"
    )
    (loss,) = evaluate.losses("p.npy t.npy --loss mse --nan-policy omit")
    each = elementwise("mse", np.load("p.npy"), np.load("t.npy"))
    assert close(loss["sum"], math.fsum(each[~np.isnan(each)]), np.float64)
    assert (loss["element_count"], loss["nonfinite_count"]) == (199_997, 0)
    for workers in ("", " --workers 2"):
        assert evaluate.run(f"p.npy t.npy --quiet --nan-policy raise{workers}") == 1
        assert evaluate.err.startswith("lossgrad: p.npy is NaN at [7")
        assert evaluate.err.count("\n") == 1


@pytest.mark.usefixtures("folder")
def test_json_has_no_bare_nan(evaluate: Evaluate) -> None:
    save_nan()
    report = evaluate.json("p.npy t.npy --loss mse")
    assert (report["losses"][0]["mean"], report["nan_policy"]) == ("NaN", "propagate")


@pytest.mark.usefixtures("folder")
def test_a_plot_is_drawn(evaluate: Evaluate) -> None:
    predictions, targets = make_pair(200_000)
    np.savez("d.npz", p=predictions, t=targets, g=np.arange(200_000) % 3)
    report = evaluate.json("d.npz:p t --group-by g --plot plot.png")
    assert len(report["batches"]) == 4
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("folder")
def test_states_of_parts_merge_into_the_bits_of_the_whole(
    folder: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    save_shards(folder, dict(zip("pt", make_pair(300_000), strict=True)), 3)
    expected = evaluate.losses(f"p t {ALL}")
    for index in range(3):
        evaluate.losses(f"p/00{index}.npy t/00{index}.npy {ALL} --state-out s{index}")
    assert main(["merge", "s2", "s0", "--state-out", "s"]) == 0
    assert "mse " in capsys.readouterr().out
    assert main(["merge", "s1", "s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["losses"] == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("s no", "'no' cannot be read: No such file or directory"),
        ("s s", "a file is given twice: s, s; its elements would count twice"),
        ("s other", "merge those of the same losses in the same order"),
        ("s p.npy", "p.npy is not a lossgrad.accumulation file"),
        ("s --plot x.txt", "--plot 'x.txt' is no picture; give a name that ends with .png"),
        ("s --state-out no/s", "--state-out 'no/s' cannot be written: 'no' is no folder"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_merged_is_one_line_and_exits_2(
    arguments: str, says: str, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("p.npy", np.ones(3))
    evaluate.losses("p.npy p.npy --state-out s")
    evaluate.losses("p.npy p.npy --loss l1 --state-out other")
    assert main(["merge", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert says in captured.err


@pytest.mark.usefixtures("folder")
def test_several_servers_share_the_work(evaluate: Evaluate, start_server: Any) -> None:
    np.save("p.npy", make_pair(500_000)[0])
    np.save("t.npy", make_pair(500_000)[1])
    expected = evaluate.losses(f"p.npy t.npy {ALL}")
    other = start_server(engine="plain")
    report = evaluate.json(f"p.npy t.npy {ALL} --target {other.address}")
    assert report["losses"] == expected
    assert sorted(server["target"] for server in report["servers"]) == sorted([evaluate.target, other.address])
