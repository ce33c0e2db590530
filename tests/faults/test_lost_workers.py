"""The device's process dies, hangs, loses its device, or is ended by a request; the server stays (R01 to R03, R30, R31)."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import lossgrad
from lossgrad_server.isolation.memory import why_impossible
from tests.faults.load import percentile
from tests.faults.programs import serving
from tests.server.isolation.failing_nursery import EXITS_AT, LOSES_DEVICE_AT
from tests.server.program import Program
from tests.server.serving import eventually

LIMIT_SECONDS = 2.0
CALLERS = 40


class Served:
    """A running server, its metrics, and its device's process."""

    def __init__(self, program: Program) -> None:
        self.program = program
        line = program.ready_line().removeprefix("lossgrad-server ready on ")
        self.address, metrics = line.split(", ")
        self.metrics_url = metrics.removeprefix("metrics ")

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:  # noqa: S310
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def process(self) -> int:
        """Wait until the device has a process; return its id."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [child for nursery in children_of(self.program.process.pid) for child in children_of(nursery)]
            return len(found) == 1 and self.metric("lossgrad_worker_up") == 1

        eventually(look)
        return found[0]


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    if reason := why_impossible():
        pytest.skip(reason)
    program = Program(
        *("--port=0", "--metrics-port=0", "--threads=1", "--isolation=process"),
        *(f"--worker-timeout-seconds={LIMIT_SECONDS}", "--log-format=text"),
        program=("-m", "tests.faults.failing_server"),
    )
    with serving(program, knows_address=True):
        yield Served(program)


class Callers:
    """Callers that ask, each for numbers of its own, and count what they are told. An answer to another call is seen."""

    def __init__(self, address: str, count: int = CALLERS, **settings: float) -> None:
        self.times: list[tuple[float, float]] = []  # when it ended, and how long it took
        self.counts = [0] * count  # how many each caller has made
        self.errors: list[lossgrad.LossgradError] = []
        self.wrong: list[object] = []
        self._done = threading.Event()
        self._address = address
        self._settings = settings
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(count)]

    def _call(self, number: int) -> None:
        x, y = np.full(50 + number, 3 + number, np.float32), np.zeros(50 + number, np.float32)
        with lossgrad.LossClient(self._address) as client:
            while not self._done.is_set():
                began = time.monotonic()
                try:
                    result = client.l1(x, y, gradient=True, **self._settings)  # type: ignore[arg-type]
                except lossgrad.LossgradError as error:
                    self.errors.append(error)
                    time.sleep(0.01)
                else:
                    if result.value != 3 + number or not np.all(result.gradient == np.float32(1 / (50 + number))):
                        self.wrong.append(result)
                self.times.append((time.monotonic(), time.monotonic() - began))
                self.counts[number] += 1

    def wait_for_everybody(self) -> None:
        """Wait until every caller has made a call that began after this was called."""
        wanted = [count + 2 for count in self.counts]
        eventually(lambda: all(count >= least for count, least in zip(self.counts, wanted, strict=True)))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.times) > 2 * len(self._threads))
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def test_r01_a_process_that_is_killed_while_idle_is_replaced_before_anybody_asks(served: Served) -> None:
    lost, restarts = served.metric("lossgrad_worker_lost_total"), served.metric("lossgrad_worker_restarts_total")
    first = served.process()
    began = time.monotonic()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: served.metric("lossgrad_worker_restarts_total") == restarts + 1)
    seconds = time.monotonic() - began
    with grpc.insecure_channel(served.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    with lossgrad.LossClient(served.address, retries=0) as client:
        assert client.l1(np.ones(5, np.float32), np.zeros(5, np.float32)).value == 1
    print(f"\nkilled while idle: another process after {seconds * 1e3:.0f} ms")
    assert served.process() != first
    assert served.metric("lossgrad_worker_lost_total") == lost + 1
    assert sum("is lost (killed)" in line for line in served.program.logged) >= 1


def test_r02_a_process_that_is_killed_under_load_costs_no_caller_an_error_or_a_wrong_number(served: Served) -> None:
    restarts = served.metric("lossgrad_worker_restarts_total")
    kills = 4
    with Callers(served.address) as callers:
        for number in range(kills):
            os.kill(served.process(), signal.SIGKILL)
            eventually(lambda number=number: served.metric("lossgrad_worker_restarts_total") == restarts + number + 1)  # type: ignore[misc]
            # Then no call meets more than one loss with its three attempts, however closely a busy machine puts the kills.
            callers.wait_for_everybody()
    took = sorted(seconds for _, seconds in callers.times)
    print(
        f"\nkilled {kills} times under {CALLERS} callers: {len(callers.times)} calls, {len(callers.errors)} errors, "
        f"p50 {percentile(took, 50) * 1e3:.0f} ms, longest {took[-1] * 1e3:.0f} ms"
    )
    assert callers.wrong == []
    assert callers.errors == []


def test_r03_a_process_that_hangs_is_killed_and_nobody_waits_beyond_their_deadline(served: Served) -> None:
    hung = served.metric("lossgrad_worker_lost_total")
    timeout = 1.0
    with Callers(served.address, 8, timeout=timeout) as callers:
        process = served.process()
        began = time.monotonic()
        os.kill(process, signal.SIGSTOP)
        eventually(lambda: served.metric("lossgrad_worker_lost_total") == hung + 1)
        killed = time.monotonic() - began
        served.process()
        calls = len(callers.times)
        eventually(lambda: len(callers.times) > calls + 16)
    late = max(seconds for _, seconds in callers.times) - timeout
    codes = {error.code for error in callers.errors}
    print(
        f"\nfrozen: killed after {killed:.1f} s, the limit is {LIMIT_SECONDS} s; {len(callers.errors)} callers failed, "
        f"none later than {max(late, 0) * 1e3:.0f} ms after its deadline"
    )
    assert callers.wrong == []
    assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    assert killed < 2 * LIMIT_SECONDS + 1  # the batch before it may have begun just then
    assert late < 0.5  # 0.2 is promised; the machine that tests run on is busy
    assert sum("has hung" in line for line in served.program.logged) == 1


@pytest.mark.parametrize(("count", "row"), [(LOSES_DEVICE_AT, "r30"), (EXITS_AT, "r31")], ids=["r30", "r31"])
def test_r30_and_r31_a_request_that_ends_the_process_is_refused_alone(served: Served, count: int, row: str) -> None:
    """R30: the device is lost for good, as a CUDA context is. R31: the process ends."""
    served.process()
    restarts = served.metric("lossgrad_worker_restarts_total")
    crashing = served.metric("lossgrad_worker_crashing_requests_total")
    with Callers(served.address, 16) as callers, lossgrad.LossClient(served.address) as client:
        with pytest.raises(lossgrad.ServerError) as caught:
            client.l1(np.ones(count, np.float32), np.zeros(count, np.float32))
        served.process()
        calls = len(callers.times)
        eventually(lambda: len(callers.times) > calls + 16)
    cost = served.metric("lossgrad_worker_restarts_total") - restarts
    print(
        f"\n{row}: refused alone, {cost:.0f} processes; {len(callers.times)} other calls, {len(callers.errors)} errors"
    )
    assert caught.value.reason == "WORKER_CRASHED"
    assert callers.wrong == []
    assert callers.errors == []
    assert cost <= 4
    assert served.metric("lossgrad_worker_crashing_requests_total") == crashing + 1


def test_callers_that_do_not_retry_are_told_when_to_come_back(served: Served) -> None:
    """While there is no process: UNAVAILABLE at once, with the push-back that gRPC's own retries honour."""
    x, y = np.ones(5, np.float32), np.zeros(5, np.float32)
    found: list[lossgrad.Unavailable] = []
    with lossgrad.LossClient(served.address, retries=0) as client:

        def call_while_it_is_replaced() -> bool:
            os.kill(served.process(), signal.SIGKILL)
            try:
                for _ in range(200):
                    client.l1(x, y)
            except lossgrad.Unavailable as error:
                found.append(error)
            return bool(found)

        eventually(call_while_it_is_replaced)
    (error,) = found
    assert error.reason == "WORKER_RESTARTING"
    assert error.retry_after is not None
    assert 0.05 <= error.retry_after <= 5


def test_a_server_that_is_killed_leaves_no_process_behind_and_one_that_drains_neither() -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        program = Program("--port=0", "--metrics-port=0", "--isolation=process", "--drain-delay-seconds=0")
        with serving(program, knows_address=True):
            one = Served(program)
            process = one.process()
            nurseries = children_of(program.process.pid)
            program.signal(number)
            code = program.process.wait(30)
            assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
            eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (process, *nurseries)))  # noqa: B023
            assert not any("Traceback" in line for line in program.logged)
