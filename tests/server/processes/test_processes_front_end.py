"""One of several processes, as the parent keeps it there: started, watched, replaced at a bounded rate, ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lossgrad_server.config import ServerConfig
from lossgrad_server.processes import front_end
from lossgrad_server.processes.front_end import EndedEarly, FrontEnd
from lossgrad_server.processes.merging import read
from tests.server.processes import fake_child
from tests.server.serving import PATIENCE_SECONDS

CONFIG = ServerConfig(threads=7)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "CHILD", "tests.server.processes.fake_child")


@pytest.fixture
async def place() -> AsyncIterator[FrontEnd]:
    made = FrontEnd("3", CONFIG)
    yield made
    made.end()
    await made.kill()


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.002)


async def serving(place: FrontEnd) -> asyncio.Task[int]:
    """Have it serve, and kept there."""
    await place.prepare()
    await place.listen()
    return asyncio.create_task(place.keep())


def pid_of(place: FrontEnd) -> int:
    assert place._process is not None
    return place._process.pid


def is_there(pid: int) -> bool:
    """Return whether a process is there, a zombie included."""
    return Path(f"/proc/{pid}").exists()


async def test_it_is_prepared_then_listens_and_tells_its_metrics(place: FrontEnd) -> None:
    assert place.ask_for_metrics() == (0, None)
    serving: list[bool] = []
    for step in (place.prepare, place.listen):
        await step()
        serving.append(place.is_serving)
    assert serving == [False, True]
    life, pipe = place.ask_for_metrics()
    assert life == 1
    assert pipe is not None
    with pipe:
        pipe.settimeout(PATIENCE_SECONDS)
        text = b""
        while part := pipe.recv(65536):
            text += part
    (metric,) = read(text)
    assert metric.samples[0].value == 7  # the settings reached it


async def test_one_that_ends_before_it_serves_says_how(place: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_child.BEHAVIOUR, "ends:9")
    with pytest.raises(EndedEarly, match="process 3 ended with exit code 9 before it served") as caught:
        await place.prepare()
    assert caught.value.code == 9


async def test_one_that_is_killed_is_replaced_at_once_and_leaves_no_zombie(place: FrontEnd) -> None:
    kept = await serving(place)
    first = pid_of(place)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: place.restarts == 1)
    assert place.is_serving
    assert pid_of(place) != first
    assert not is_there(first)
    life, pipe = place.ask_for_metrics()
    assert life == 2
    assert pipe is not None
    pipe.close()
    assert not kept.done()
    place.end()
    assert await kept == fake_child.DRAINED


async def test_restarts_come_at_a_bounded_rate(place: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def wait_for(future: Any, timeout: float) -> None:  # noqa: ASYNC109 - asyncio's own
        future.close()
        waits.append(timeout)
        if len(waits) == 9:
            place.end()
        raise TimeoutError

    await place.prepare()
    await place.listen()
    monkeypatch.setenv(fake_child.BEHAVIOUR, "ends:1")
    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    kept = asyncio.create_task(place.keep())
    os.kill(pid_of(place), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await kept == 0
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert place.restarts == 0


async def test_one_that_dies_soon_after_each_start_is_started_ever_later(
    place: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_end, "_FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(front_end, "_MOST_DELAY_SECONDS", 0.004)
    await place.prepare()
    await place.listen()
    monkeypatch.setenv(fake_child.BEHAVIOUR, "late:1")
    delays: list[float] = []
    wait_for = asyncio.wait_for

    async def noted(future: Any, timeout: float) -> Any:  # noqa: ASYNC109 - asyncio's own
        delays.append(timeout)
        return await wait_for(future, timeout)

    monkeypatch.setattr(asyncio, "wait_for", noted)
    kept = asyncio.create_task(place.keep())
    os.kill(pid_of(place), signal.SIGKILL)
    await eventually(lambda: len(delays) >= 4)
    place.end()
    await kept
    assert delays[:4] == [0.001, 0.002, 0.004, 0.004]


async def test_one_that_hangs_is_killed_and_replaced(place: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_child.BEHAVIOUR, "mute")
    kept = await serving(place)
    hung = pid_of(place)
    monkeypatch.delenv(fake_child.BEHAVIOUR)
    for _ in range(12):
        place.ping()
        await asyncio.sleep(0)
    assert is_there(hung)
    place.ping()
    await eventually(lambda: place.restarts == 1)
    assert not is_there(hung)
    assert not kept.done()


async def test_one_that_answers_is_never_taken_for_hung(place: FrontEnd) -> None:
    kept = await serving(place)
    process = place._process
    assert process is not None
    for _ in range(30):
        place.ping()
        await eventually(lambda: process.unanswered == 0)
    assert place.restarts == 0
    assert not kept.done()


async def test_one_that_does_not_listen_yet_is_killed_when_the_server_ends(place: FrontEnd) -> None:
    await place.prepare()
    pid = pid_of(place)
    place.end()
    assert await place.keep() == 0
    assert not is_there(pid)


async def test_one_that_was_just_told_to_listen_drains_instead(place: FrontEnd) -> None:
    await place.prepare()
    listening = asyncio.create_task(place.listen())
    await asyncio.sleep(0)
    place.end()
    await listening
    assert await place.keep() == fake_child.DRAINED


async def test_one_that_does_not_drain_is_stopped(place: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_child.BEHAVIOUR, "stubborn")
    kept = await serving(place)
    place.end()
    await asyncio.sleep(0.05)
    assert not kept.done()
    place.stop()
    assert await kept == 0


async def test_one_that_is_killed_while_it_drains_says_so_as_shells_do(
    place: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake_child.BEHAVIOUR, "stubborn")
    kept = await serving(place)
    place.end()
    await place.kill()
    assert await kept == 128 + signal.SIGKILL
