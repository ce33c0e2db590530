"""Evaluations whose connections are cut, and whose servers are killed, in the middle: the bits of an undisturbed one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lossgrad
from lossgrad import AsyncLossClient, LossClient
from tests.faults.proxy import Proxy
from tests.server.program import Program
from tests.server.serving import RunningServer

FLAGS = ("--metrics-port=-1", "--threads=1")
LOSSES = (lossgrad.SmoothL1(beta=0.5), lossgrad.MSE(reduction="sum"), lossgrad.Huber(delta=2.0))
RANDOM = np.random.default_rng(6)
INPUT, TARGET = (RANDOM.normal(size=(160, 1024)).astype(np.float32) for _ in range(2))
WEIGHT = RANDOM.random((160, 1024)).astype(np.float32)
# How much is under way: a tenth of a run, so that at any fault some batches are done, some sent, and most not even read.
OPTIONS: dict[str, Any] = {"in_flight_bytes": 1 << 20, "slice_bytes": 200_000, "per_batch": True}


class Batches:
    """Batches of all sizes, of which some travel packed, some alone, some cut. `faults` happen when one is read."""

    def __init__(self, faults: dict[int, Callable[[], None]] | None = None) -> None:
        self._faults = faults or {}
        self.answered = 0
        self.answered_at_faults: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for index in range(80):
            if index in self._faults:
                self.answered_at_faults.append(self.answered)
                self._faults[index]()
            rows = slice(index, index + (1, 7, 30, 80)[index % 4])
            yield INPUT[rows], TARGET[rows], {"weight": WEIGHT[rows], "group": index % 3}

    async def __aiter__(self) -> Any:
        for batch in iter(self):
            yield batch

    def count(self, _: lossgrad.BatchResult) -> None:
        self.answered += 1


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> lossgrad.EvaluationReport:
    with LossClient(server.address) as client:
        return client.evaluate(Batches(), LOSSES, **OPTIONS)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each stream that is opened."""
    streams: list[str] = []
    for kind in (LossClient, AsyncLossClient):
        own = kind._open_stream

        def note(self: Any, *messages: Any, own: Any = own, **options: Any) -> Any:
            streams.append(self._settings.target)
            return own(self, *messages, **options)

        monkeypatch.setattr(kind, "_open_stream", note)
    return streams


def assert_is_undisturbed(
    report: lossgrad.EvaluationReport, batches: Batches, undisturbed: lossgrad.EvaluationReport
) -> None:
    assert report.accumulation == undisturbed.accumulation
    # Each batch was counted once, with its own bits.
    assert [batch.to_dict() for batch in report.batches] == [batch.to_dict() for batch in undisturbed.batches]
    assert batches.answered == len(report.batches)
    assert all(0 < answered < 80 for answered in batches.answered_at_faults), "the fault was not in the middle"


def evaluate(client: LossClient, batches: Batches, **options: Any) -> lossgrad.EvaluationReport:
    return client.evaluate(batches, LOSSES, on_batch=batches.count, **{**OPTIONS, **options})


def test_connections_that_are_reset_change_no_bit(
    server: RunningServer, opened: list[str], undisturbed: lossgrad.EvaluationReport
) -> None:
    with Proxy(server.address) as proxy:
        batches = Batches(dict.fromkeys((20, 21, 50, 79), proxy.reset))
        with LossClient(proxy.address) as client:
            report = evaluate(client, batches)
    assert_is_undisturbed(report, batches, undisturbed)
    assert len(opened) >= 3


async def test_connections_of_an_asyncio_client_that_are_reset_change_no_bit(
    server: RunningServer, opened: list[str], undisturbed: lossgrad.EvaluationReport
) -> None:
    with Proxy(server.address) as proxy:
        batches = Batches(dict.fromkeys((20, 50), proxy.reset))
        async with AsyncLossClient(proxy.address) as client:
            report = await client.evaluate(batches, LOSSES, on_batch=batches.count, **OPTIONS)
    assert_is_undisturbed(report, batches, undisturbed)
    assert len(opened) >= 2


def test_a_network_that_is_silent_for_a_while_changes_no_bit(
    server: RunningServer, opened: list[str], undisturbed: lossgrad.EvaluationReport
) -> None:
    with Proxy(server.address) as proxy:

        def cut() -> None:
            proxy.is_cut = True
            proxy._loop.call_soon_threadsafe(proxy._loop.call_later, 1.5, setattr, proxy, "is_cut", False)

        batches = Batches({30: cut})
        with LossClient(proxy.address) as client:
            report = evaluate(client, batches, timeout=0.5)
    assert_is_undisturbed(report, batches, undisturbed)
    assert len(opened) >= 3  # what was silent was given up, more than once


def test_a_network_that_stays_silent_ends_it_when_patience_does(server: RunningServer) -> None:
    with Proxy(server.address) as proxy:

        def cut() -> None:
            proxy.is_cut = True

        with (
            LossClient(proxy.address) as client,
            pytest.raises(lossgrad.Unavailable, match=r"nothing came from the server for 0\.2 s"),
        ):
            evaluate(client, Batches({30: cut}), timeout=0.2, patience=0.5)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_changes_no_bit(
    opened: list[str], undisturbed: lossgrad.EvaluationReport, tmp_path: Path
) -> None:
    socket = f"unix:{tmp_path / 'server'}"
    running = [Program("--host", socket, *FLAGS)]

    def kill() -> None:
        running[-1].signal(signal.SIGKILL)
        running.append(Program("--host", socket, *FLAGS))

    batches = Batches({35: kill})
    try:
        running[0].address()
        with LossClient(socket) as client:
            report = evaluate(client, batches)
    finally:
        for program in running:
            program.close()
    assert len(running) == 2
    assert len(opened) >= 2
    assert_is_undisturbed(report, batches, undisturbed)


@pytest.mark.slow
def test_one_of_two_servers_is_killed_and_the_other_does_the_rest_with_the_same_bits(
    server: RunningServer, opened: list[str], undisturbed: lossgrad.EvaluationReport
) -> None:
    program = Program("--port=0", *FLAGS)
    try:
        endpoints = [program.address(), server.address]
        batches = Batches({25: lambda: program.signal(signal.SIGKILL)})
        with LossClient(server.address) as client:
            report = evaluate(client, batches, endpoints=endpoints)
    finally:
        program.close()
    assert_is_undisturbed(report, batches, undisturbed)
    assert set(opened) == set(endpoints)
    assert {each.target for each in report.servers} == set(endpoints)
