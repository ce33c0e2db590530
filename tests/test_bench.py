"""The benchmarks run, in a configuration far too small to measure anything, and print JSON with what they promise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import evaluate, evaluate_echo
from bench import transport_messages as messages
from bench.measuring import Bar, interleave, paired_ratio, parse_size, percentile, size_name, to_json
from bench.transport import QUICK, SECTIONS
from lossgrad.slice_window import SliceRequest, SliceWindow
from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.isolation.memory import why_impossible as no_isolation
from lossgrad_server.shared_memory.segments import why_impossible

_ROOT = Path(__file__).resolve().parent.parent
_TINY = (
    *("--rounds", "1", "--burst-seconds", "0.02", "--large-bytes", "64KiB", "--flat-calls", "200", "--many", "32"),
    *("--mixed-seconds", "0.1", "--lag-seconds", "0.2", "--budget-seconds", "600"),
)


def _run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
def test_transport_measures_everything_that_the_issue_asks_for() -> None:
    sections = (*QUICK.sections, "unix", "many-callers", "streams")
    assert set(sections) == set(SECTIONS)
    report = _run("bench.transport", "--json", "--quick", "--sizes", "1KiB", "--only", *sections, *_TINY)
    cells = report["cells"]
    assert {cell["address"] for cell in cells} == {"tcp", "unix"}
    assert {cell["path"] for cell in cells} >= {"floor", "idle", "server", "sdk", "sdk/floor", "client.stream"}
    assert {cell["mode"] for cell in cells} >= {"unary", "unary, asyncio", "stream, 1 to a message", "packed"}
    for cell in cells:
        assert cell["calls"] > 0
        assert cell["calls_per_second"] > 0
        assert cell["path"] != "floor" or cell["ratio"] == 1.0
    assert len(report["bars"]) == 4 + 8 + 1 + 1 + 1 + 2
    assert all(isinstance(bar["is_met"], bool) for bar in report["bars"])
    assert report["server"]["memory"]["server"]["peak_bytes"] > 0
    assert report["skipped"] == []


def test_the_echo_answers_as_large_as_the_server() -> None:
    request = pb.ComputeLossRequest.FromString(messages.request(1024))
    answer = pb.ComputeLossResponse.FromString(messages.answer(1024))
    assert len(request.input.data) == len(request.target.data) == 1024
    assert request.specs[0].include_gradient
    assert len(answer.results[0].input_gradient.data) == 1024
    assert answer.results[0].input_gradient.shape == request.input.shape
    stream = pb.StreamComputeLossRequest.FromString(messages.stream_request(1024, 3))
    assert [tagged.request for tagged in stream.requests] == [request] * 3
    tags = [tag for tag, _ in codec.decode_stream_response(messages.stream_answer(1024, 3))]
    assert tags == [tagged.tag for tagged in stream.requests]
    assert messages.count_answers(messages.stream_answer(1024, 3)) == 3


def test_everything_takes_its_turn_in_every_round() -> None:
    turns: list[str] = []

    def case(name: str) -> Callable[[], int]:
        def run() -> int:
            turns.append(name)
            return len(turns)

        return run

    results = interleave({"a": case("a"), "b": case("b")}, 2)
    assert turns == ["a", "b", "b", "a"]
    assert results == {"a": [1, 4], "b": [2, 3]}
    assert interleave({"a": lambda: 1}, 5, until=0.0) == {"a": [1]}


def test_ratios_are_taken_within_rounds() -> None:
    assert paired_ratio([1.0, 20.0, 3.0], [2.0, 10.0, 3.0]) == 1.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(map(float, range(100))), 99) == 99.0
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("value", "is_least", "is_met"),
    [(0.8, True, True), (0.79, True, False), (0.81, False, False), (math.nan, False, False)],
)
def test_a_bar_is_met_or_not(value: float, is_least: bool, is_met: bool) -> None:
    bar = Bar("throughput", value, 0.8, is_least=is_least)
    assert bar.is_met is is_met
    assert json.loads(to_json([bar]))[0]["is_met"] is is_met


@pytest.mark.parametrize(("text", "byte_count"), [("1KiB", 1024), ("8MiB", 8 << 20), ("512B", 512), ("7", 7)])
def test_sizes_are_read(text: str, byte_count: int) -> None:
    assert parse_size(text) == byte_count
    assert parse_size(size_name(byte_count).replace(" ", "")) == byte_count


@pytest.mark.slow
def test_the_cost_of_metrics_is_measured_beside_a_server_that_counts_nothing() -> None:
    report = _run("bench.metrics_cost", "--json", "--rounds", "1", "--burst-seconds", "0.02")
    assert {row["server"] for row in report["rows"]} == {"without", "metrics", "tracing", "1 in 100", "all"}
    assert all(row["rate_ratio"] > 0 for row in report["rows"])
    assert len(report["bars"]) == 2


@pytest.mark.slow
def test_shared_memory_is_measured_beside_the_wire_and_the_kernel() -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    report = _run("bench.shared_memory", "--json", "--rounds", "1", "--megabytes", "1")
    (size,) = report["sizes"]
    assert size["bytes"] == 1 << 20
    assert set(size["seconds"]) == {"wire", "shared", "in place", "kernel", "small"}
    assert all(seconds > 0 for seconds in size["seconds"].values())
    assert len(report["bars"]) == 1


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own_is_measured_beside_the_thread_s() -> None:
    if reason := no_isolation():
        pytest.skip(reason)
    report = _run("bench.isolation", "--json", "--rounds", "1", "--seconds", "0.2", "--sizes", "1KiB", "1MiB")
    assert [(one["bytes"], one["case"]) for one in report["cases"]] == [
        (size, case) for size in (1024, 1 << 20) for case in ("throughput", "alone")
    ]
    assert all(rate > 0 for one in report["cases"] for rate in one["calls_per_second"])
    (bar,) = report["bars"]
    assert bar["bar"] == 0.85


@pytest.mark.slow
def test_evaluate_is_measured_beside_its_floor() -> None:
    report = _run("bench.evaluate", "--json", "--rounds", "1", "--burst-seconds", "0.05", "--sizes", "1KiB", "256KiB")
    assert [row["slice_bytes"] for row in report["rows"]] == [1024, 256 << 10]
    for row in report["rows"]:
        assert min(row["floor"], row["packed_floor"], row["evaluate"]) > 0
        assert row["evaluate_mib_per_second"] == pytest.approx(
            row["evaluate"] * 2 * row["slice_bytes"] / (1 << 20), rel=1e-3
        )
    assert [bar["bar"] for bar in report["bars"]] == [0.8, 0.8]


@pytest.mark.slow
def test_a_data_set_has_the_same_bits_however_it_is_evaluated() -> None:
    report = _run("bench.dataset", "--json", "--elements", "4000000")
    (*memory, single, double), same = report["bars"][:4], report["bars"][4:]
    assert all(0 < bar["value"] < 1000 for bar in memory)
    assert 0 < single["value"] <= 1e-7
    assert double["value"] <= 1e-15
    assert [bar["value"] for bar in same] == [1.0] * 5
    assert {run["resumed_slices"] for run in report["runs"][:-2]} == {0}
    assert report["runs"][-2]["resumed_slices"] > 0


@pytest.mark.parametrize("size", [1 << 10, 64 << 10, 256 << 10, 4 << 20])
def test_the_floor_of_evaluate_sends_and_answers_as_evaluate_and_the_server_do(size: int) -> None:
    count = evaluate.packed_count(size)
    requests = pb.StreamComputeLossRequest.FromString(evaluate_echo.request(size, count)).requests
    assert len(requests) == count
    assert requests[0].request.specs[0].include_total
    assert len(requests[0].request.input.data) == size
    answers = codec.decode_stream_response(evaluate_echo.answer(size, count))
    assert [tag for tag, _ in answers] == [each.tag for each in requests]
    assert messages.count_answers(evaluate_echo.answer(size, count)) == count
    # As many as `evaluate` puts into a message, which it fills.
    window = SliceWindow(
        1, max_bytes=64 << 20, max_message_bytes=1 << 28, silence_seconds=9, patience_seconds=9, clock=time.monotonic
    )
    sent = []
    for _ in range(2 * count + 1):
        body = requests[0].request.SerializeToString()
        window.add(SliceRequest([body], len(body), lambda _: None))
        sent += window.messages()
    counts = [len(pb.StreamComputeLossRequest.FromString(message).requests) for _, message in sent]
    assert counts[1] == count
