"""`lossgrad evaluate --checkpoint`: interrupted by anything, gone on with, the same bits; and not with other data."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo.server_process import ServerProcess
from lossgrad.cli import evaluate as evaluate_module
from lossgrad.files import Dataset
from tests.client.evaluating import Evaluate, gradient, make_pair, save_shards

LOSSES = "--loss smooth_l1:beta=0.5 --loss l1 --loss mse"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "SLICE_ELEMENTS", 1 << 14)
    return tmp_path


def save_pair(count: int = 200_000) -> None:
    predictions, targets = make_pair(count)
    np.save("p.npy", predictions)
    np.save("t.npy", targets)


class Reads:
    """Counts which slices are read, and raises at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.indices: list[int] = []
        self.raise_at: int | None = None
        own: Callable[[Dataset, Any], Any] = Dataset.__getitem__

        def getitem(data: Dataset, index: Any) -> Any:
            if self.raise_at is not None:
                time.sleep(0.05)  # what was sent is answered by now, so that something is done
            if index == self.raise_at:
                raise KeyboardInterrupt
            self.indices.append(index)
            return own(data, index)

        monkeypatch.setattr(Dataset, "__getitem__", getitem)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(evaluate: Evaluate, reads: Reads) -> None:
    save_pair()
    expected = evaluate.losses(f"p.npy t.npy {LOSSES}")
    reads.indices.clear()
    reads.raise_at = 9
    command = f"p.npy t.npy {LOSSES} --checkpoint c --checkpoint-every 0 --gradient-out {{loss}}.npy"
    assert evaluate.run(command) == 130
    assert evaluate.out == ""
    assert evaluate.err == "lossgrad: interrupted; the same command goes on from 'c'\n"
    assert reads.indices == list(range(9))
    assert sorted(path.name for path in Path().glob("*.partial")) == [
        "l1.npy.partial",
        "mse.npy.partial",
        "smooth_l1-beta=0.5.npy.partial",
    ]
    reads.indices.clear()
    reads.raise_at = None
    report = evaluate.json(command)
    assert report["losses"] == expected
    assert 0 < report["resumed_batch_count"] <= 9
    assert reads.indices == list(range(report["resumed_batch_count"], 13))
    predictions, targets = make_pair(200_000)
    np.testing.assert_allclose(np.load("mse.npy"), gradient("mse", predictions, targets) / 200_000, rtol=1e-5)
    # Once more: it is all there.
    reads.indices.clear()
    again = evaluate.json(command)
    assert (again["losses"], again["resumed_batch_count"], reads.indices) == (expected, 13, [])


def test_without_a_checkpoint_ctrl_c_says_what_would_keep_it(evaluate: Evaluate, reads: Reads) -> None:
    save_pair()
    reads.raise_at = 3
    assert evaluate.run("p.npy t.npy --gradient-out g.npy") == 130
    assert evaluate.err == (
        "lossgrad: interrupted; nothing is kept. With --checkpoint FILE the same command goes on from where it stopped\n"
    )
    assert not list(Path().glob("g.npy*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--loss l1 --loss mse", "c is of an evaluation of [SmoothL1(beta=0.5), L1(), MSE()]"),
        (f"{LOSSES} --nan-policy omit", "it is of other data"),
        (f"{LOSSES} --weight p.npy", "it is of other data"),
        (f"{LOSSES} --gradient-out {{loss}}", "c is of an evaluation of "),
        (f"{LOSSES} --gradient-out {{loss}} --gradient-of sum", "c is of an evaluation of "),
        (
            f"{LOSSES} --plot x.png",
            "--checkpoint 'c' was written without --plot, which needs every slice; leave out --plot",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change: str, says: str, evaluate: Evaluate) -> None:
    save_pair()
    evaluate.losses(f"p.npy t.npy {LOSSES} --checkpoint c")
    before = Path("c").read_bytes()
    assert evaluate.run(f"p.npy t.npy --checkpoint c {change}") == 2
    assert evaluate.err.count("\n") == 1
    assert says in evaluate.err
    assert Path("c").read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused_and_of_moved_data_is_not(evaluate: Evaluate) -> None:
    save_pair()
    expected = evaluate.losses(f"p.npy t.npy {LOSSES} --checkpoint c")
    Path("p.npy").rename("moved.npy")
    os.utime("t.npy", (1, 1))
    assert evaluate.losses(f"moved.npy t.npy {LOSSES} --checkpoint c") == expected
    np.save("moved.npy", np.load("moved.npy") + 1)
    assert evaluate.run(f"moved.npy t.npy {LOSSES} --checkpoint c") == 2
    assert "it is of other data; give another file" in evaluate.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "c is not a lossgrad.checkpoint file"),
        (b"\x00\xff", "c is not a lossgrad.checkpoint file"),
        (b"{}", "c is not a lossgrad.checkpoint file"),
        (None, "c is damaged: its checksum does not fit its content"),
    ],
)
def test_a_damaged_checkpoint_is_refused(content: bytes | None, says: str, evaluate: Evaluate) -> None:
    save_pair()
    evaluate.losses("p.npy t.npy --checkpoint c")
    Path("c").write_bytes(Path("c").read_bytes().replace(b"[0,13]", b"[0,12]") if content is None else content)
    assert evaluate.run("p.npy t.npy --checkpoint c") == 2
    assert (evaluate.out, evaluate.err.count("\n")) == ("", 1)
    assert says in evaluate.err


