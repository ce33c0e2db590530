"""The socket that hands out memory: what it gives, to whom, when it ends, and what hostile callers get."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lossgrad_server.errors import RequestError
from lossgrad_server.shared_memory import handover as module
from lossgrad_server.shared_memory.handover import Handover
from lossgrad_server.shared_memory.rules import Budget
from lossgrad_server.shared_memory.segments import Segments, why_impossible
from tests.server.sharing import (
    GRANTED,
    MALFORMED,
    NO_ROOM,
    NOBODY,
    RECORD,
    REGION,
    RELEASE,
    Caller,
)

MIB = 1 << 20


def descriptor_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Door:
    """A handover socket in the running loop, called from threads."""

    def __init__(self, address: str) -> None:
        self.budget = Budget(16, 64 * MIB)
        self.segments = Segments(self.budget)
        self.handover = Handover(self.segments, address)
        self.handover.start()

    async def caller(self) -> Caller:
        return await asyncio.to_thread(Caller, self.handover.address)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what nothing announces."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    if reason := why_impossible():
        pytest.skip(reason)
    door = Door("127.0.0.1:50051")
    yield door
    door.handover.close()
    door.segments.close()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_caller_gets_memory_and_its_name(door: Door) -> None:
    with await door.caller() as caller:
        region = await asyncio.to_thread(caller.region, 3 * MIB)
        region.memory[:5] = b"hello"
        assert bytes(door.segments.part("input", region.token, 0, 8)) == b"hello\0\0\0"
        assert door.segments.count == 1


async def test_a_caller_may_have_several_and_give_one_back(door: Door) -> None:
    with await door.caller() as caller:
        first = await asyncio.to_thread(caller.region, MIB)
        second = await asyncio.to_thread(caller.region, MIB)
        first.memory[0] = 1
        caller.ask(RELEASE, token=first.token)
        await door.until(lambda: door.segments.count == 1)
        await door.until(lambda: first.memory[0] == 0)  # its pages are the system's again
        door.segments.part("input", second.token, 0, 8)
        with pytest.raises(RequestError):
            door.segments.part("input", first.token, 0, 8)


async def test_what_a_caller_has_ends_with_it(door: Door) -> None:
    with await door.caller() as other:
        kept = await asyncio.to_thread(other.region, MIB)
        with await door.caller() as caller:
            for _ in range(3):
                await asyncio.to_thread(caller.region, MIB)
        await door.until(lambda: door.segments.count == 1)
        door.segments.part("input", kept.token, 0, 8)
    await door.until(lambda: door.segments.count == 0)
    assert door.budget.bytes == 0


async def test_nobody_can_end_what_is_anothers(door: Door) -> None:
    with await door.caller() as owner, await door.caller() as other:
        region = await asyncio.to_thread(owner.region, MIB)
        other.ask(RELEASE, token=region.token)
        await asyncio.to_thread(other.region, 8)  # answered after the release was read
        door.segments.part("input", region.token, 0, 8)


async def test_without_room_a_caller_is_told(door: Door) -> None:
    with await door.caller() as caller:
        for byte_count in (65 * MIB, 2**63, 2**64 - 1):
            caller.ask(REGION, byte_count)
            answer, token, size, descriptors = await asyncio.to_thread(caller.answer)
            assert (answer, token, size, descriptors) == (NO_ROOM, NOBODY, byte_count, [])
        await asyncio.to_thread(caller.region, 64 * MIB)


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"\0" * 31,
        b"\0" * 33,
        b"\0" * 4096,
        RECORD.pack(b"LGM1", REGION, NOBODY, 0),
        RECORD.pack(b"LGM2", REGION, NOBODY, 8),
        RECORD.pack(b"LGM1", 0, NOBODY, 8),
        RECORD.pack(b"LGM1", 3, NOBODY, 8),
        RECORD.pack(b"LGM1", 2**32 - 1, NOBODY, 8),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_cannot_be_read_ends_the_connection(door: Door, message: bytes) -> None:
    with await door.caller() as caller:
        caller.socket.send(message)
        answer, _, _, descriptors = await asyncio.to_thread(caller.answer)
        assert answer == MALFORMED
        assert not descriptors
        assert await asyncio.to_thread(caller.is_closed_by_the_server)
    assert door.segments.count == 0


async def test_descriptors_that_a_caller_sends_are_not_taken(door: Door) -> None:
    """Taken, they would pile up; looked at, one of a hostile file system could stop the server."""
    with await door.caller() as caller:
        before = descriptor_count()
        reading, writing = os.pipe()
        socket.send_fds(caller.socket, [RECORD.pack(b"LGM1", REGION, NOBODY, 8)], [reading] * 50)
        os.close(reading)
        answer, _, _, descriptors = await asyncio.to_thread(caller.answer)
        assert answer == GRANTED
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"x")  # nobody has the other end
        os.close(writing)
        os.close(descriptors[0])
        assert descriptor_count() == before + 1  # the server's mapping holds one


async def test_a_caller_that_does_not_read_is_dropped(door: Door) -> None:
    with await door.caller() as caller:
        caller.socket.setblocking(False)

        def flood() -> bool:
            try:
                for _ in range(100):
                    caller.ask(REGION, 65 * MIB)
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            return False

        await door.until(flood)
    with await door.caller() as caller:
        await asyncio.to_thread(caller.region, MIB)


async def test_the_number_of_connections_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    with await door.caller() as first, await door.caller() as idle:
        await asyncio.to_thread(first.region, MIB)
        await door.until(lambda: len(door.handover._connections) == 2)
        with await door.caller() as second:  # takes the place of one that has nothing
            await asyncio.to_thread(second.region, MIB)
            assert await asyncio.to_thread(idle.is_closed_by_the_server)
            with await door.caller() as third:  # and then there is none
                assert await asyncio.to_thread(third.is_closed_by_the_server)
            await asyncio.to_thread(first.region, MIB)


async def test_an_end_of_the_server_leaves_what_callers_have(door: Door) -> None:
    with await door.caller() as caller:
        region = await asyncio.to_thread(caller.region, MIB)
        region.memory[:4] = b"kept"
        door.handover.close()
        door.segments.close()
        assert await asyncio.to_thread(caller.is_closed_by_the_server)
        await asyncio.sleep(0.05)
        assert region.memory[:4] == b"kept"
        assert door.budget.regions == 0


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
async def test_beside_a_unix_socket_it_is_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "s.sock"
    (tmp_path / "s.sock.memory").write_text("left by one that was killed")
    door = Door(form.format(path))
    assert door.handover.address == f"unix:{path}.memory"
    with await door.caller() as caller:
        await asyncio.to_thread(caller.region, MIB)
    door.handover.close()
    door.handover.close()
    door.segments.close()
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_its_abstract_name_cannot_be_guessed() -> None:
    first, second = (Handover(Segments(Budget(1, 1)), "[::]:50051").address for _ in range(2))
    assert first != second
    assert first.startswith("unix-abstract:lossgrad-")
    assert len(first) == len("unix-abstract:lossgrad-") + 32
