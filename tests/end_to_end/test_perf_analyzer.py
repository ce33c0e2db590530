"""NVIDIA's load generator against the server: it ends with 0, and the server has seen what it says that it sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc

from tests.server.serving import RunningServer, StartServer
from tests.tools import perf_analyzer

triton: Any = tritonclient.grpc  # it has no types

SHAPES = ("--shape", "INPUT:256", "--shape", "TARGET:256")
MASKED = (*SHAPES, "--shape", "WEIGHT:256", "--shape", "MASK:256")


@pytest.fixture(scope="module", autouse=True)
def program() -> None:
    """Fetch it, or skip with the reason."""
    try:
        perf_analyzer.command()
    except perf_analyzer.NotToBeHad as reason:
        pytest.skip(str(reason))


@pytest.fixture
def running(start_server: StartServer) -> RunningServer:
    return start_server()


def statistics(running: RunningServer, model: str) -> Any:
    client = triton.InferenceServerClient(running.address)
    (one,) = client.get_inference_statistics(model).model_stats
    client.close()
    return one


def analyze(running: RunningServer, model: str, *arguments: str, request_count: int = 200) -> str:
    """Run it with so many requests at each concurrency; return what it wrote."""
    result = perf_analyzer.run(
        ["-m", model, "-u", running.address, "-i", "grpc", "--request-count", str(request_count), *arguments]
    )
    assert result.returncode == 0, result.stdout
    assert not re.search(r"error|fail", result.stdout, re.IGNORECASE), result.stdout
    return result.stdout


RUNS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "batches of 1": ("smooth_l1_grad", ("-b", "1", *SHAPES), 1),
    "batches of 8": ("smooth_l1_grad", ("-b", "8", *SHAPES), 8),
    "without the gradient": ("mse", SHAPES, 1),
    "weight and mask": ("huber_masked_grad", MASKED, 1),
    "asynchronous": ("l1_grad", ("--async", "--concurrency-range", "8", *SHAPES), 1),
    "a stream": ("smooth_l1_grad", ("--async", "--streaming", "--concurrency-range", "16", *SHAPES), 1),
    "a parameter": ("smooth_l1", ("--request-parameter", "beta:0.25:string", *SHAPES), 1),
    "a concurrency of 64": ("smooth_l1_grad", ("--concurrency-range", "64", "-b", "2", *SHAPES), 2),
}


@pytest.mark.parametrize(("model", "arguments", "rows"), RUNS.values(), ids=RUNS)
def test_it_measures_without_an_error(
    running: RunningServer, model: str, arguments: tuple[str, ...], rows: int
) -> None:
    output = analyze(running, model, *arguments)
    assert "Request count: 200" in output
    one = statistics(running, model)
    assert one.inference_stats.fail.count == 0
    assert one.inference_stats.success.count >= 200
    assert one.inference_count == rows * one.inference_stats.success.count
    assert sum(batch.batch_size * batch.compute_infer.count for batch in one.batch_stats) == one.inference_count
    # Its own table, from the differences of two answers of ModelStatistics.
    shown = re.search(r"Inference count: (\d+)\s+Execution count: (\d+)\s+Successful request count: (\d+)", output)
    assert shown is not None, output
    inferences, executions, requests = map(int, shown.groups())
    assert inferences == rows * requests
    assert 0 < executions <= requests <= one.inference_stats.success.count
    # Its parts must not be more than the whole, or the overhead would come out as a number near 2 ** 64.
    overhead = re.search(r"overhead (\d+) usec", output)
    assert overhead is not None
    assert int(overhead[1]) < 10_000_000


def test_concurrencies_from_1_to_64_one_after_the_other(running: RunningServer) -> None:
    for concurrency in (1, 2, 4, 16, 32, 64):
        output = analyze(running, "smooth_l1_grad", "--concurrency-range", str(concurrency), *SHAPES, request_count=100)
        assert f"Request concurrency: {concurrency}" in output
    assert statistics(running, "smooth_l1_grad").inference_stats.fail.count == 0


@pytest.mark.parametrize("arguments", [(), ("--async", "--streaming")], ids=["unary", "stream"])
def test_mixed_shapes_from_a_file(running: RunningServer, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Requests of different extents one after another, also in one batch."""
    steps = [
        {name: {"content": [0.5 * index for index in range(size)], "shape": [size]} for name in ("INPUT", "TARGET")}
        for size in (1, 7, 64, 1000, 3)
    ]
    (tmp_path / "data.json").write_text(json.dumps({"data": steps}))
    analyze(
        running, "smooth_l1_grad", "--input-data", str(tmp_path / "data.json"), "--concurrency-range", "8", *arguments
    )
    one = statistics(running, "smooth_l1_grad")
    assert (one.inference_stats.fail.count, one.inference_stats.success.count >= 200) == (0, True)


def test_wrong_shapes_are_an_error_that_it_shows(running: RunningServer) -> None:
    """The runs above would fail if the server refused what they send."""
    unequal = ["--shape", "INPUT:4", "--shape", "TARGET:5"]
    result = perf_analyzer.run(["-m", "mse", "-u", running.address, "-i", "grpc", "--request-count", "5", *unequal])
    assert result.returncode != 0
    assert "TARGET has shape [1, 5], INPUT [1, 4]; send equal shapes" in result.stdout
