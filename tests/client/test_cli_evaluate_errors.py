"""`lossgrad evaluate`: every mistake is one line on standard error that says what to change, and its exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lossgrad.cli import main
from tests.client.evaluating import Evaluate


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("p.npy", np.ones((10, 2), np.float32))
    np.save("t.npy", np.zeros((10, 2), np.float32))
    return tmp_path


def make_wrong_files() -> None:
    np.save("row.npy", np.ones(10, np.float32))
    np.save("long.npy", np.ones(11, np.float32))
    np.save("flat.npy", np.ones(20, np.float32))
    np.save("nan.npy", np.full((10, 2), np.nan, np.float32))
    np.save("objects.npy", np.array([[{}] * 2] * 10, dtype=object), allow_pickle=True)
    np.save("empty.npy", np.ones((0, 2), np.float32))
    np.save("fractions.npy", np.linspace(0, 1, 10))
    np.save("longname.npy", np.array(["x" * 200] * 10))
    np.savez("two.npz", a=np.ones((10, 2)), b=np.ones((10, 2)))
    Path("text.npy").write_text("hello")
    Path("zero.npy").touch()
    Path("folder").mkdir()
    for name in "abc":
        Path("shards").mkdir(exist_ok=True)
        np.save(f"shards/{name}.npy", np.ones(3))
    pyarrow.parquet.write_table(pa.table({"p": [1.0, None], "t": [1.0, 2.0]}), "null.parquet")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "give two files or folders or patterns, PREDICTIONS and TARGETS; got 0"),
        ("p.npy", "give two files or folders or patterns, PREDICTIONS and TARGETS; got 1"),
        ("p.npy t.npy row.npy", "got 3; put a pattern in quotes, so that the shell leaves it alone"),
        ("no.npy t.npy", "'no.npy' cannot be read: No such file or directory"),
        ("p.npy no.npy", "'no.npy' cannot be read: No such file or directory"),
        ("p.npy no/*.npy", "'no/*.npy' matches no file"),
        ("folder t.npy", "the folder 'folder' has no .npy, .npz"),
        ("p.npy text.npy", "'text.npy' cannot be read as a .npy file: it begins with b'hello'"),
        ("p.npy zero.npy", "'zero.npy' is empty"),
        ("p.npy objects.npy", "'objects.npy' holds Python objects (a pickle), which could run any program when read"),
        ("two.npz t.npy", "'two.npz' holds 2 arrays: a, b; say which, such as 'two.npz:a'"),
        ("two.npz:c t.npy", "'two.npz' has no array 'c'; it has a, b"),
        ("p.npy t.npy:x", "'t.npy' is a .npy file and holds one array without a name; leave out ':x'"),
        (
            "p.npy row.npy",
            "the target row.npy has shape [10], the prediction p.npy [10, 2]; give arrays of equal shapes",
        ),
        ("p.npy flat.npy", "both have 20 elements: save one with the shape of the other (numpy.reshape)"),
        ("shards p.npy", "the predictions are 3 files, targets 'p.npy' 1 file; give as many of both"),
        ("empty.npy empty.npy", "empty.npy holds no elements; there is nothing to evaluate"),
        ("p.npy t.npy --loss l2", "--loss 'l2' names no loss; give one such as smooth_l1:beta=0.5"),
        ("p.npy t.npy --loss smooth_l1:delta=1", "smooth_l1 takes only beta="),
        ("p.npy t.npy --loss smooth_l1:beta=x", "'x' is not a number"),
        ("p.npy t.npy --loss smooth_l1:beta=-1", "beta is -1.0; it must be at least 0"),
        ("p.npy t.npy --loss huber:delta=0", "delta is 0.0; it must be above 0"),
        ("p.npy t.npy --loss mse --loss mse", "--loss gives mse, mse; give each loss once"),
        (
            "p.npy t.npy " + " ".join(f"--loss huber:delta={n}" for n in range(1, 18)),
            "--loss is given 17 times; at most 16",
        ),
        (
            "p.npy t.npy --weight long.npy",
            "--weight long.npy has shape [11], the prediction p.npy [10, 2]; give the same",
        ),
        ("p.npy t.npy --mask row.npy", "--mask row.npy is float32; save it as bool, true where an element counts"),
        ("p.npy t.npy --group-by long.npy", "--group-by long.npy has shape [11]"),
        ("p.npy t.npy --group-by fractions.npy", "fractions.npy holds float64; groups are named by integers, text or"),
        ("p.npy t.npy --group-by longname.npy", "at most 128 are taken; shorten it"),
        ("p.npy t.npy --group-by scene", "'scene' cannot be read: No such file or directory"),
        (
            "p.npy t.npy --group-by row.npy --group-by-file",
            "--group-by and --group-by-file both say what the groups are",
        ),
        ("null.parquet:p t", "null.parquet:p has no value (null) at [1]; fill it in"),
        ("p.npy t.npy --nan-policy maybe", "argument --nan-policy: invalid choice: 'maybe'"),
        ("p.npy t.npy --workers 0", "--workers is 0; it must be at least 1"),
        ("p.npy t.npy --workers x", "argument --workers: invalid int value: 'x'"),
        ("p.npy t.npy --patience -1", "--patience is -1; it must be at least 0"),
        ("p.npy t.npy --checkpoint-every nan", "--checkpoint-every is nan; it must be at least 0"),
        ("p.npy t.npy --checkpoint no/c", "--checkpoint 'no/c' cannot be written: 'no' is no folder"),
        ("p.npy t.npy --checkpoint folder", "--checkpoint 'folder' cannot be read: Is a directory"),
        ("p.npy t.npy --checkpoint p.npy", "p.npy is not a lossgrad.checkpoint file"),
        ("p.npy t.npy --plot x.txt", "--plot 'x.txt' is no picture; give a name that ends with .png"),
        ("p.npy t.npy --plot no/x.png", "--plot 'no/x.png' cannot be written: 'no' is no folder"),
        ("p.npy t.npy --state-out no/x", "--state-out 'no/x' cannot be written: 'no' is no folder"),
        ("p.npy t.npy --embedded", "--embedded computes in this process, --target names a server; give one of them"),
        ("p.npy t.npy --timeout 0", "timeout is 0.0 seconds; it must be above 0"),
        ("p.npy t.npy --token-file no", "--token-file no cannot be read: No such file or directory"),
        ("p.npy t.npy --ca no.pem", "ca 'no.pem' cannot be read"),
        ("p.npy t.npy --cert p.npy", "only one of cert and key is given"),
        ("p.npy t.npy --frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(arguments: str, says: str, evaluate: Evaluate) -> None:
    make_wrong_files()
    assert evaluate.run(f"--quiet {arguments}") == 2
    assert evaluate.out == ""
    assert evaluate.err.startswith("lossgrad: ")
    assert evaluate.err.count("\n") == 1
    assert "Traceback" not in evaluate.err
    assert says in evaluate.err


def test_a_server_named_twice_and_too_many_processes_are_refused(evaluate: Evaluate) -> None:
    assert evaluate.run(f"p.npy t.npy --target {evaluate.target}") == 2
    assert "--target names a server twice" in evaluate.err
    assert main(["evaluate", "p.npy", "t.npy", "--embedded", "--workers", "2"]) == 2


def test_data_that_the_policy_refuses_exit_1(evaluate: Evaluate) -> None:
    make_wrong_files()
    assert evaluate.run("nan.npy t.npy --nan-policy raise --quiet") == 1
    assert evaluate.err == (
        "lossgrad: nan.npy is NaN at [0, 0]; --nan-policy omit leaves such elements out, propagate lets them into the "
        "result\n"
    )


@pytest.mark.parametrize("workers", ["", "--workers 2"])
def test_without_a_server_it_exits_3(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"evaluate p.npy t.npy --target 127.0.0.1:1 --patience 0 --quiet {workers}"
    assert main(command.split()) == 3
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "is a server running there? See: lossgrad ping --target 127.0.0.1:1" in captured.err


def test_what_a_server_cannot_evaluate_ends_it_or_is_left_out(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lossgrad
    from lossgrad.files import Dataset

    own: Any = Dataset.__getitem__

    def getitem(data: Dataset, index: Any) -> Any:
        batch = own(data, index)
        if data.piece(index).shard == 1:
            batch["target"] = batch["target"][:-1]  # as if the server had refused it
        return batch

    monkeypatch.setattr(Dataset, "__getitem__", getitem)
    for side in "ab":
        Path(side).mkdir()
        for index in range(3):
            np.save(f"{side}/{index}.npy", np.full(4, index, np.float32) if side == "a" else np.zeros(4, np.float32))
    assert evaluate.run("a b --loss l1 --quiet") == 2
    assert evaluate.err.startswith("lossgrad: a/1.npy, elements 0 to 4: target has shape [3], input [4]; ")
    assert evaluate.run("a b --loss l1 --quiet --keep-going --json") == 1
    report = json.loads(evaluate.out)
    assert report["losses"][0]["sum"] == 8.0
    assert report["errors"][0]["index"] == 1
    assert evaluate.err.startswith(
        "lossgrad: 1 of 3 slices could not be evaluated and are left out; the first is a/1.npy, elements 0 to 4: target"
    )
    assert lossgrad


def test_a_worker_that_is_killed_is_told(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    from lossgrad.cli import workers

    own = workers._Pool._hand_out

    def kill(pool: Any, number: int, waiting: Any, under_way: Any) -> None:
        own(pool, number, waiting, under_way)
        pool._workers[number][0].kill()

    monkeypatch.setattr(workers._Pool, "_hand_out", kill)
    assert evaluate.run("p.npy t.npy --workers 2 --quiet") == 3
    assert "ended with code -9; if the machine is short of memory, use fewer --workers" in evaluate.err


def run_at_a_terminal(arguments: list[str]) -> tuple[int, str]:
    """Run a command whose standard error is a terminal; return its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    return process.wait(), written.decode()


