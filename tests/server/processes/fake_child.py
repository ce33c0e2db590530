"""A process that serves nothing: it does what the parent's link asks for, or what BEHAVIOUR says instead.

BEHAVIOUR is some of these words: "ends:N" (with exit code N at its start), "late:N" (with N after it began to serve),
"mute" (its event loop answers no ping), "stubborn" (it does not end when it is to drain).
"""

from __future__ import annotations

import asyncio
import os
import sys

from prometheus_client import CollectorRegistry, Gauge

from lossgrad_server.processes import link
from lossgrad_server.processes.link import News, Order
from lossgrad_server.processes.merging import told

BEHAVIOUR = "FAKE_CHILD"
DRAINED = 5  # its exit code after a drain, so that tests see that it was one


async def run() -> int:
    behaviour = dict(word.partition(":")[::2] for word in os.environ.get(BEHAVIOUR, "").split())
    parent = link.take(int(sys.argv[1]))
    settings = parent.settings()
    if "ends" in behaviour:
        return int(behaviour["ends"])
    registry = CollectorRegistry()
    Gauge("lossgrad_threads", "As it was told.", registry=registry).set(settings["config"]["threads"])
    if "mute" in behaviour:
        asyncio.get_running_loop().call_soon_threadsafe = lambda *_: None  # type: ignore[method-assign,assignment]
    orders: asyncio.Queue[Order] = asyncio.Queue()
    parent.listen(orders.put_nowait, lambda: told(registry))
    parent.tell(News.WARM)
    if "mute" not in behaviour:
        assert await orders.get() is Order.LISTEN
    parent.tell(News.SERVING)
    if "late" in behaviour:
        return int(behaviour["late"])
    while (order := await orders.get()) is not Order.STOP:
        if "stubborn" not in behaviour:
            return DRAINED if order is Order.DRAIN else 0
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run()))
