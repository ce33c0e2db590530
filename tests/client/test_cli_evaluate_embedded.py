"""`lossgrad evaluate --embedded`: without a server, the bits of one, with all that a run from the command line has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossgrad import LossClient
from lossgrad.cli import evaluate as evaluate_module
from lossgrad.cli import main
from tests.client.evaluating import gradient, make_pair
from tests.server.serving import RunningServer

COMMAND = "p.npy t.npy --loss smooth_l1:beta=0.5 --loss mse --group-by g.npy --mask m.npy --json --quiet"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_module, "SLICE_ELEMENTS", 1 << 16)
    predictions, targets = make_pair((50_000, 4))
    np.save("p.npy", predictions)
    np.save("t.npy", targets)
    np.save("g.npy", np.random.default_rng(1).choice(["a", "b", "c"], 50_000))
    np.save("m.npy", np.random.default_rng(2).random((50_000, 4)) < 0.9)
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["evaluate", *arguments.split()]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_it_has_the_bits_of_a_server(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    own = run(f"{COMMAND} --embedded", capsys)
    remote = run(f"{COMMAND} --target {server.address}", capsys)
    assert own["losses"] == remote["losses"]
    assert own["groups"] == remote["groups"]
    assert set(own["groups"]) == {"a", "b", "c"}
    assert own["servers"][0]["determinism"] == remote["servers"][0]["determinism"]
    assert own["servers"][0]["target"] == "the embedded server"


def test_gradients_and_checkpoints_go_with_it(capsys: pytest.CaptureFixture[str], server: RunningServer) -> None:
    command = "p.npy t.npy --loss mse --gradient-out g-out.npy --checkpoint c --json --quiet"
    first = run(f"{command} --embedded", capsys)
    predictions, targets = make_pair((50_000, 4))
    np.testing.assert_allclose(np.load("g-out.npy"), gradient("mse", predictions, targets) / 200_000, rtol=1e-5)
    again = run(f"{command} --target {server.address}", capsys)  # which has nothing left to do
    assert again["losses"] == first["losses"]
    assert again["resumed_batch_count"] == first["throughput"]["batch_count"] > 1


def test_it_needs_nobody_to_be_there_and_no_torch() -> None:
    program = "import sys; from lossgrad.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", program, "evaluate", "p.npy", "t.npy", "--loss", "l1", "--embedded", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOSSGRAD_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "l1" in done.stdout


def test_the_embedded_client_evaluates_as_the_remote_one(server: RunningServer) -> None:
    import lossgrad

    pairs = [make_pair(1000, seed=seed) for seed in range(5)]
    with lossgrad.embedded(device="cpu") as own, LossClient(server.address) as remote:
        assert own.evaluate(pairs, lossgrad.L1()).accumulation == remote.evaluate(pairs, lossgrad.L1()).accumulation
