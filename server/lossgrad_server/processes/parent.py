"""The program that keeps several processes there: starts them, replaces those that end, passes signals on, ends with them.

It holds the port without listening on it, serves everybody's metrics, and does nothing else: no request passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry

from lossgrad_server import logs
from lossgrad_server.config import ServerConfig
from lossgrad_server.metrics_endpoint import serve_metrics
from lossgrad_server.processes import port, shares
from lossgrad_server.processes.front_end import PING_SECONDS, EndedEarly, FrontEnd, exit_code
from lossgrad_server.processes.merging import PARENT, MergedMetrics

logger = logging.getLogger(__name__)

# After so long without a process that serves, the server ends, for its supervisor to start another.
GIVE_UP_SECONDS: Final = 120.0
# A process that was told to stop at once takes this long at most.
_STOP_SECONDS: Final = 15.0


async def run(config: ServerConfig) -> int:
    """Serve with `config.processes` processes until SIGTERM or SIGINT, then drain. A second signal stops at once.

    Returns 0 after a drain, 3 where no process could serve for two minutes, and where one cannot be started to begin with
    what that one returned. Raises ConfigError.
    """
    logs.configure(config.log_level, config.log_format, process=PARENT)
    shares.check(config)
    if config.processes > (cores := len(os.sched_getaffinity(0))):
        logger.warning("--processes is %s, more than the %s cores that there are", config.processes, cores)
    with contextlib.ExitStack() as stack:
        number = stack.enter_context(port.held(config.host, config.port))
        share = shares.share_of(config, number)
        front_ends = [FrontEnd(str(index), share) for index in range(config.processes)]
        metrics_address = "off"
        if config.metrics_port >= 0:
            registry = CollectorRegistry()
            registry.register(MergedMetrics(front_ends))
            metrics_port, stop_metrics = serve_metrics(registry, config.metrics_host, config.metrics_port)
            stack.callback(stop_metrics)
            metrics_address = f"http://{config.metrics_host}:{metrics_port}/metrics"
        return await _Parent(front_ends, f"{config.host}:{number}", metrics_address).run()


class _Parent:
    """The life of the processes, from the first one's start to the last one's end."""

    def __init__(self, front_ends: Sequence[FrontEnd], grpc_address: str, metrics_address: str) -> None:
        self._front_ends = front_ends
        self._grpc_address = grpc_address
        self._metrics_address = metrics_address
        self._signals: asyncio.Queue[str] = asyncio.Queue()

    async def run(self) -> int:
        """Take them through it; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signals.put_nowait, number.name)
        start = asyncio.ensure_future(self._start())
        signalled = asyncio.ensure_future(self._signals.get())
        await asyncio.wait((start, signalled), return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            logger.info("%s received before the server was ready; stopping", signalled.result())
            start.cancel()
            await asyncio.wait((start,))
            await self._kill()
            return 0
        try:
            start.result()
        except (EndedEarly, OSError, TimeoutError) as error:
            signalled.cancel()
            await self._kill()
            code = exit_code(error.code) if isinstance(error, EndedEarly) else 0
            if code != 2:  # the process has said itself which setting cannot be used
                print(f"lossgrad-server: {error or 'a process took too long to start'}", file=sys.stderr)  # noqa: T201
            return code or 1
        logger.info(
            "Ready: grpc %s, metrics %s, %s processes", self._grpc_address, self._metrics_address, len(self._front_ends)
        )
        # For people and scripts that start a server on port 0: the one line on standard output.
        print(f"lossgrad-server ready on {self._grpc_address}, metrics {self._metrics_address}", flush=True)  # noqa: T201
        return await self._serve(signalled)

    async def _start(self) -> None:
        """Start them all. Raises EndedEarly, OSError, TimeoutError.

        One goes first: it compiles the kernels where that is to be done, and says alone which setting cannot be used. They
        listen together: connections stay where they were made, and many come at once to a server that was restarted.
        """
        first, *others = self._front_ends
        await first.prepare()
        await asyncio.gather(*[each.prepare() for each in others])
        await asyncio.gather(*[each.listen() for each in self._front_ends])

    async def _serve(self, signalled: asyncio.Future[str]) -> int:
        kept = [asyncio.ensure_future(each.keep()) for each in self._front_ends]
        outage = asyncio.ensure_future(self._watch())
        happening: list[asyncio.Future[Any]] = [signalled, outage, *kept]
        await asyncio.wait(happening, return_when=asyncio.FIRST_COMPLETED)
        if not signalled.done():
            signalled.cancel()
            for task in kept:
                if task.done():
                    task.result()  # which raises: it was a bug
                task.cancel()
            await asyncio.wait(kept)
            await self._kill()
            return 3
        outage.cancel()
        logger.info("%s received; draining", signalled.result())
        for each in self._front_ends:
            each.end()
        ended = asyncio.ensure_future(asyncio.wait(kept))
        again = asyncio.ensure_future(self._signals.get())
        await asyncio.wait((ended, again), return_when=asyncio.FIRST_COMPLETED)
        if again.done():
            logger.warning("%s received again; stopping at once", again.result())
            for each in self._front_ends:
                each.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ended), _STOP_SECONDS)
            await self._kill()
        again.cancel()
        await ended
        logger.info("Stopped")
        return max(task.result() for task in kept)

    async def _watch(self) -> None:
        """Find processes that hang; return when there has been none that serves for too long."""
        loop = asyncio.get_running_loop()
        last_served = loop.time()
        while loop.time() - last_served < GIVE_UP_SECONDS:
            await asyncio.sleep(PING_SECONDS)
            for each in self._front_ends:
                each.ping()
            if any(each.is_serving for each in self._front_ends):
                last_served = loop.time()
        logger.critical("No process could serve for %s s; stopping", GIVE_UP_SECONDS)

    async def _kill(self) -> None:
        for each in self._front_ends:
            await each.kill()