def test_gradients_that_are_gone_are_told(evaluate: Evaluate, reads: Reads) -> None:
    save_pair()
    reads.raise_at = 5
    command = "p.npy t.npy --gradient-out g.npy --checkpoint c --checkpoint-every 0"
    assert evaluate.run(command) == 130
    reads.raise_at = None
    Path("g.npy.partial").write_bytes(b"something else")
    assert evaluate.run(command) == 2
    assert (
        "'g.npy.partial' is not what the run of the checkpoint wrote; remove the checkpoint to begin anew"
        in evaluate.err
    )
    Path("g.npy.partial").unlink()
    assert evaluate.run(command) == 2
    assert "'g.npy.partial', which the run of the checkpoint began, cannot be had: No such file" in evaluate.err


class Command:
    """`lossgrad evaluate` as a process of its own."""

    def __init__(self, target: str, arguments: str) -> None:
        command = [sys.executable, "-c", PROGRAM, "evaluate", *arguments.split(), "--target", target]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=100)
        return self.process.returncode, out, err

    def kill(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)  # its workers too, as a terminal and a scheduler do


PROGRAM = """
import sys
from lossgrad.cli import evaluate, main
evaluate.SLICE_ELEMENTS = 1 << 14
sys.exit(main())
"""


def wait_for_progress(path: Path, command: Command) -> None:
    """Wait until a checkpoint has something."""
    deadline = time.monotonic() + 60
    while not path.exists() and command.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 3), (2, 1), (3, 2)])
def test_what_one_number_of_workers_began_another_ends(
    first: int, second: int, folder: Path, evaluate: Evaluate
) -> None:
    save_shards(folder, dict(zip("pt", make_pair(1_000_000), strict=True)), 5)
    expected = evaluate.losses(f"p t {LOSSES}")
    command = Command(evaluate.target, f"p t {LOSSES} --checkpoint c --checkpoint-every 0 --quiet --workers {first}")
    wait_for_progress(Path("c"), command)
    command.kill(signal.SIGKILL)
    command.end()
    report = evaluate.json(f"p t {LOSSES} --checkpoint c --workers {second}")
    assert report["losses"] == expected
    assert report["resumed_batch_count"] > 0
    assert report["resumed_batch_count"] + report["throughput"]["batch_count"] == report_count(folder)


def report_count(folder: Path) -> int:
    """Return how many slices the shards have."""
    return sum(-(-np.load(path).size // (1 << 14)) for path in (folder / "p").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_it_with_its_checkpoint_written(
    number: signal.Signals, code: int, workers: int, evaluate: Evaluate
) -> None:
    save_pair(4_000_000)
    arguments = f"p.npy t.npy --checkpoint c --checkpoint-every 0 --workers {workers} --quiet"
    command = Command(evaluate.target, arguments)
    wait_for_progress(Path("c"), command)
    command.kill(number)
    returned, out, err = command.end()
    assert (returned, out, err) == (code, "", "lossgrad: interrupted; the same command goes on from 'c'\n")
    assert json.loads(Path("c").read_text())["done"]
    assert evaluate.losses("p.npy t.npy --checkpoint c") == evaluate.losses("p.npy t.npy")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_three_kills_of_client_and_server_change_no_bit(workers: int, folder: Path, evaluate: Evaluate) -> None:
    save_pair(6_000_000)
    expected = evaluate.json(f"p.npy t.npy {LOSSES}")
    rng = random.Random(workers)
    server = ServerProcess(["--engine", "plain"])
    server.__enter__()
    target = server.target
    arguments = (
        f"p.npy t.npy {LOSSES} --gradient-out g-{{loss}}.npy --checkpoint c --checkpoint-every 0 --workers {workers} "
        "--json --patience 60"
    )
    try:
        for _ in range(3):
            command = Command(target, arguments)
            wait_for_progress(Path("c"), command)
            time.sleep(rng.random() * 0.3)
            server._process.kill()
            time.sleep(rng.random() * 0.3)
            server.stop()
            server = ServerProcess(["--engine", "plain", "--port", target.rpartition(":")[2]])
            server.__enter__()
            time.sleep(rng.random())
            command.kill(signal.SIGKILL)
            command.end()
        code, out, err = Command(target, arguments).end()
    finally:
        server.stop()
    assert code == 0, err
    report = json.loads(out)
    assert report["losses"] == expected["losses"]
    assert report["resumed_batch_count"] > 0
    predictions, targets = make_pair(6_000_000)
    for loss in ("l1", "mse"):
        written = np.load(f"g-{loss}.npy")
        np.testing.assert_allclose(written, gradient(loss, predictions, targets) / 6_000_000, rtol=1e-5)
