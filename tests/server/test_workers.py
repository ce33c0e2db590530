"""Which worker the settings ask for, and what the server does while a device has no process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from prometheus_client import generate_latest

from lossgrad_server import engine, workers
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.embedded import EmbeddedServer
from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.metrics import Metrics
from lossgrad_server.workers import Outages, make_worker
from tests.server.scraping import Scrape


class NotedBatcher:
    """The part of a batcher that outages use."""

    def __init__(self) -> None:
        self.error: Callable[[], RequestError] | None = None

    def suspend(self, error: Callable[[], RequestError]) -> None:
        self.error = error

    def resume(self) -> None:
        self.error = None


class Fixture:
    """Outages, and what they did."""

    def __init__(self) -> None:
        self.metrics = Metrics(device="cpu", build_info={"version": "1"})
        self.metrics.worker_up.set(1)
        self.batcher = NotedBatcher()
        self.ready: list[bool] = []
        self.has_given_up = False
        batcher: Any = self.batcher
        self.outages = Outages(batcher, self.metrics, lambda callback: callback(), self.ready.append, self._give_up)

    def _give_up(self) -> None:
        self.has_given_up = True

    def metric(self, name: str, **labels: str) -> float | None:
        return Scrape(generate_latest(self.metrics.registry).decode())(name, device="cpu", **labels)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "OUTAGE_SECONDS", 0.0)


async def soon(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


async def test_a_short_outage_refuses_and_leaves_readiness_alone() -> None:
    one = Fixture()
    one.outages.worker_lost(Loss.KILLED)
    refusal = one.batcher.error
    assert refusal is not None
    error = refusal()
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.WORKER_RESTARTING)
    assert one.metric("lossgrad_worker_up") == 0
    one.outages.worker_replaced(0.1)
    assert one.batcher.error is None
    await asyncio.sleep(0)
    assert one.ready == []
    assert one.metric("lossgrad_worker_up") == 1
    assert one.metric("lossgrad_worker_lost_total", cause="killed") == 1
    assert one.metric("lossgrad_worker_lost_total", cause="hung") == 0
    assert one.metric("lossgrad_worker_restarts_total") == 1


@pytest.mark.usefixtures("quick")
async def test_a_long_outage_is_told_once_and_so_is_its_end() -> None:
    one = Fixture()
    for _ in range(2):
        one.outages.worker_lost(Loss.DEVICE)
        await soon(lambda: one.ready and not one.ready[-1])
        one.outages.worker_replaced(5.0)
    assert one.ready == [False, True, False, True]
    assert not one.has_given_up
    one.outages.worker_given_up()
    assert one.has_given_up


@pytest.mark.usefixtures("quick")
async def test_a_server_that_drains_is_not_made_ready_again() -> None:
    one = Fixture()
    one.outages.worker_lost(Loss.KILLED)
    await soon(lambda: one.ready)
    one.outages.end()
    one.outages.worker_replaced(1.0)
    one.outages.worker_lost(Loss.KILLED)
    await asyncio.sleep(0.01)
    assert one.ready == [False]


def test_the_cpu_has_a_thread_and_a_gpu_a_process_unless_they_are_told() -> None:
    for isolation in ("auto", "thread"):
        made = make_worker(ServerConfig(device="cpu", isolation=isolation), may_isolate=True)
        assert isinstance(made.worker, CpuWorker)
        assert made.gpu_uuid is None
    facts = mock.Mock(determinism="bits", gpu_uuid="GPU-1")
    with (
        mock.patch.object(engine, "is_gpu", return_value=True),
        mock.patch.object(workers, "IsolatedWorker", return_value=mock.Mock(facts=facts)) as isolated,
    ):
        made = make_worker(ServerConfig(device="cuda", worker_timeout_seconds=7.0), may_isolate=True)
    assert (made.determinism, made.gpu_uuid) == ("bits", "GPU-1")
    (settings, limit_seconds) = isolated.call_args.args
    assert (settings.device, limit_seconds) == ("cuda", 7.0)


def test_where_there_can_be_no_process_one_that_is_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "why_impossible", lambda: "it needs Linux")
    with pytest.raises(ConfigError, match="--isolation is 'process': it needs Linux"):
        make_worker(ServerConfig(device="cpu", isolation="process"), may_isolate=True)
    with mock.patch.object(engine, "is_gpu", return_value=True), pytest.raises(ConfigError, match="cuda:99"):
        make_worker(
            ServerConfig(device="cuda:99"), may_isolate=True
        )  # goes on to a thread, and there is no such device


def test_an_embedded_server_computes_in_its_client_s_process() -> None:
    with pytest.raises(ConfigError, match="embedded"):
        EmbeddedServer(isolation="process")
