"""A server without sockets, in a thread of a client's process."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from lossgrad_server.app import Core
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.metrics import Metrics
from lossgrad_server.transport.health import health_method
from lossgrad_server.transport.in_process import InProcessChannel


class EmbeddedServer:
    """A server without sockets, in a thread of this process, for a client in this process.

    The settings are ServerConfig's; those about ports have no effect. It computes in this process: `isolation` may not be
    "process".
    """

    def __init__(self, **settings: Any) -> None:
        self._config = ServerConfig(**settings)
        if self._config.isolation == "process":
            raise ConfigError(
                "isolation is 'process', and an embedded server computes in its client's process; leave it at 'auto', or "
                "start lossgrad-server"
            )
        self._loop = asyncio.new_event_loop()
        self._core: Core | None = None
        self._thread = threading.Thread(target=self._serve, name="lossgrad-embedded", daemon=True)

    @property
    def metrics(self) -> Metrics:
        """The server's metrics; export its `registry` where they are wanted."""
        return self._running().metrics

    def start(self) -> None:
        """Start, and return when requests are served. Raises ConfigError, or what the worker's warm-up raised."""
        self._thread.start()

        async def start() -> None:
            self._core = Core(self._config, asyncio.get_running_loop(), may_isolate=False)
            await self._core.warm_up()

        try:
            asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def channel(self) -> InProcessChannel:
        """Return a channel to it."""
        return InProcessChannel(self._loop, [*self._running().methods, health_method()])

    def stop(self) -> None:
        """Stop; calls in flight end with an error."""
        asyncio.run_coroutine_threadsafe(self._running().close(), self._loop).result()
        self._core = None
        self._end_loop()

    def _running(self) -> Core:
        if self._core is None:
            raise RuntimeError("the embedded server is not running; call start() first")
        return self._core

    def _serve(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
