"""`lossgrad bench`: that a stall is charged to all whom it would have met, exact percentiles, and what is printed."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad.cli import load, main
from lossgrad.cli.latencies import Latencies, duration
from lossgrad.cli.load import Load, Run, apply_load, run_loop
from lossgrad.errors import Overloaded
from tests.client.peer import Peer, Refused, status


@given(st.lists(st.floats(1e-7, 100.0), min_size=1), st.floats(0.1, 100.0))
def test_percentiles_are_those_of_numpy(seconds: list[float], percent: float) -> None:
    expected = np.percentile(seconds, percent, method="inverted_cdf")
    assert Latencies(seconds).percentile(percent) == expected


def test_latencies_are_summarised() -> None:
    latencies = Latencies([0.001, 0.0011, 0.01, 0.1])
    assert (latencies.max, len(latencies)) == (0.1, 4)
    assert latencies.mean == pytest.approx(0.028025)
    # Five buckets to a decade; a bound belongs to its bucket.
    assert [count for _, count in latencies.buckets()] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert latencies.buckets()[0][0] == pytest.approx(0.001)
    assert latencies.histogram()[0] == f"  1.00 ms          1  {'#' * 40}"
    assert latencies.to_dict()["p50"] == 0.0011
    empty = Latencies()
    assert math.isnan(empty.percentile(50))
    assert (empty.buckets(), empty.histogram(), empty.to_dict()["max"]) == ([], [], None)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1e-6, "1.00 us"),
        (0.000_012_345, "12.3 us"),
        (0.000_999_4, "999 us"),
        (0.000_999_6, "1.00 ms"),
        (0.009_996, "10.0 ms"),
        (0.25, "250 ms"),
        (12.0, "12.0 s"),
        (math.nan, "-"),
    ],
)
def test_durations_have_three_digits(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


class Stalling:
    """A server that answers at once, but for one stall, during which it answers nobody."""

    def __init__(self, stall_at: float, stall_seconds: float) -> None:
        self.begin = time.perf_counter()
        self._from = self.begin + stall_at
        self._until = self._from + stall_seconds
        self.count = 0

    async def __call__(self) -> Any:
        self.count += 1
        if self._from <= time.perf_counter() < self._until:
            await asyncio.sleep(self._until - time.perf_counter())
        return type("Answer", (), {"timing": TIMING})()


TIMING = type("Timing", (), dict.fromkeys((f"{s}_seconds" for s in ("queue", "pack", "compute", "unpack")), 1e-6))
TIMING.batch_request_count = 3  # type: ignore[attr-defined]


async def run_against_a_stall(under: Load) -> Run:
    return await apply_load(under, Stalling(0.1, 0.3), warm_up=0.0, seconds=0.6, seed=1)


def test_at_a_rate_a_stall_is_charged_to_all_who_would_have_called_in_it() -> None:
    run = run_loop(run_against_a_stall(Load(rate=200, evenly=True)))
    assert run.request_count == pytest.approx(120, abs=2)
    # 60 requests were meant for the stall of 0.3 s; they wait 0.15 s in the mean, and half of them longer than that.
    waited = sum(1 for seconds in run.latencies._seconds if seconds > 0.15)
    assert 25 <= waited <= 40
    assert run.latencies.max == pytest.approx(0.3, abs=0.1)
    assert run.mean_stages()["compute"] == pytest.approx(1e-6)
    assert run.batch_requests == 3 * len(run.latencies)


def test_with_callers_in_flight_only_they_meet_the_stall() -> None:
    run = run_loop(run_against_a_stall(Load(in_flight=2)))
    assert sum(1 for seconds in run.latencies._seconds if seconds > 0.15) == 2


def test_time_spent_sending_late_counts_and_is_told() -> None:
    async def block() -> Any:
        time.sleep(0.02)  # noqa: ASYNC251 - the process itself is slow
        return type("Answer", (), {"timing": TIMING})()

    run = run_loop(apply_load(Load(rate=100, evenly=True), block, warm_up=0.0, seconds=0.3, seed=1))
    assert run.request_count == pytest.approx(30, abs=1)
    assert run.lateness.max > 0.1
    assert run.latencies.max >= run.lateness.max


def test_the_warm_up_is_not_measured() -> None:
    server = Stalling(0.0, 0.5)
    run = run_loop(apply_load(Load(rate=500), server, warm_up=0.7, seconds=0.2, seed=3))
    assert run.latencies.max < 0.4  # the stall took 0.5 s, and a busy machine takes some of its own
    assert run.request_count == len(run.latencies) < server.count


def test_gaps_have_the_rate_and_the_spread_that_was_asked_for() -> None:
    gaps = Load(rate=50).gaps(random.Random(0))
    drawn = [next(gaps) for _ in range(20_000)]
    assert np.mean(drawn) == pytest.approx(0.02, rel=0.03)
    assert np.std(drawn) == pytest.approx(0.02, rel=0.05)  # of the exponential distribution
    assert next(Load(rate=50, evenly=True).gaps(random.Random(0))) == 0.02


def test_what_is_not_answered_is_counted_by_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> Any:
        raise Overloaded("full", grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")

    run = run_loop(apply_load(Load(rate=200), refuse, warm_up=0.0, seconds=0.1, seed=1))
    assert run.errors["QUEUE_FULL"] == run.request_count > 0

    async def hang() -> Any:
        await asyncio.sleep(0.2)
        return type("Answer", (), {"timing": TIMING})()

    monkeypatch.setattr(load, "MAX_OUTSTANDING", 5)
    run = run_loop(apply_load(Load(rate=200, evenly=True), hang, warm_up=0.0, seconds=0.1, seed=1))
    assert (len(run.latencies), run.errors[load.NOT_SENT]) == (5, run.request_count - 5)


def run_bench(target: str, arguments: str) -> int:
    return main(["bench", "--target", target, "--seconds", "0.2", "--warm-up", "0", *arguments.split()])


def test_it_prints_a_line_for_each_load_and_a_histogram(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(target, "--rate 50 --in-flight 2 --loss l1 --loss mse --gradient --shape 4x3 --dtype float64") == 0
    out = capsys.readouterr().out
    assert out.startswith("l1, mse with gradient of 4x3 float64, 1 connection, 0.2 s each; server 1.2.3 on cpu\n")
    head, first, second = out.splitlines()[2:5]
    assert head.split()[:3] == ["load", "answers/s", "p50"]
    assert first.startswith("50/s ")
    assert second.startswith("2 in flight ")
    assert "queue 1.00 us, pack 2.00 us, compute 3.00 us, unpack 4.00 us" in out
    assert "#####" in out


def test_as_json_everything_is_in_seconds(target: str, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(target, "--in-flight 2 --unary --json --connections 2") == 0
    result = json.loads(capsys.readouterr().out)
    (run,) = result["runs"]
    assert result["server"]["determinism"] == "peer"
    assert result["request"]["shape"] == [1024]
    assert run["in_flight"] == 2
    assert run["requests"] == run["latency"]["count"] > 0
    assert 0 < run["latency"]["p50"] <= run["latency"]["p99"] <= run["latency"]["max"] < 1
    assert sum(bucket["count"] for bucket in run["latency"]["histogram"]) == run["requests"]
    assert run["mean_stages"]["compute"] == pytest.approx(3e-6)
    assert peer.streams == 0


def test_failed_requests_are_counted_and_exit_1(target: str, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> None:
        if len(peer.requests) > 1:  # the first one tries whether the server takes such requests at all
            raise Refused(status(grpc.StatusCode.UNAVAILABLE, "full", reason="QUEUE_FULL"))

    peer.fail = fail
    assert run_bench(target, "--in-flight 1") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lossgrad: ")
    assert captured.err.count("\n") == 1
    assert "requests failed: " in captured.err
    assert "QUEUE_FULL" in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--rate 0", "--rate is 0; it must be above 0"),
        ("--rate inf", "--rate is inf; it must be above 0"),
        ("--in-flight -1", "--in-flight is -1; it must be above 0"),
        ("--in-flight 1.5", "argument --in-flight: invalid int value: '1.5'"),
        ("--seconds nan", "--seconds is nan; it must be above 0"),
        ("--warm-up -1", "--warm-up is -1.0; give seconds, at least 0"),
        ("--connections 0", "--connections is 0; it must be above 0"),
        ("--shape 3x", "--shape is '3x'; give extents such as 4096 or 64x3x32x32"),
        ("--dtype int8", "--dtype is 'int8'; give one of float16, float32, float64"),
        ("--loss l2", "--loss 'l2' names no loss"),
        ("--timeout 0", "timeout is 0.0 seconds; it must be above 0"),
        ("--arrivals never", "argument --arrivals: invalid choice: 'never'"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(
    arguments: str, says: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(target, arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert says in captured.err


def test_without_a_server_it_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench("127.0.0.1:1", "") == 3
    assert capsys.readouterr().err.count("\n") == 1