@pytest.mark.parametrize("without", ["", "rich"])
def test_at_a_terminal_there_is_a_bar_with_rich_and_without(without: str, evaluate: Evaluate) -> None:
    program = f"import sys\nsys.modules[{without!r}] = None\n" if without else "import sys\n"
    program += "from lossgrad.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, "evaluate", "p.npy", "t.npy", "--target", evaluate.target]
    code, written = run_at_a_terminal(command)
    assert code == 0
    assert "1 of 1 batches (100%), 20 elements" in written
    assert ("━" in written) == (not without)


def test_with_the_core_dependencies_alone_it_works_and_says_what_more_needs(evaluate: Evaluate, folder: Path) -> None:
    blocked = (
        "rich",
        "pyarrow",
        "matplotlib",
        "pandas",
        "torch",
        "ml_dtypes",
        "safetensors",
        "lossgrad_server",
        "numba",
    )
    program = f"import sys\nfor name in {blocked}:\n    sys.modules[name] = None\n"
    program += "from lossgrad.cli import main\nsys.exit(main())"
    pyarrow.parquet.write_table(pa.table({"p": [1.0], "t": [0.0]}), "a.parquet")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", program, "evaluate", "--quiet", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("p.npy", "t.npy", "--target", evaluate.target)
    assert (done.returncode, done.stderr) == (0, "")
    for arguments, says in (
        (("a.parquet:p", "t"), "'a.parquet' needs pyarrow, which is not installed: pip install 'lossgrad[files]'"),
        (
            ("p.npy", "t.npy", "--plot", "x.png"),
            "--plot needs matplotlib, which is not installed: pip install 'lossgrad",
        ),
        (
            ("p.npy", "t.npy", "--embedded"),
            "is not installed): pip install 'lossgrad[server]'",
        ),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert says in done.stderr


def test_without_a_server_of_its_own_it_computes_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compute", "p.npy", "t.npy", "--loss", "l1", "--embedded"]) == 0
    assert capsys.readouterr().out == "l1 mean: 1.0 (20 elements)\n"


def test_unknown_settings_of_the_environment_do_not_pass_silently(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSSGRAD_TIMEOUT", "soon")
    assert evaluate.run("p.npy t.npy --quiet") == 2
    assert "LOSSGRAD_TIMEOUT is 'soon'" in evaluate.err
