"""More work than the device can do, work that comes too late, and work that nobody wants any more (R07, R09, R10)."""

from __future__ import annotations

import random
import time
from typing import Any

import grpc
import pytest

from lossgrad_api.codec import COMPUTE_LOSS
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server import engine
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.run import Run
from tests.faults.generator import Call, Load, message
from tests.faults.load import Generator, Report, percentile
from tests.faults.paced_server import PacedWorker
from tests.faults.programs import PacedProgram, serving
from tests.faults.resources import MIB, resident_bytes
from tests.server.calling import Connect, stub_on
from tests.server.requests import L1, request
from tests.server.serving import HeldWorker, StartServer, eventually

DEADLINE_SECONDS = 0.5


def overload(address: str, rate: float, seconds: float) -> Report:
    return Generator(Load(address, rate, seconds, DEADLINE_SECONDS)).report()


def is_accepted(call: Call) -> bool:
    return call.code == "OK"


def is_refused(call: Call) -> bool:
    return call.code == "UNAVAILABLE"


def check_overload(times: float, seconds: float, capacity: float) -> None:
    """Offer `times` the capacity, in requests a second; of those the two programs must need but a part of two cores."""
    with serving(PacedProgram(1e3 / capacity, "--port", "0", "--metrics-port", "-1")) as (program, address):
        normal = overload(address, 0.3 * capacity, 3)
        memory = resident_bytes(program.process.pid)
        report = overload(address, times * capacity, seconds)
        grown = resident_bytes(program.process.pid) - memory
        after = overload(address, 0.3 * capacity, 5)
    refused = [call for call in report.calls if is_refused(call)]
    pushed_back = sum(call.has_pushback for call in refused) / max(1, len(refused))
    accepted = report.seconds(is_accepted)
    refusals = report.seconds(is_refused)
    normal_p99 = percentile(normal.seconds(is_accepted), 99)
    late = [call for call in after.calls if call.began > 1 and call.seconds > normal_p99 + 0.05]
    print(
        f"\n{times:g}x overload: goodput {report.goodput:.0f} of {capacity:.0f} a second; accepted p50 "
        f"{percentile(accepted, 50) * 1e3:.0f} ms, p99 {percentile(accepted, 99) * 1e3:.0f} ms; refused p50 "
        f"{percentile(refusals, 50) * 1e3:.1f} ms, p99 {percentile(refusals, 99) * 1e3:.1f} ms, {pushed_back:.0%} with "
        f"push-back; {dict(report.codes())}; {grown / MIB:.1f} MiB more; after a second of rest p99 "
        f"{percentile(after.seconds(lambda call: call.began > 1), 99) * 1e3:.0f} ms, before {normal_p99 * 1e3:.0f} ms"
    )
    assert report.goodput >= 0.85 * capacity
    assert percentile(accepted, 99) <= DEADLINE_SECONDS
    assert percentile(refusals, 50) < 0.005
    assert percentile(refusals, 99) < 0.1  # the machine's own pauses
    assert pushed_back == 1
    assert set(report.codes()) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert after.codes() == {"OK": len(after.calls)}
    assert len(late) <= 0.02 * len(after.calls), late
    assert grown < 64 * MIB


@pytest.mark.slow
def test_r07_overload_by_three_costs_no_goodput() -> None:
    check_overload(3, 10, 100)


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_r07_overload_by_ten_for_half_a_minute_costs_no_goodput() -> None:
    check_overload(10, 30, 50)


def test_r09_tight_deadlines_cost_the_device_nothing_once_they_have_passed(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Batcher._begin
    begun, expired = 0, 0

    def spy(batcher: Batcher, batch: object, under_way: list[Run], *, is_large: bool) -> None:
        nonlocal begun, expired
        now = time.monotonic()
        for job in batch.jobs:  # type: ignore[attr-defined]
            begun += 1
            expired += job.deadline is not None and job.deadline + 0.001 < now  # a millisecond for forming the batch
        begin(batcher, batch, under_way, is_large=is_large)  # type: ignore[arg-type]

    monkeypatch.setattr(Batcher, "_begin", spy)
    running = start_server(worker=HeldWorker(PacedWorker(engine.create_worker("cpu", 1), 0.002)))
    call: Any = connect(running.address).unary_unary(COMPUTE_LOSS)
    chance = random.Random(9)
    waiting: list[Any] = []
    for first in range(0, 1000, 10):  # together they take the device 20 ms, the longest deadline
        waiting += [call.future(message(k, 64), timeout=chance.uniform(0.001, 0.02)) for k in range(first, first + 10)]
        codes = [one.code() for one in waiting]  # waits for the last
    right = [
        pb.ComputeLossResponse.FromString(one.result()).results[0].scalar == number
        for number, one in enumerate(waiting)
        if one.code() is grpc.StatusCode.OK
    ]
    counts = {code.name: codes.count(code) for code in set(codes)}
    print(f"\ntight deadlines: {counts}; {begun} computed, {expired} of them expired")
    assert expired == 0
    assert all(right)
    assert set(counts) <= {"OK", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert 20 < counts["OK"] < 980
    eventually(lambda: running.batcher.admitted_requests == 0)


def test_r10_mass_cancel_leaves_the_others_right_and_nothing_behind(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=4000)
    call = stub_on(connect(running.address)).ComputeLoss
    worker.hold()
    calls = [call.future(request([float(k)] * 8, [0.0] * 8, L1), timeout=60) for k in range(2000)]
    # None is lost on the way: left to itself, gRPC resets some of a burst of over a thousand calls.
    eventually(lambda: running.batcher.admitted_requests == 2000 or any(one.done() for one in calls))
    assert [one.code() for one in calls if one.done()] == []
    for one in calls[::2]:
        one.cancel()
    kept = calls[1::2]
    began = time.monotonic()
    eventually(lambda: running.batcher.admitted_requests <= 1000 + 256)  # the batch that runs may hold cancelled ones
    seconds = time.monotonic() - began
    worker.release()
    answers = [one.result(timeout=30).results[0].scalar for one in kept]
    eventually(lambda: running.batcher.admitted_requests == 0)
    print(f"\nmass cancel: 1000 of 2000 gone from the queue in {seconds * 1e3:.0f} ms, the others answered")
    assert answers == [float(k) for k in range(1, 2000, 2)]
    assert seconds < 1
