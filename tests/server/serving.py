"""Runs servers for tests: in a thread of this process, with a worker that can be held, called with generated stubs."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar
from unittest import mock

from lossgrad_api.codec import SERVICE
from lossgrad_server import app, engine
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.config import ServerConfig
from lossgrad_server.jobs import JobPlan
from lossgrad_server.metrics import Metrics
from lossgrad_server.work import BatchResult, DeviceWorker, Done, WorkItem

PATIENCE_SECONDS = 30.0  # how long what must happen may take; only a failing test waits so long

_T = TypeVar("_T")


class HeldWorker:
    """A worker that computes when it is let to. The test holds and releases it, and sees every batch begin."""

    def __init__(self, inner: DeviceWorker | None = None) -> None:
        self._inner = inner or engine.create_worker("cpu", 1)
        self._may_run = threading.Event()
        self._may_run.set()
        self._may_warm_up = threading.Event()
        self._may_warm_up.set()
        self._begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.failure: Exception | None = None  # raised instead of computing
        self.batch_count = 0

    @property
    def device(self) -> str:
        return self._inner.device

    def hold(self) -> None:
        """Let no batch be computed until `release`."""
        self._may_run.clear()

    def release(self) -> None:
        self._may_run.set()

    def hold_warm_up(self) -> None:
        self._may_warm_up.clear()

    def release_warm_up(self) -> None:
        self._may_warm_up.set()

    def wait_for_batch(self) -> int:
        """Wait until the next batch begins; return how many requests it has."""
        return self._begun.get(timeout=PATIENCE_SECONDS)

    def warm_up(self) -> None:
        assert self._may_warm_up.wait(PATIENCE_SECONDS)
        self._inner.warm_up()

    @property
    def slots(self) -> int:
        return 1

    @property
    def inline_work(self) -> int:
        return 0

    @property
    def is_lost(self) -> bool:
        return False

    def is_large(self, plan: JobPlan) -> bool:
        return False

    def submit(self, items: Sequence[WorkItem]) -> Done:
        return Done(self.run(items))

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        self.batch_count += 1
        self._begun.put(len(items))
        assert self._may_run.wait(PATIENCE_SECONDS)
        if self.failure is not None:
            raise self.failure
        return self._inner.submit(items).result()

    def close(self) -> None:
        self._inner.close()


class RunningServer:
    """A server in a thread of this process, on free ports unless the settings say otherwise."""

    def __init__(self, *, worker: HeldWorker | None = None, **settings: Any) -> None:
        self.config = ServerConfig(**{"port": 0, "metrics_port": 0, "device": "cpu", **settings})
        self.worker = worker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server of a test", daemon=True)
        self.server: app.Server  # set by `start`

    def start(self, *, wait: bool = True) -> RunningServer:
        """Start it; wait until it serves, unless told not to."""
        self._thread.start()
        self.run(self._create())
        self._started = asyncio.run_coroutine_threadsafe(self.server.start(), self._loop)
        if wait:
            self._started.result(PATIENCE_SECONDS)
        return self

    def stop(self) -> None:
        """Stop it at once."""
        if self.worker is not None:
            self.worker.release()
            self.worker.release_warm_up()
        if self._loop.is_closed():
            return
        self._started.result(PATIENCE_SECONDS)
        self.run(self.server.stop())
        self.end()

    def end(self) -> None:
        """End the event loop and its thread."""
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run something in the server's event loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_SECONDS)

    async def _create(self) -> None:
        if self.worker is None:
            self.server = app.Server(self.config)
            return
        with mock.patch.object(engine, "create_worker", return_value=self.worker):
            self.server = app.Server(self.config)

    @property
    def address(self) -> str:
        """Where to call it."""
        eventually(lambda: self.server.port or self.config.is_socket)
        return self.server.grpc_address

    @property
    def batcher(self) -> Batcher:
        return self.server._core.batcher

    @property
    def metrics(self) -> Metrics:
        return self.server._core.metrics

    def scrape(self) -> str:
        """Return what the metrics port serves."""
        with urllib.request.urlopen(self.server.metrics_address, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
            text: str = response.read().decode()
        return text

    def __enter__(self) -> RunningServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class StartServer(Protocol):
    """Starts a server of the test's own."""

    def __call__(self, *, worker: HeldWorker | None = None, **settings: Any) -> RunningServer: ...


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds that nothing announces."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.001)


def handled(running: RunningServer, method: str, code: str) -> float | None:
    """Return how many calls of a method have ended with a code."""
    labels = {
        "grpc_type": "unary" if method == "ComputeLoss" else "bidi_stream",
        "grpc_service": SERVICE,
        "grpc_method": method,
        "grpc_code": code,
    }
    return running.metrics.registry.get_sample_value("grpc_server_handled_total", labels)
