"""A server with several processes of which one is killed, frozen, told to go, or dies at every start; and whose parent is
told to go, or is killed. Under load of every kind of caller, none of which may see an error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lossgrad
from tests.server.processes.several import SeveralProgram, is_there, scrape, total
from tests.server.program import ROOT, Program
from tests.server.serving import PATIENCE_SECONDS, eventually

CALLERS = 8
INPUT, TARGET = np.linspace(-2, 2, 500, dtype=np.float32), np.zeros(500, np.float32)
DIFFERENCE = np.abs(INPUT.astype(np.float64))
EXPECTED = float(np.where(DIFFERENCE < 1, DIFFERENCE**2 / 2, DIFFERENCE - 0.5).mean())


class Load:
    """Callers with a connection each, until it is stopped. Each answer is held against arithmetic.

    In turn they make calls that share a kept stream, calls of their own, streams, and calls of asyncio.
    """

    def __init__(self, target: str, **options: Any) -> None:
        self.answered = 0
        self.failures: list[Exception] = []
        self._target = target
        self._options = options
        self._lock = threading.Lock()
        self._done = threading.Event()
        kinds = (self._call, partial(self._call, coalesce=False), self._stream, self._call_together)
        self._threads = [threading.Thread(target=kinds[index % len(kinds)]) for index in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self, **options: Any) -> None:
        with lossgrad.LossClient(self._target, **self._options, **options) as client:
            while not self._done.is_set():
                try:
                    self._note([client.smooth_l1(INPUT, TARGET, gradient=True).loss])
                except Exception as error:
                    self.failures.append(error)

    def _stream(self) -> None:
        with lossgrad.LossClient(self._target, **self._options) as client:
            while not self._done.is_set():
                try:
                    self._note([each.loss for each in client.stream([(INPUT, TARGET)] * 5, lossgrad.SmoothL1())])
                except Exception as error:
                    self.failures.append(error)

    def _call_together(self) -> None:
        async def call() -> None:
            async with lossgrad.AsyncLossClient(self._target, **self._options) as client:
                while not self._done.is_set():
                    try:
                        results = await asyncio.gather(*(client.smooth_l1(INPUT, TARGET) for _ in range(5)))
                        self._note([each.loss for each in results])
                    except Exception as error:
                        self.failures.append(error)

        asyncio.run(call())

    def _note(self, losses: list[Any]) -> None:
        assert all(abs(loss - EXPECTED) < 1e-6 for loss in losses), losses
        with self._lock:
            self.answered += len(losses)

    def more(self, count: int = 400) -> None:
        """Wait for more answers."""
        enough = self.answered + count
        eventually(lambda: self.answered >= enough)

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        assert not self.failures, f"{len(self.failures)} beside {self.answered} failed, the first: {self.failures[0]!r}"


def has_gone(pid: int) -> bool:
    return not is_there(pid)


@pytest.fixture
def program() -> Iterator[SeveralProgram]:
    started = SeveralProgram(2, "--log-format=text", "--drain-delay-seconds=0.5")
    yield started
    started.close()


@pytest.fixture
def other() -> Iterator[str]:
    """Give the address of another server, with one process."""
    started = Program("--port=0", "--metrics-port=-1", "--threads=1")
    yield started.address()
    started.close()


@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.faults)])
def test_one_of_two_is_killed_and_no_caller_sees_an_error(program: SeveralProgram, times: int) -> None:
    address, metrics = program.addresses()
    load = Load(address)
    counted: list[float] = []

    def look() -> None:
        counted.append(total(scrape(metrics), "lossgrad_requests_total", outcome="ok"))

    seconds: list[float] = []
    try:
        for index in range(times):
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
    shown = [round(each, 1) for each in seconds]
    print(f"\nkilled one of two: {load.answered} answers, no error; another served after {shown} s")


def test_sigterm_under_load_drains_with_0_and_no_call_fails(program: SeveralProgram, other: str) -> None:
    address, _ = program.addresses()
    load = Load(f"ipv4:{address},{other}")
    try:
        load.more()
        children = program.children()
        program.signal(signal.SIGTERM)
        began = time.monotonic()
        assert program.end() == 0
        seconds = time.monotonic() - began
        load.more()  # with the other server
    finally:
        load.stop()
    load.check()
    assert not any(map(is_there, children))
    assert not any(word in line for line in program.logged for word in ("WARNING", "ERROR", "Traceback"))
    print(f"\ndrained two processes under load in {seconds:.1f} s: {load.answered} answers, no error")


def test_when_the_parent_is_killed_the_processes_drain_and_no_call_fails(program: SeveralProgram, other: str) -> None:
    address, _ = program.addresses()
    load = Load(f"ipv4:{address},{other}")
    try:
        load.more()
        children = program.children()
        assert len(children) == 2
        program.signal(signal.SIGKILL)
        eventually(lambda: not any(map(is_there, children)))
        load.more()  # with the other server
    finally:
        load.stop()
    load.check()
    assert program.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert sum("The parent has died; draining" in line for line in program.logged) == 2


@pytest.mark.faults
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


@pytest.mark.faults
def test_one_that_is_frozen_is_replaced_after_a_minute_and_no_patient_caller_fails(program: SeveralProgram) -> None:
    address, metrics = program.addresses()
    frozen, _ = program.children()
    load = Load(address, timeout=110.0)
    try:
        load.more()
        os.kill(frozen, signal.SIGSTOP)
        began = time.monotonic()
        assert scrape(metrics)("lossgrad_ready") == 1
        while not any("has given no sign of life for 60.0 s; killing it" in line for line in program.logged):
            assert time.monotonic() < began + 100
            time.sleep(0.2)
        seconds = time.monotonic() - began
        eventually(lambda: total(scrape(metrics), "lossgrad_process_restarts_total") == 1)
        load.more()
    finally:
        if is_there(frozen):
            os.kill(frozen, signal.SIGCONT)
        load.stop()
    load.check()
    assert not is_there(frozen)
    print(f"\na frozen process was replaced after {seconds:.0f} s: {load.answered} answers, no error")


@pytest.mark.faults
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
