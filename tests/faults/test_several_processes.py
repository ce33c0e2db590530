"""A server with several processes of which one is killed, frozen, or told to go, under load; and one that always dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lossgrad
from tests.server.processes.several import SeveralProgram, is_there, scrape, total
from tests.server.program import ROOT
from tests.server.serving import eventually

pytestmark = pytest.mark.faults

CALLERS = 8
INPUT, TARGET = np.linspace(-2, 2, 3000, dtype=np.float32), np.zeros(3000, np.float32)
DIFFERENCE = np.abs(np.linspace(-2, 2, 3000, dtype=np.float32).astype(np.float64))
EXPECTED = float(np.where(DIFFERENCE < 1, DIFFERENCE**2 / 2, DIFFERENCE - 0.5).mean())


class Load:
    """Callers with a connection each, unary and streams, until it is stopped. Each answer is held against arithmetic."""

    def __init__(self, address: str) -> None:
        self.answered = 0
        self.failures: list[Exception] = []
        self._address = address
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(index,)) for index in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self, index: int) -> None:
        with lossgrad.LossClient(self._address) as client:
            while not self._done.is_set():
                try:
                    if index % 2:
                        losses = [client.smooth_l1(INPUT, TARGET, gradient=True).loss]
                    else:
                        losses = [each.loss for each in client.stream([(INPUT, TARGET)] * 5, lossgrad.SmoothL1())]
                    assert all(abs(loss - EXPECTED) < 1e-6 for loss in losses), losses
                    with self._lock:
                        self.answered += len(losses)
                except Exception as error:
                    self.failures.append(error)

    def more(self) -> None:
        """Wait for more answers."""
        enough = self.answered + 200
        eventually(lambda: self.answered >= enough)

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        assert not self.failures, f"{len(self.failures)} of {self.answered} failed, the first: {self.failures[0]!r}"


def has_gone(pid: int) -> bool:
    return not is_there(pid)


@pytest.fixture
def program() -> Iterator[SeveralProgram]:
    started = SeveralProgram(2, "--log-format=text", "--drain-delay-seconds=0.5")
    yield started
    started.close()


def test_one_of_two_is_killed_again_and_again_and_no_caller_sees_an_error(program: SeveralProgram) -> None:
    address, metrics = program.addresses()
    load = Load(address)
    counted: list[float] = []

    def look() -> None:
        counted.append(total(scrape(metrics), "lossgrad_requests_total", outcome="ok"))

    seconds: list[float] = []
    try:
        for index in range(3):
            load.more()
            look()
            victim = program.children()[index % 2]
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            load.more()  # with the other
            look()
            eventually(lambda: total(scrape(metrics), "lossgrad_process_restarts_total") == len(seconds) + 1)
            seconds.append(time.monotonic() - began)
            eventually(lambda: len(program.children()) == 2)
            assert not is_there(victim)
            look()
        load.more()
    finally:
        load.stop()
    look()
    load.check()
    assert counted == sorted(counted)  # no sum ever fell
    program.signal(signal.SIGTERM)
    assert program.end() == 0
    print(f"\nkilled one of two, three times: {load.answered} answers, no error; another served after {seconds} s")


def test_one_that_is_told_to_go_drains_and_is_replaced_and_no_call_fails(program: SeveralProgram) -> None:
    address, metrics = program.addresses()
    load = Load(address)
    try:
        load.more()
        for child in program.children():
            os.kill(child, signal.SIGTERM)
            load.more()
            eventually(partial(has_gone, child))
            eventually(lambda: total(scrape(metrics), "lossgrad_process_up") == 2)
            load.more()
    finally:
        load.stop()
    load.check()
    assert sum("ended with exit code 0; starting another" in line for line in program.logged) == 2


def test_one_that_is_frozen_is_replaced_after_a_minute_and_scrapes_go_on(program: SeveralProgram) -> None:
    address, metrics = program.addresses()
    frozen, _ = program.children()
    os.kill(frozen, signal.SIGSTOP)
    try:
        shown = scrape(metrics)
        assert shown("lossgrad_ready") == 1
        began = time.monotonic()
        deadline = began + 90
        while not any("has given no sign of life for 60.0 s; killing it" in line for line in program.logged):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        eventually(lambda: total(scrape(metrics), "lossgrad_process_restarts_total") == 1)
    finally:
        if is_there(frozen):
            os.kill(frozen, signal.SIGCONT)
    with lossgrad.LossClient(address) as client:
        assert client.l1(INPUT, INPUT).loss == 0
    print(f"\na frozen process was replaced after {time.monotonic() - began:.0f} s")


def test_one_that_dies_at_every_start_is_tried_ever_less_often_and_the_other_serves(tmp_path: Path) -> None:
    marker = tmp_path / "no more"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if 'lossgrad_server.processes.child' in sys.orig_argv and os.path.exists({str(marker)!r}):\n"
        "    os._exit(9)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = SeveralProgram(2, "--log-format=text", PYTHONPATH=paths)
    try:
        address, metrics = program.addresses()
        marker.touch()
        os.kill(program.children()[0], signal.SIGKILL)
        time.sleep(8)
        attempts = sum("ended with exit code 9 before it served" in line for line in program.logged)
        assert 2 <= attempts <= 5  # at 0, 0.5, 1.5, 3.5 and 7.5 s
        with lossgrad.LossClient(address) as client:
            assert client.l1(INPUT, INPUT).loss == 0
        shown = scrape(metrics)
        assert total(shown, "lossgrad_process_up") == 1
        assert shown("lossgrad_ready") == 1
        marker.unlink()
        eventually(lambda: total(scrape(metrics), "lossgrad_process_up") == 2)
        program.signal(signal.SIGTERM)
        assert program.end() == 0
    finally:
        program.close()
