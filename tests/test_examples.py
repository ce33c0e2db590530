"""The examples run, against one server, and print what they promise; the demo ends well, and would end badly."""

# mypy: allow-untyped-calls

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split

import lossgrad
from examples import bounding_boxes, evaluate_model
from examples.demo import burst, evaluate, train
from examples.demo.histograms import Scrape, parse
from examples.demo.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        yield running


def run(*command: str, target: str = "") -> str:
    """Run a Python command from the repository's root; return what it prints. Its warnings are errors too."""
    environment = {**os.environ, "LOSSGRAD_TARGET": target}
    line = [sys.executable, "-W", "error", *command]
    result = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def number_after(label: str, text: str) -> float:
    match = re.search(re.escape(label) + r"\s*(-?[\d.]+)", text)
    assert match, f"{label!r} is not in:\n{text}"
    return float(match[1])


def test_the_sync_example_prints_torchs_values(server: ServerProcess) -> None:
    printed = run("examples/sync_client.py", target=server.target)

    train_x, test_x, train_y, test_y = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
    prediction = torch.tensor(Ridge(alpha=0.1).fit(train_x, train_y).predict(test_x)).float().double()
    target = torch.tensor(test_y)
    for label, expected in {
        "SmoothL1(beta=10)": F.smooth_l1_loss(prediction, target, beta=10.0),
        "SmoothL1(beta=1.0):": F.smooth_l1_loss(prediction, target),
        "Huber(delta=25.0):": F.huber_loss(prediction, target, delta=25.0),
        "L1():": F.l1_loss(prediction, target),
        "MSE():": F.mse_loss(prediction, target),
        "patients above 200:": F.l1_loss(prediction[target > 200], target[target > 200]),
    }.items():
        assert number_after(label, printed) == pytest.approx(expected.item(), rel=1e-6, abs=1e-4)
    worst = (prediction - target).abs().sort(descending=True).values[:5]
    assert "worst five: " + ", ".join(f"{error:.1f}" for error in worst) in printed


def test_the_asyncio_example_adds_its_batches_up_to_torchs_mean(server: ServerProcess) -> None:
    printed = run("examples/asyncio_client.py", target=server.target)

    pixels = torch.tensor(load_digits().data).float()
    upper, lower = pixels[:, :32].numpy(), pixels[:, 32:].numpy()
    prediction = Ridge().fit(upper[:1000], lower[:1000]).predict(upper[1000:])
    expected = F.smooth_l1_loss(torch.tensor(prediction).double(), torch.tensor(lower[1000:]).double(), beta=2.0)
    assert number_after("SmoothL1(beta=2)", printed) == pytest.approx(expected.item(), rel=1e-6)
    assert "25 batches, 25504 pixels" in printed


def test_the_training_example_lets_the_loss_fall(server: ServerProcess) -> None:
    losses = [
        float(loss) for loss in re.findall(r"loss ([\d.]+)", run("examples/drop_in_module.py", target=server.target))
    ]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.4 * losses[0]


def test_the_embedded_example_needs_no_server() -> None:
    printed = run("examples/embedded.py")
    rows = [[float(cell) for cell in line.split()] for line in printed.splitlines()[1:-1]]
    distance = torch.tensor([row[0] for row in rows])
    zero = torch.zeros_like(distance)
    torch.testing.assert_close(
        torch.tensor([row[1] for row in rows]), F.smooth_l1_loss(distance, zero, reduction="none"), rtol=0, atol=1e-4
    )
    assert [row[2] for row in rows] == distance.clamp(-1, 1).tolist()
    assert [row[4] for row in rows] == distance.sign().tolist()


def test_the_errors_example_shows_every_kind(server: ServerProcess) -> None:
    printed = run("examples/errors.py", target=server.target)
    for expected in ("reason=SHAPE_MISMATCH field=target.shape", "beta is -1.0", "'avg'", "Unavailable: "):
        assert expected in printed


