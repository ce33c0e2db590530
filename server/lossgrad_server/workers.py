"""The worker that the settings ask for, in this process or in one of its own, and what its losses mean for the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from lossgrad_server import engine
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.errors import Reason, RequestError, Unavailable
from lossgrad_server.isolation.keeper import ProcessSettings
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.isolation.memory import why_impossible
from lossgrad_server.isolation.worker import IsolatedWorker
from lossgrad_server.metrics import Metrics
from lossgrad_server.work import DeviceWorker

logger = logging.getLogger(__name__)

# How long there may be no process before health says NOT_SERVING. On the CPU there is another much sooner; where a GPU has
# to be opened anew it takes seconds, and callers that watch health go elsewhere meanwhile.
OUTAGE_SECONDS: Final = 1.0


class MadeWorker(NamedTuple):
    """A worker, what its results depend on, its GPU's UUID, None for a CPU, and its device's model."""

    worker: DeviceWorker
    determinism: str
    gpu_uuid: str | None
    model: str


def make_worker(config: ServerConfig, *, may_isolate: bool) -> MadeWorker:
    """Return the worker that the settings ask for. Raises ConfigError."""
    try:
        if may_isolate and _is_isolated(config):
            settings = ProcessSettings(
                config.device, config.threads, config.engine, config.log_level, config.log_format
            )
            isolated = IsolatedWorker(settings, config.worker_timeout_seconds)
            facts = isolated.facts
            return MadeWorker(isolated, facts.determinism, facts.gpu_uuid or None, facts.model)
        worker = engine.create_worker(config.device, config.threads or None, config.engine)
    except ValueError as error:
        raise ConfigError(f"--device is {config.device!r}: {error}") from None
    device = worker.device
    return MadeWorker(worker, engine.determinism(worker), engine.gpu_uuid(device), engine.model(device))


def _is_isolated(config: ServerConfig) -> bool:
    why_not = why_impossible()
    if config.isolation == "process" and why_not:
        raise ConfigError(f"--isolation is 'process': {why_not}; choose thread")
    if config.isolation != "auto":
        return config.isolation == "process"
    if not engine.is_gpu(config.device):
        return False
    if why_not:
        logger.warning("The device's worker is a thread of this process, because for one of its own %s", why_not)
    return not why_not


class Outages:
    """What the server does while the device has no process: refuses at once, and says NOT_SERVING if it lasts.

    Implements isolation.keeper.KeeperObserver. All but the calls of the keeper's thread belongs to the event loop's.
    """

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        post: Callable[[Callable[[], None]], None],
        tell_ready: Callable[[bool], None],
        give_up: Callable[[], None],
    ) -> None:
        """`post` runs something in the event loop's thread; the other two are called there."""
        self._batcher = batcher
        self._metrics = metrics
        self._post = post
        self._tell_ready = tell_ready
        self._give_up = give_up
        self._retry_after_seconds: Callable[[], float] = lambda: 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_out = self._has_ended = False

    def watch(self, worker: DeviceWorker) -> None:
        """Watch a worker, if it can be lost."""
        if isinstance(worker, IsolatedWorker):
            self._retry_after_seconds = lambda: worker.retry_after_seconds
            worker.on_crash = self._metrics.worker_crashes.inc
            worker.watch(self)

    def end(self) -> None:
        """Leave readiness alone from now on: the server drains."""
        self._has_ended = True
        if self._timer is not None:
            self._timer.cancel()

    # ---- The keeper's thread ----

    def worker_lost(self, loss: Loss) -> None:
        """Refuse what waits and what comes."""
        self._metrics.worker_lost[loss].inc()
        self._metrics.worker_up.set(0)
        self._batcher.suspend(self._refusal)
        self._post(self._begin)

    def worker_replaced(self, seconds: float) -> None:
        """Go on."""
        self._metrics.worker_restarts.inc()
        self._metrics.worker_up.set(1)
        self._batcher.resume()
        self._post(self._over)

    def worker_given_up(self) -> None:
        """End the server."""
        self._post(self._give_up)

    # ---- The event loop's ----

    def _begin(self) -> None:
        if not self._has_ended and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(OUTAGE_SECONDS, self._say_so)

    def _say_so(self) -> None:
        self._is_out = True
        logger.warning("The device has had no process for %s s: saying NOT_SERVING", OUTAGE_SECONDS)
        self._tell_ready(False)

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_out and not self._has_ended:
            self._is_out = False
            self._tell_ready(True)

    def _refusal(self) -> RequestError:
        return Unavailable(
            "the process that computes on this server's device was lost, and another is starting; try again shortly",
            reason=Reason.WORKER_RESTARTING,
            retry_after_seconds=self._retry_after_seconds(),
        )
