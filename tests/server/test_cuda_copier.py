"""The process that copies GPU memory, over a driver that is none: what it copies, and what becomes of it when it fails."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lossgrad_server import app
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.shared_memory.cuda_copier import CopierLost, CudaCopier, Opened, Refused
from lossgrad_server.shared_memory.cuda_driver import LIBRARY
from lossgrad_server.shared_memory.cuda_records import QUESTION, STAGING_BYTES, Became, Question
from tests.server.cuda_standin import (
    COPY_CRASHES,
    COPY_FAILS,
    COPY_HANGS,
    OPEN_CRASHES,
    OPEN_HANGS,
    DeviceMemory,
    build,
)
from tests.server.serving import eventually

SIZE = 2 * STAGING_BYTES + 4097  # three pieces, the last of which is odd


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def lost() -> list[int]:
    return []


@pytest.fixture
def copier(driver: Path, lost: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaCopier]:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    copier = CudaCopier(lost.append)
    yield copier
    copier.close()
    copier.executor.shutdown()


def read(copier: CudaCopier, region: Opened, offset: int, byte_count: int) -> bytes:
    room = memoryview(bytearray(byte_count))
    copier.read(region, offset, room)
    return bytes(room)


def test_what_is_written_is_there_and_what_is_there_is_read(copier: CudaCopier) -> None:
    data = np.random.default_rng(1).bytes(SIZE)
    with DeviceMemory(SIZE + 100) as memory:
        region = copier.open(memory.handle, 1, SIZE + 50)
        copier.write(region, 3, data)
        assert memory.memory[3 : 3 + SIZE] == data
        assert memory.memory[:3] == bytes(3)
        assert memory.memory[3 + SIZE :] == bytes(97)
        assert read(copier, region, 3, SIZE) == data
        copier.close_region(region)
        with pytest.raises(CopierLost):  # a bug of whoever asks for a closed one costs the process, and nothing else
            read(copier, region, 0, 1)


def test_two_regions_are_two_and_one_may_be_opened_twice(copier: CudaCopier) -> None:
    with DeviceMemory(100) as one, DeviceMemory(100) as other:
        one.memory[0], other.memory[0] = 1, 2
        regions = [copier.open(memory.handle, 0, 100) for memory in (one, other, one)]
        assert [read(copier, region, 0, 1) for region in regions] == [b"\1", b"\2", b"\1"]
        copier.close_region(regions[0])
        assert [read(copier, region, 0, 1) for region in regions[1:]] == [b"\2", b"\1"]


@pytest.mark.parametrize("device_id", [0, 2], ids=["no such memory", "no such device"])
def test_a_handle_that_stands_for_nothing_is_refused_and_harms_nothing(copier: CudaCopier, device_id: int) -> None:
    with DeviceMemory(100) as memory:
        region = copier.open(memory.handle, 0, 100)
        process_id = copier.process_id
        handle = memory.handle if device_id else b"absent".ljust(64, b"\0")
        with pytest.raises(Refused) as caught:
            copier.open(handle, device_id, 100)
        assert caught.value.became is Became.REFUSED
        assert read(copier, region, 0, 100) == bytes(100)
        assert copier.process_id == process_id


def test_a_region_is_not_larger_than_its_allocation(copier: CudaCopier) -> None:
    with DeviceMemory(100) as memory:
        with pytest.raises(Refused) as caught:
            copier.open(memory.handle, 0, 101)
        assert (caught.value.became, caught.value.allocation_bytes) == (Became.OUTSIDE, 100)
        assert copier.open(memory.handle, 0, 100)


@pytest.mark.parametrize("what", [Question.READ, Question.WRITE])
@pytest.mark.parametrize(("offset", "byte_count"), [(90, 11), (1 << 63, 1), (0, STAGING_BYTES + 1)])
def test_the_process_itself_copies_nothing_outside(
    copier: CudaCopier, what: Question, offset: int, byte_count: int
) -> None:
    """The server checks before, so this is asked of the process directly."""
    with DeviceMemory(100) as memory:
        region = copier.open(memory.handle, 0, 100)
        process = copier._process
        assert process is not None
        question = QUESTION.pack(what, region.number, 0, offset, byte_count, bytes(64))
        assert process.ask(question, 5)[0] is Became.OUTSIDE


@pytest.mark.parametrize("fault", [COPY_FAILS, COPY_CRASHES], ids=["fails", "crashes"])
@pytest.mark.parametrize("writes", [False, True], ids=["read", "write"])
def test_a_copy_that_goes_wrong_costs_the_process_and_the_next_region_gets_another(
    copier: CudaCopier, lost: list[int], fault: int, writes: bool
) -> None:
    with DeviceMemory(100) as good, DeviceMemory(100, fault) as bad:
        regions = [copier.open(memory.handle, 0, 100) for memory in (good, bad)]
        process_id = copier.process_id
        copy = partial(copier.write, regions[1], 0, b"x") if writes else partial(read, copier, regions[1], 0, 1)
        with pytest.raises(CopierLost):
            copy()
        assert lost == [regions[0].generation]
        assert not any(map(copier.is_open, regions))
        with pytest.raises(CopierLost):
            read(copier, regions[0], 0, 1)
        copier.close_region(regions[0])  # does nothing
        again = copier.open(good.handle, 0, 100)
        assert copier.process_id not in (None, process_id)
        assert read(copier, again, 0, 100) == bytes(100)
        assert lost == [regions[0].generation]


@pytest.mark.parametrize("fault", [OPEN_CRASHES, OPEN_HANGS, COPY_HANGS], ids=["crash", "hang", "hang at a copy"])
def test_one_that_hangs_or_dies_is_replaced(
    driver: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int], fault: int
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    with DeviceMemory(100) as good, DeviceMemory(100, fault) as bad:
        copier = CudaCopier(lost.append, copy_seconds=0.3)
        copier.open(good.handle, 0, 100)  # a start takes longer than what hangs is given here
        copier._open_seconds = 0.3
        process_id = copier.process_id
        assert process_id is not None
        with pytest.raises(CopierLost):
            read(copier, copier.open(bad.handle, 0, 100), 0, 1)
        assert len(lost) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
        copier._open_seconds = 30
        assert read(copier, copier.open(good.handle, 0, 100), 0, 1) == b"\0"
        copier.close()
        copier.executor.shutdown()


def test_one_that_is_killed_while_idle_is_noticed(copier: CudaCopier, lost: list[int]) -> None:
    with DeviceMemory(100) as memory:
        region = copier.open(memory.handle, 0, 100)
        assert copier.process_id is not None
        os.kill(copier.process_id, signal.SIGKILL)
        eventually(lambda: not copier.is_open(region))
        assert read(copier, copier.open(memory.handle, 0, 100), 0, 100) == bytes(100)
        assert lost == [region.generation]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_are_the_servers_end_nothing(copier: CudaCopier, number: signal.Signals) -> None:
    with DeviceMemory(100) as memory:
        region = copier.open(memory.handle, 0, 100)
        assert copier.process_id is not None
        os.kill(copier.process_id, number)
        assert read(copier, region, 0, 100) == bytes(100)


def test_closing_ends_a_process_that_hangs_and_whoever_waits_for_it(copier: CudaCopier) -> None:
    with DeviceMemory(100, COPY_HANGS) as memory:
        region = copier.open(memory.handle, 0, 100)
        process_id = copier.process_id
        assert process_id is not None
        copying = copier.executor.submit(read, copier, region, 0, 100)
        eventually(lambda: memory.is_being_copied)
        copier.close()
        with pytest.raises(CopierLost):
            copying.result(30)
        copier.executor.shutdown()
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "in a copy that hangs"])
def test_it_ends_when_the_server_is_gone(copier: CudaCopier, hangs: bool) -> None:
    """However the server ended: its end of the channel is closed then."""
    with DeviceMemory(100, COPY_HANGS if hangs else 0) as memory:
        region = copier.open(memory.handle, 0, 100)
        process = copier._process
        assert process is not None
        if hangs:
            process.channel.send(QUESTION.pack(Question.READ, region.number, 0, 0, 1, bytes(64)))
            eventually(lambda: memory.is_being_copied)
        process.channel.close()
        eventually(lambda: process.program.poll() is not None)
        copier._process = None
        os.close(process.staging)


def has_driver() -> bool:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("what", ["absent", "not a library", "too old"])
def test_a_machine_without_a_driver_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int], what: str
) -> None:
    """A library of another kind stands for a driver that has not what is needed."""
    library = tmp_path / LIBRARY
    if what == "not a library":
        library.write_text("no")
    elif what == "too old":
        library.symlink_to(next(Path("/").glob("lib/*/libm.so.6"), Path("/lib64/libm.so.6")))
    elif has_driver():
        pytest.skip("this machine has a driver")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    copier = CudaCopier(lost.append)
    with pytest.raises(Refused) as caught:
        copier.open(bytes(64), 0, 1)
    assert caught.value.became is Became.NO_DRIVER
    copier.close()
    copier.executor.shutdown()
    assert not lost


async def test_the_flag_is_nothing_without_the_other() -> None:
    with pytest.raises(ConfigError, match="set --allow-shared-memory with it"):
        app.Server(ServerConfig(device="cpu", allow_cuda_shared_memory=True))