def test_the_model_example_prints_torchs_values(server: ServerProcess) -> None:
    printed = run("examples/evaluate_model.py", target=server.target)
    data = evaluate_model.Halves(slice(evaluate_model.TRAINED, None))
    predicted = evaluate_model.trained_model()(data.pixels[:, :32]).detach().double()
    lower = data.pixels[:, 32:].double()
    # The training's float32 differs a little from machine to machine, and so from process to process.
    assert number_after("SmoothL1(beta=0.1)  all", printed) == pytest.approx(
        F.smooth_l1_loss(predicted, lower, beta=0.1).item(), rel=1e-3
    )
    assert number_after("MSE()               all", printed) == pytest.approx(
        F.mse_loss(predicted, lower).item(), rel=1e-3
    )
    errors = [
        F.smooth_l1_loss(predicted[rows], lower[rows], beta=0.1).item()
        for rows in (torch.tensor(data.digits) == digit for digit in range(10))
    ]
    assert f"hardest digit: {max(range(10), key=errors.__getitem__)}\n" in printed


def test_the_box_example_is_fast_r_cnns_loss(server: ServerProcess) -> None:
    printed = run("examples/bounding_boxes.py", target=server.target)
    weights = torch.tensor(bounding_boxes.WEIGHTS).double()
    losses, positives = [], []
    for image in bounding_boxes.images():
        chosen = torch.tensor(image.is_positive)
        each = F.smooth_l1_loss(
            torch.tensor(image.predicted)[chosen].double(),
            torch.tensor(image.target)[chosen].double(),
            beta=1 / 9,
            reduction="none",
        )
        losses.append((each * weights).sum().item())
        positives.append(int(chosen.sum()))
    assert f"first image: {positives[0]} of 128 proposals are positive" in printed
    assert number_after("are positive, loss", printed) == pytest.approx(losses[0] / positives[0], rel=1e-4)
    assert f"all images: {sum(positives)} positives" in printed
    assert number_after(f"{sum(positives)} positives, loss", printed) == pytest.approx(
        sum(losses) / sum(positives), rel=1e-4
    )
    assert "0 for negatives: True" in printed
    shares = [float(share) for share in re.findall(r"share of the loss ([\d.]+)%", printed)]
    assert sum(shares) == pytest.approx(100, abs=0.3)


@pytest.mark.slow
def test_the_sharded_example_has_the_bits_of_one_process(server: ServerProcess) -> None:
    printed = run("examples/sharded_evaluation.py", target=server.target)
    assert "the same bits: True" in printed
    pairs = re.findall(r": (0x\S+) in 4 processes, (0x\S+) in one", printed)
    assert len(pairs) == 3
    assert all(one == other for one, other in pairs)
    rng = np.random.default_rng(0)
    target = rng.normal(size=(200_000, 4)).astype(np.float32)
    prediction = (target + rng.laplace(size=target.shape)).astype(np.float32)
    difference = (prediction - target).astype(np.float64)
    expected = float((difference**2).mean())
    assert float.fromhex(pairs[1][0]) == pytest.approx(expected, rel=1e-12)


def test_the_notebook_runs_and_gives_what_it_shows() -> None:
    path = ROOT / "examples/evaluation.ipynb"
    # In a process of its own, because what runs notebooks warns of the event loop that it makes.
    shown, computed = json.loads(path.read_text()), json.loads(run_notebook(path))
    for before, after in zip(shown["cells"], computed["cells"], strict=True):
        kinds = [[set(output.get("data", ())) for output in cell.get("outputs", ())] for cell in (before, after)]
        assert kinds[0] == kinds[1], before["source"]
    texts = [
        ["".join(output["data"]["text/plain"]) for cell in each["cells"] for output in cell.get("outputs", ())]
        for each in (shown, computed)
    ]
    assert len(texts[0]) == 6
    # Not the first, which says how long it took, nor the picture's size.
    assert texts[0][2:] == texts[1][2:]
    assert texts[0][0].splitlines()[1:] == texts[1][0].splitlines()[1:]


EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
sys.stdout.write(nbformat.writes(notebook))
"""


def run_notebook(path: Path) -> str:
    command = [sys.executable, "-c", EXECUTE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_picture_is_drawn_anew(tmp_path: Path) -> None:
    run("examples/report_picture.py", str(tmp_path / "report.png"))
    drawn, shown = (Image.open(path) for path in (tmp_path / "report.png", ROOT / "docs/pictures/report.png"))
    assert drawn.size == shown.size
    assert (tmp_path / "report.png").stat().st_size < 150_000
    # Numbers in the last digits may differ with the machine that trains; all else is the same.
    both = [np.asarray(picture.convert("L"), np.float64) for picture in (drawn, shown)]
    assert np.mean(np.abs(both[0] - both[1]) > 40) < 0.06


def test_the_demo_agrees_with_torch_and_stops_its_server() -> None:
    printed = run("-m", "examples.demo")
    assert "WRONG" not in printed
    assert "exit code 0" in printed
    assert "whole request" in printed


def test_the_demo_sees_a_number_that_is_not_torchs() -> None:
    data = evaluate.diabetes()
    right = evaluate.Row(lossgrad.L1(), remote=46.0, local=46.0, worst_batch_ulp=1.0)
    off = evaluate.Row(lossgrad.L1(), remote=46.0001, local=46.0, worst_batch_ulp=1.0)
    off_in_a_batch = evaluate.Row(lossgrad.L1(), remote=46.0, local=46.0, worst_batch_ulp=5.0)
    not_a_number = evaluate.Row(lossgrad.L1(), remote=math.nan, local=46.0, worst_batch_ulp=math.nan)
    assert evaluate.disagreements(data, [right]) == []
    assert len(evaluate.disagreements(data, [right, off, off_in_a_batch, not_a_number])) == 3


def test_the_demo_sees_a_training_that_goes_another_way() -> None:
    falling = train.Training([1.0, 0.5, 0.25], steps=3)
    assert train.disagreements(falling, falling) == []
    assert train.disagreements(train.Training([1.0, 0.501, 0.25], steps=3), falling)
    assert train.disagreements(train.Training([math.nan, 0.5, 0.25], steps=3), falling)
    flat = train.Training([1.0, 1.0, 0.9], steps=3)
    assert train.disagreements(flat, flat)


def test_the_demo_sees_an_answer_that_changes_with_its_company() -> None:
    pairs = burst.pairs_of(torch.zeros(8, 2), torch.zeros(8, 2), count=4)
    none_observed = Scrape({})
    alone = burst.Burst("alone", [1.0, 2.0, 1.0, 2.0], 1.0, none_observed)
    other = burst.Burst("stream", [1.0, 2.0, 1.0, 2.5], 1.0, none_observed)
    assert any("1 of 4 values differ" in line for line in burst.disagreements([alone, other], pairs))
    assert all("0 of" not in line for line in burst.disagreements([alone, alone], pairs))


EXPOSITION = """\
# HELP t_seconds Time.
# TYPE t_seconds histogram
t_seconds_bucket{stage="queue",le="0.1"} %d
t_seconds_bucket{stage="queue",le="0.2"} %d
t_seconds_bucket{stage="queue",le="+Inf"} %d
t_seconds_count{stage="queue"} %d
t_seconds_sum{stage="queue"} %s
"""


def test_percentiles_come_from_the_difference_of_two_scrapes_as_in_promql() -> None:
    observed = parse(EXPOSITION % (15, 35, 40, 40, "9.0")) - parse(EXPOSITION % (5, 5, 5, 5, "1.0"))
    histogram = observed.select("t_seconds", stage="queue")
    # 10 below 0.1, 20 from there to 0.2, 5 above: rank 17.5 of 35 is 7.5 of 20 into the second bucket.
    assert histogram.count == 35
    assert histogram.mean == pytest.approx(8.0 / 35)
    assert histogram.quantile(0.5) == pytest.approx(0.1 + 0.1 * 7.5 / 20)
    assert histogram.quantile(0.1) == pytest.approx(0.1 * 3.5 / 10)
    assert histogram.quantile(0.99) == 0.2  # beyond the last finite bound nothing is known
    assert math.isnan(observed.select("t_seconds", stage="compute").quantile(0.5))
