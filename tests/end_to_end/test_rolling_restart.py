"""Two servers behind client-side balancing are restarted one after the other under load, and no call fails."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import lossgrad
from tests.prometheus import free_port
from tests.server.program import Program

CALLERS = 4
INPUT, TARGET = np.linspace(-2, 2, 2000, dtype=np.float32), np.zeros(2000, np.float32)


@pytest.fixture
def start() -> Iterator[Callable[[int], Program]]:
    programs: list[Program] = []

    def run(port: int) -> Program:
        programs.append(Program("--port", str(port), "--metrics-port", "-1", "--threads", "1"))
        return programs[-1]

    yield run
    for program in programs:
        program.close()


class Load:
    """Calls of every kind, by several threads, until it is stopped."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.calls = 0
        self.failures: list[Exception] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(index,)) for index in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self, index: int) -> None:
        with lossgrad.LossClient(self.target) as client:
            expected = client.smooth_l1(INPUT, TARGET).loss
            while not self._done.is_set():
                try:
                    if index % 2:
                        results = [client.smooth_l1(INPUT, TARGET, gradient=True)]
                    else:
                        results = list(client.stream([(INPUT, TARGET)] * 5, lossgrad.SmoothL1()))
                    assert all(result.loss == expected for result in results)
                    self.calls += 1
                except Exception as error:
                    self.failures.append(error)

    def go_on_for(self, seconds: float) -> None:
        """Wait; there must be calls meanwhile."""
        before = self.calls
        time.sleep(seconds)
        assert self.calls > before, "no call came back"

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
def test_a_rolling_restart_fails_no_call(start: Callable[[int], Program]) -> None:
    ports = [free_port(), free_port()]
    programs = [start(port) for port in ports]
    for program in programs:
        program.address()
    load = Load("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports))
    try:
        load.go_on_for(1)
        for index, port in enumerate(ports):
            programs[index].signal(signal.SIGTERM)
            assert programs[index].end() == 0, "".join(programs[index].logged)
            load.go_on_for(0.5)  # with one server
            programs[index] = start(port)
            programs[index].address()
            load.go_on_for(2)  # until the clients have found it again
    finally:
        load.stop()
    assert not load.failures, f"{len(load.failures)} of {load.calls} failed, the first: {load.failures[0]!r}"
    assert load.calls > 100
