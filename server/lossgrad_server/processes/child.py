"""The program that runs in one of several processes: a server that its parent tells when to listen, drain and stop.

It has no command line: its settings come over the socket whose descriptor is its only argument. It obeys its parent. SIGTERM
is for the parent, too: some supervisors send it to all processes of a service. Where it comes to one process alone, that
one goes, and its callers connect again to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import Final

from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server import logs
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.processes import link
from lossgrad_server.processes.link import ChildEnd, News, Order
from lossgrad_server.processes.merging import told

logger = logging.getLogger(__name__)

# Within this time after a signal the parent gives its order, if the signal came to it as well.
_ALONE_SECONDS: Final = 0.3


def main() -> int:
    """Serve until told to stop. Returns what `lossgrad-server` would."""
    parent = link.take(int(sys.argv[1]))
    try:
        settings = parent.settings()
    except EOFError:
        return 0
    config = ServerConfig(**settings["config"])
    logs.configure(config.log_level, config.log_format, process=settings["process"])
    keep_large_blocks()  # before gRPC starts threads, each of which would get an arena of its own
    from lossgrad_server.app import DeviceLost
    from lossgrad_server.engine import cpu_target

    cpu_target.choose(os.environ)
    try:
        asyncio.run(_run(config, parent))
    except DeviceLost as error:
        print(f"lossgrad-server: {error}", file=sys.stderr)  # noqa: T201
        return 3
    except ConfigError as error:
        print(f"lossgrad-server: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


async def _run(config: ServerConfig, parent: ChildEnd) -> None:
    from lossgrad_server.app import DeviceLost, Server

    orders: asyncio.Queue[Order] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    server = Server(config, shares_port=True)
    parent.listen(orders.put_nowait, lambda: told(server.metrics.registry))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, orders.put_nowait, Order.GO)
    await server.prepare()
    parent.tell(News.WARM)
    order = await _another(orders)  # nobody is connected yet: if it is to end, the parent says so
    if order is not Order.LISTEN:
        await server.stop()
        return
    await server.start()
    parent.tell(News.SERVING)
    lost = asyncio.ensure_future(server.device_lost.wait())
    ordered = asyncio.ensure_future(orders.get())
    await asyncio.wait((lost, ordered), return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        logger.critical("Device %s is lost; stopping, so that a new process can take it", server.device)
        ordered.cancel()
        await server.drain()
        raise DeviceLost(f"device {server.device} failed; this process cannot use it any more")
    lost.cancel()
    order = ordered.result()
    if order is Order.GO:
        with contextlib.suppress(TimeoutError):
            order = await asyncio.wait_for(_another(orders), _ALONE_SECONDS)
    if order is Order.ORPHANED:
        logger.error("The parent has died; draining")
    if order is Order.STOP:
        await server.stop()
        return
    drain = asyncio.ensure_future(server.drain(is_replaced=order is Order.GO))
    stop = asyncio.ensure_future(_until_stopped(orders))
    await asyncio.wait((drain, stop), return_when=asyncio.FIRST_COMPLETED)
    if drain.done():
        stop.cancel()
        await drain
        return
    logger.warning("Told to stop at once")
    drain.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await drain
    await server.stop()


async def _another(orders: asyncio.Queue[Order]) -> Order:
    """Wait for an order that is no signal."""
    while (order := await orders.get()) is Order.GO:
        pass
    return order


async def _until_stopped(orders: asyncio.Queue[Order]) -> None:
    while await orders.get() is not Order.STOP:
        pass


if __name__ == "__main__":
    sys.exit(main())
