"""How an evaluation begins: which servers it waits for, and for how long; and that others' requests go first."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from lossgrad import L1, AsyncLossClient, LossClient, LossMetric, Unavailable
from lossgrad_server.batching import line
from tests.server.serving import RunningServer, StartServer

BATCHES = [(np.full(10, 3.0, np.float32), np.zeros(10, np.float32))] * 5


@pytest.fixture
def port() -> int:
    """Return a port on which nobody listens yet."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free: int = taken.getsockname()[1]
        return free


@pytest.mark.parametrize("kind", ["blocking", "asyncio", "endpoints"])
def test_a_server_that_is_not_there_yet_is_waited_for_where_patience_is_given(
    kind: str, port: int, start_server: StartServer, server: RunningServer
) -> None:
    target = f"127.0.0.1:{port}"
    means: list[float] = []

    async def awaited() -> None:
        async with AsyncLossClient(target) as client:
            means.append((await client.evaluate(BATCHES, L1(), patience=30))[0].mean)

    def run() -> None:
        if kind == "asyncio":
            asyncio.run(awaited())
            return
        endpoints = [server.address, target] if kind == "endpoints" else None
        with LossClient(target, retries=0) as client:
            means.append(client.evaluate(BATCHES, L1(), patience=30, endpoints=endpoints)[0].mean)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()  # it waits
    start_server(port=port)
    thread.join(30)
    assert means == [3.0]


def test_patience_for_the_first_connection_ends(port: int) -> None:
    with LossClient(f"127.0.0.1:{port}", retries=0) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="is a server running there"):
            client.evaluate(BATCHES, patience=0.6)
        assert 0.2 < time.monotonic() - began < 5
        with pytest.raises(Unavailable):
            LossMetric(client=client).update(*BATCHES[0])


@pytest.mark.parametrize(("options", "is_bulk"), [({}, True), ({"bulk": False}, False)])
@pytest.mark.parametrize("is_async", [False, True])
def test_requests_of_others_go_first_unless_told_otherwise(
    options: dict[str, Any], is_bulk: bool, is_async: bool, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    own = line.Line.append

    def append(self: line.Line, job: Any) -> None:
        seen.append(job.origin.is_bulk)
        own(self, job)

    monkeypatch.setattr(line.Line, "append", append)
    large = [(np.zeros(1 << 20, np.float32), np.zeros(1 << 20, np.float32))] * 3  # too large to be computed on the spot

    async def awaited() -> None:
        async with AsyncLossClient(server.address) as client:
            await client.evaluate(large, **options)
            await client.l1(*large[0])

    if is_async:
        asyncio.run(awaited())
    else:
        with LossClient(server.address) as client:
            client.evaluate(large, **options)
            client.l1(*large[0])
    assert seen[:-1] == [is_bulk] * (len(seen) - 1)
    assert len(seen) >= 4
    assert not seen[-1]
