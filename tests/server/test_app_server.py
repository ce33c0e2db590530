"""A server's life, in this process: health from warm-up to drain, what a drain does to calls, ports that are taken."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossgrad_api.codec import SERVICE
from lossgrad_server import app, engine
from lossgrad_server.config import ConfigError, ServerConfig
from tests.server.calling import Connect, stub_on
from tests.server.requests import request
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

GOOD = request([1.0, 2.0], [3.0, 5.0])
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", SERVICE, "liveness")


def health(channel: grpc.Channel) -> list[int]:
    """Return what the server says of "", of the service and of its liveness."""
    stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    return [
        stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_SECONDS, wait_for_ready=True).status
        for name in NAMES
    ]


def drain(running: RunningServer) -> concurrent.futures.Future[None]:
    """Begin to drain a server."""
    return asyncio.run_coroutine_threadsafe(running.server.drain(), running._loop)


def is_ready(running: RunningServer) -> bool:
    return running.metrics.registry.get_sample_value("lossgrad_ready") == 1


class HeldDelay:
    """Stands in for the drain's delay: it lasts until the test ends it."""

    SECONDS = 12_345.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        sleep: Callable[..., Any] = asyncio.sleep

        async def held(delay: float, *more: Any) -> Any:
            if delay != self.SECONDS:
                return await sleep(delay, *more)
            self.begun.set()
            return await asyncio.get_running_loop().run_in_executor(None, self.may_end.wait, PATIENCE_SECONDS)

        monkeypatch.setattr(asyncio, "sleep", held)


# ---- Health ----


def test_health_is_not_serving_until_warm_and_alive_all_the_time(connect: Connect) -> None:
    worker = HeldWorker()
    worker.hold_warm_up()
    running = RunningServer(worker=worker, metrics_port=-1).start(wait=False)
    try:
        channel = connect(running.address)
        assert health(channel) == [NOT_SERVING, NOT_SERVING, SERVING]
        assert not is_ready(running)
        worker.release_warm_up()
        eventually(lambda: health(channel) == [SERVING] * 3)
        assert is_ready(running)
    finally:
        running.stop()


def test_health_of_an_unknown_name_is_not_found(server: RunningServer, connect: Connect) -> None:
    stub = health_pb2_grpc.HealthStub(connect(server.address))  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_while_balancers_take_notice_a_draining_server_serves_on(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_server(drain_delay_seconds=HeldDelay.SECONDS)
    delay = HeldDelay(monkeypatch)
    channel = connect(running.address)
    assert health(channel) == [SERVING] * 3
    draining = drain(running)
    assert delay.begun.wait(PATIENCE_SECONDS)
    assert health(channel) == [NOT_SERVING, NOT_SERVING, SERVING]
    assert not is_ready(running)
    assert stub_on(channel).ComputeLoss(GOOD).results
    assert not draining.done()
    delay.may_end.set()
    draining.result(PATIENCE_SECONDS)


# ---- Draining ----


def test_a_drain_finishes_what_is_in_flight_and_takes_no_new_connection(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, drain_grace_seconds=600)
    address = running.address
    stub = stub_on(connect(address))
    worker.hold()
    running_call = stub.ComputeLoss.future(GOOD)
    worker.wait_for_batch()
    waiting_calls = [stub.ComputeLoss.future(GOOD) for _ in range(3)]
    eventually(lambda: running.batcher.waiting_requests == 3)
    draining = drain(running)
    eventually(lambda: not can_connect(address))
    assert not draining.done()
    worker.release()
    for call in (running_call, *waiting_calls):
        assert call.result(timeout=PATIENCE_SECONDS).results
    draining.result(PATIENCE_SECONDS)
    assert running.batcher.admitted_requests == 0


def can_connect(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS).close()
    except OSError:
        return False
    return True


def test_when_the_grace_has_passed_calls_end_and_the_server_stops(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_WORKER_STOP_SECONDS", 0.01)  # the worker hangs
    worker = HeldWorker()
    running = start_server(worker=worker, drain_grace_seconds=0.01)
    stub = stub_on(connect(running.address))
    worker.hold()
    calls = [stub.ComputeLoss.future(GOOD)]
    worker.wait_for_batch()
    calls.append(stub.ComputeLoss.future(GOOD))
    eventually(lambda: running.batcher.waiting_requests == 1)
    drain(running).result(PATIENCE_SECONDS)
    for call in calls:
        assert isinstance(call.exception(timeout=PATIENCE_SECONDS), grpc.RpcError)
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


# ---- Ports ----


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_that_is_taken_is_a_setting_that_cannot_be_used(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = RunningServer(**{setting: port})
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--{setting.replace('_', '-')}"):
            running.start()
        with pytest.raises(ConfigError):  # the same from `stop`, which waits for the start
            running.stop()
        running.run(running.server.stop())
        running.end()


def test_two_servers_do_not_share_a_port(start_server: StartServer) -> None:
    """With SO_REUSEPORT the second would silently take half of the first's connections."""
    first = start_server()
    second = RunningServer(port=first.server.port, metrics_port=-1)
    with pytest.raises(ConfigError, match="is it taken"):
        second.start()
    second.run(second.server.stop())
    second.end()


def test_a_device_that_is_not_there_is_a_setting_that_cannot_be_used() -> None:
    async def create() -> None:
        app.Server(ServerConfig(device="cuda:99"))

    with pytest.raises(ConfigError, match="--device is 'cuda:99'"):
        asyncio.run(create())


def test_what_a_failed_warm_up_raises_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = HeldWorker()

    def warm_up() -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(worker, "warm_up", warm_up)
    running = RunningServer(worker=worker, metrics_port=-1)
    with pytest.raises(RuntimeError, match="no kernel image"):
        running.start()
    running.run(running.server.stop())
    running.end()


def test_metrics_are_served_over_http_until_the_server_stops(start_server: StartServer) -> None:
    running = start_server(metrics_port=0)
    url = running.server.metrics_address
    assert "lossgrad_ready 1.0" in running.scrape()
    running.run(running.server.stop())
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=PATIENCE_SECONDS)  # noqa: S310


def test_reflection_is_off_unless_asked_for(server: RunningServer, connect: Connect) -> None:
    call: Callable[..., Any] = connect(server.address).stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b""]), timeout=PATIENCE_SECONDS))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_auto_takes_the_gpu_if_there_is_one(start_server: StartServer) -> None:
    import torch

    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert start_server(device="auto").server.device == expected
    assert engine.create_worker("cpu", None).device == "cpu"


def test_a_memory_release_happens_once_after_each_burst(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Semaphore(0)
    count = 0

    def release() -> bool:
        nonlocal count
        count += 1
        released.release()
        return True

    monkeypatch.setattr(app, "release_free_memory", release)
    monkeypatch.setattr(app, "_IDLE_SECONDS", 0.001)
    running = start_server()
    stub = stub_on(connect(running.address))
    for burst in (1, 2):
        assert stub.ComputeLoss(GOOD).results
        assert released.acquire(timeout=PATIENCE_SECONDS)
        ticks(running, 20)
        assert count == burst


def ticks(running: RunningServer, count: int) -> None:
    """Let the idle watch look so many more times."""

    async def wait() -> None:
        for _ in range(count):
            await asyncio.sleep(0.002)

    running.run(wait())
