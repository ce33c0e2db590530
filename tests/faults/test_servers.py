"""Servers that die, freeze, run out of something, or are started with a mistake (R04, R05, R14, R15, R29, R34, R36)."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lossgrad
from tests.faults.load import percentile
from tests.faults.programs import serving
from tests.faults.resources import descriptors, processor_seconds
from tests.server.program import Program
from tests.server.serving import eventually

FLAGS = ("--port=0", "--metrics-port=-1", "--threads=1")
X, Y = np.linspace(-2, 2, 64, dtype=np.float32), np.zeros(64, np.float32)


@pytest.fixture
def served() -> Iterator[tuple[Program, str]]:
    with serving(Program(*FLAGS)) as started:
        yield started


@pytest.mark.parametrize(("elements", "callers"), [(128, 8), (1 << 20, 3)], ids=["1 KiB", "8 MiB"])
def test_r04_one_of_two_servers_is_killed_and_no_caller_sees_an_error(elements: int, callers: int) -> None:
    first, second = Program(*FLAGS), Program(*FLAGS)
    done = threading.Event()
    failures: list[Exception] = []
    times: list[float] = []
    input, target = np.full(elements, 3, np.float32), np.ones(elements, np.float32)
    try:
        address = f"ipv4:{first.address()},{second.address()}"

        def call() -> None:
            with lossgrad.LossClient(address) as client:
                while not done.is_set():
                    try:
                        assert client.l1(input, target).value == 2.0
                        times.append(time.monotonic())
                    except Exception as error:
                        failures.append(error)

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(times) > 30)
        time.sleep(1.5)
        killed_at = time.monotonic()
        first.signal(signal.SIGKILL)
        time.sleep(3)
        done.set()
        for thread in threads:
            thread.join()
    finally:
        first.close()
        second.close()
    before = sum(killed_at - 1 <= at < killed_at for at in times)
    after = sum(killed_at + 2 <= at < killed_at + 3 for at in times)
    print(
        f"\nkilled one of two, {elements * 8} bytes a call: {len(failures)} errors; {before} calls a second, then {after}"
    )
    assert not failures, failures[0]
    assert after >= 0.4 * before


def test_r05_a_frozen_server_costs_callers_their_deadline_and_serves_when_it_thaws(served: tuple[Program, str]) -> None:
    program, address = served
    with lossgrad.LossClient(address) as client:
        for _ in range(30):  # it knows its pace, which the frozen second must not spoil
            client.l1(X, Y)
        program.signal(signal.SIGSTOP)
        lateness: list[float] = []

        def call() -> None:
            began = time.monotonic()
            with pytest.raises(lossgrad.DeadlineExceeded):
                client.l1(X, Y, timeout=1)
            lateness.append(time.monotonic() - began - 1)

        callers = [threading.Thread(target=call) for _ in range(9)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        late = percentile(sorted(lateness), 50)  # the machine's own pauses are not the server's
        program.signal(signal.SIGCONT)
        began = time.monotonic()
        client.l1(X, Y, timeout=5)
        thawed = time.monotonic() - began
    print(
        f"\nfrozen: callers fail {late * 1e3:.0f} ms after their deadline; served {thawed * 1e3:.0f} ms after it thawed"
    )
    assert len(lateness) == 9
    assert abs(late) < 0.1
    assert thawed < 1


def test_r14_without_descriptors_callers_are_served_and_new_ones_once_there_are_some(
    served: tuple[Program, str],
) -> None:
    program, address = served
    pid = program.process.pid
    with lossgrad.LossClient(address) as client:
        client.l1(X, Y)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid) + 3, limits[1]))
        host, _, port = address.rpartition(":")
        sockets = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
        processor, began = processor_seconds(pid), time.monotonic()
        for _ in range(20):
            client.l1(X, Y, timeout=5)
            time.sleep(0.1)
        busy = (processor_seconds(pid) - processor) / (time.monotonic() - began)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        for one in sockets:
            one.close()
        began = time.monotonic()
        with lossgrad.LossClient(address) as another:
            another.l1(X, Y, timeout=15)
        seconds = time.monotonic() - began
    print(
        f"\nno descriptors left: callers served at {busy:.0%} of a core; a new one {seconds:.1f} s after there were some"
    )
    assert seconds < 10
    assert busy < 0.2


def test_r15_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "lossgrad_server", "--device=cpu", "--log-level=debug", *FLAGS],
            stdout=subprocess.PIPE,
            stderr=full,  # every write fails: no space left on device
            text=True,
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("lossgrad-server ready on ").split(", ")[0]
        with lossgrad.LossClient(address) as client:
            for _ in range(50):
                assert client.l1(X, X).value == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_r34_slow_scrapes_hold_up_no_caller() -> None:
    with serving(Program("--port=0", "--metrics-port=0", "--threads=1")) as (program, address):
        port = free_metrics_port(program)
        # A call for each: after a pause, opening a stream would be what is measured, and not the server.
        with lossgrad.LossClient(address, coalesce=False) as client:
            calls(client, 100)
            # By turns, and the best of each: what else the machine does comes to both.
            alone, stalled = math.inf, math.inf
            for _ in range(8):
                alone = min(alone, calls(client, 100))
                with contextlib.ExitStack() as scrapes:
                    for _ in range(10):
                        one = scrapes.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")  # and reads nothing of the answer
                    wait_until_idle(program.process.pid)  # all that is left of them is that nobody reads
                    stalled = min(stalled, calls(client, 100))
    print(f"\n10 stalled scrapes: calls' p99 {alone * 1e3:.2f} ms alone, {stalled * 1e3:.2f} ms beside them")
    assert stalled <= 1.2 * alone + 0.0005  # the last is the resolution of a busy machine


def wait_until_idle(pid: int) -> None:
    """Wait until a process has done nothing for a fifth of a second."""
    before = -1.0
    while (now := processor_seconds(pid)) != before:
        before = now
        time.sleep(0.2)


def calls(client: lossgrad.LossClient, count: int) -> float:
    """Return the seconds within which 99 of 100 calls are answered."""
    seconds = []
    for _ in range(count):
        began = time.monotonic()
        client.l1(X, Y, timeout=5)
        seconds.append(time.monotonic() - began)
    return percentile(sorted(seconds), 98.5)


def free_metrics_port(program: Program) -> int:
    """Return the port of the metrics of a program that serves, from its log."""
    pid = program.process.pid
    links = [str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]
    for port in listening:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            one.settimeout(5)
            if one.recv(5) == b"HTTP/":
                return port
    raise AssertionError("it serves no metrics")


def processor_seconds_of_children() -> float:
    """Return the processor time of this process's ended children: what others do on the machine does not lengthen it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--port=nine"], {}, "--port"),
        (["--max-message-bytes=1"], {}, "--max-message-bytes"),
        ([], {"LOSSGRAD_THREADS": "many"}, "LOSSGRAD_THREADS"),
        (["--host=0.0.0.0"], {}, "--insecure"),
        (["--tls-cert=/nowhere.pem", "--tls-key=/nowhere.key"], {}, "/nowhere"),
        (["--token-file=/nowhere"], {}, "/nowhere"),
        (["--port={taken}"], {}, "--port"),
        (["--metrics-port={taken}"], {}, "--metrics-port"),
        (["--device=cuda:7"], {}, "--device"),
    ],
)
def test_r36_a_setting_that_cannot_be_used_ends_it_before_it_serves(
    flags: list[str], environment: dict[str, str], named: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = processor_seconds_of_children()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lossgrad_server", "--device=cpu", "--port=0", "--metrics-port=-1"),
                *(flag.format(taken=port) for flag in flags),
            ],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        seconds = processor_seconds_of_children() - used
    said = [line for line in done.stderr.splitlines() if line.startswith("lossgrad-server: ")]
    print(f"\n{flags or environment}: ended with {done.returncode} after {seconds:.1f} s of a core")
    assert done.returncode == 2
    assert len(said) == 1
    assert named in said[0]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # Of a core, and not by the clock of a machine that others use too. Most of it is loading torch, where it is needed.
    assert seconds < 5
