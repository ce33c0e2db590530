"""POSIX regions that callers name: opened once and only if they are the caller's own, copied and never mapped."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.shared_memory.rules import Budget
from lossgrad_server.shared_memory.system import SystemRegions

ME = f"user {os.geteuid()}"
STRANGER = "user 65533"


@dataclass
class World:
    """Regions over a directory that stands for /dev/shm."""

    regions: SystemRegions
    budget: Budget
    directory: Path

    def file(self, name: str, content: bytes = b"0123456789") -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path

    def register(self, name: str, key: str, size: int, offset: int = 0, owner: str = ME) -> None:
        self.regions.register_system(owner, name, key, offset, size)

    def read(self, name: str, offset: int, size: int, owner: str = ME) -> bytes:
        return bytes(self.regions.view(owner, name, offset, size, writable=False).memory)

    def write(self, name: str, offset: int, data: bytes, owner: str = ME) -> None:
        self.regions.view(owner, name, offset, len(data), writable=True).write(data)


def descriptor_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    directory = tmp_path / "shm"
    directory.mkdir()
    budget = Budget(8, 1000)
    gc.collect()  # exceptions of other tests, and what their frames hold
    descriptors = descriptor_count()
    regions = SystemRegions(budget, ["lossgrad"], {"me": ME, "stranger": STRANGER}.get, directory=directory)
    yield World(regions, budget, directory)
    regions.close()
    assert (budget.regions, budget.bytes) == (0, 0)
    gc.collect()
    assert descriptor_count() == descriptors


def refused(world: World, *arguments: Any, **more: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        world.register(*arguments, **more)
    assert str(world.directory) not in caught.value.message
    return caught.value


def call(peer: str) -> Any:
    return SimpleNamespace(method="", metadata={}, deadline=None, peer=peer)


def test_a_region_is_read_and_written_where_it_lies(world: World) -> None:
    path = world.file("lossgrad_a")
    world.register("a", "/lossgrad_a", 6, offset=2)
    assert world.read("a", 0, 6) == b"234567"
    assert world.read("a", 4, 2) == b"67"
    assert world.read("a", 6, 0) == b""
    world.write("a", 1, b"xy")
    assert path.read_bytes() == b"012xy56789"
    (status,) = world.regions.system_regions(ME, "a")
    assert (status.name, status.key, status.offset, status.byte_size) == ("a", "/lossgrad_a", 2, 6)


def test_what_was_read_is_a_copy_and_nothing_is_written_to_memory(world: World) -> None:
    world.file("lossgrad_a")
    world.register("a", "lossgrad_a", 10)
    view = world.regions.view(ME, "a", 0, 4, writable=False)
    before = bytes(view.memory)
    world.write("a", 0, b"XXXX")
    assert bytes(view.memory) == before == b"0123"
    assert view.memory.readonly
    assert not view.is_direct
    view.release()
    with pytest.raises(ValueError, match="4 bytes for a view of 4"):
        view.write(b"abcd")


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 11), (10, 1), (11, 0), (2**64 - 1, 2), (2**63, 2**63), (5, 2**64 - 1)]
)
def test_no_view_reaches_outside_its_region(world: World, offset: int, size: int) -> None:
    world.file("lossgrad_a", b"0" * 100)
    world.register("a", "lossgrad_a", 10)
    with pytest.raises(RequestError) as caught:
        world.regions.view(ME, "a", offset, size, writable=False)
    assert caught.value.reason == Reason.BAD_REGION


@pytest.mark.parametrize(("offset", "size"), [(0, 11), (10, 1), (11, 1), (2**64 - 1, 1), (0, 2**64 - 1), (0, 0)])
def test_no_region_reaches_outside_its_object(world: World, offset: int, size: int) -> None:
    world.file("lossgrad_a")
    error = refused(world, "a", "lossgrad_a", size, offset=offset)
    assert error.reason in (Reason.BAD_REGION, Reason.REGIONS_FULL)


def test_an_object_that_is_cut_short_is_told_and_touched_no_more(world: World) -> None:
    """A mapping of it would have killed the server."""
    path = world.file("lossgrad_a")
    world.register("a", "lossgrad_a", 10)
    os.truncate(path, 3)
    for action in (lambda: world.read("a", 0, 4), lambda: world.write("a", 0, b"abcd"), lambda: world.read("a", 5, 1)):
        with pytest.raises(RequestError, match="fewer bytes than when it was registered") as caught:
            action()
        assert caught.value.code == Code.INVALID_ARGUMENT
    assert path.read_bytes() == b"012"
    assert world.read("a", 0, 3) == b"012"


def test_an_object_that_grows_or_is_removed_changes_nothing(world: World) -> None:
    path = world.file("lossgrad_a")
    world.register("a", "lossgrad_a", 10)
    os.truncate(path, 100)
    path.unlink()
    assert world.read("a", 0, 10) == b"0123456789"
    world.file("lossgrad_a", b"another's...")
    assert world.read("a", 0, 10) == b"0123456789"


def test_no_link_is_followed(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 10)
    (world.directory / "lossgrad_link").symlink_to(secret)
    (world.directory / "lossgrad_dir").mkdir()
    os.mkfifo(world.directory / "lossgrad_fifo")
    world.file("other")
    os.link(world.directory / "other", world.directory / "lossgrad_hard")
    messages = {
        refused(world, "a", f"/{name}", 6).message.replace(name, "NAME")
        for name in ("lossgrad_link", "lossgrad_dir", "lossgrad_fifo", "lossgrad_hard", "lossgrad_nothing")
    }
    assert len(messages) == 1, "what is there may not be learnt from the message"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
def test_a_caller_can_open_only_what_is_its_own(world: World) -> None:
    mine, theirs = world.file("lossgrad_mine"), world.file("lossgrad_theirs")
    os.chown(theirs, 65533, 65533)
    os.chown(mine, 65532, 65532)
    world.register("theirs", "lossgrad_theirs", 10, owner=STRANGER)
    absent = refused(world, "x", "lossgrad_absent", 10, owner=STRANGER).message
    denied = refused(world, "x", "lossgrad_mine", 10, owner=STRANGER).message
    assert denied.replace("mine", "") == absent.replace("absent", "")
    world.register("any", "lossgrad_theirs", 10, owner="user 0")
    # Whose connection is not known is taken for the server's user.
    os.chown(mine, os.geteuid(), -1)
    world.register("unix", "lossgrad_mine", 10, owner="unix")


def test_names_belong_to_their_owner(world: World) -> None:
    world.file("lossgrad_a")
    world.file("lossgrad_b", b"bbbbbbbbbb")
    world.register("a", "lossgrad_a", 10)
    world.register("a", "lossgrad_b", 10, owner="unix")
    assert world.read("a", 0, 1) == b"0"
    assert world.read("a", 0, 1, owner="unix") == b"b"
    assert [region.key for region in world.regions.system_regions(ME, "")] == ["lossgrad_a"]
    with pytest.raises(RequestError) as caught:
        world.read("a", 0, 1, owner=STRANGER)
    assert caught.value.code == Code.NOT_FOUND
    world.regions.unregister_system(STRANGER, "a")
    world.regions.unregister_system(STRANGER, "")
    assert world.regions.count == 2
    world.regions.unregister_system(ME, "")
    assert (world.regions.count, world.regions.byte_count) == (1, 10)
    assert world.regions.system_regions(ME, "") == ()


def test_a_name_is_registered_once(world: World) -> None:
    world.file("lossgrad_a")
    world.register("a", "lossgrad_a", 10)
    error = refused(world, "a", "lossgrad_a", 10)
    assert (error.code, error.reason) == (Code.ALREADY_EXISTS, Reason.REGION_EXISTS)
    world.regions.unregister_system(ME, "a")
    world.regions.unregister_system(ME, "a")
    world.register("a", "lossgrad_a", 10)


def test_a_view_outlives_its_region(world: World) -> None:
    world.file("lossgrad_a")
    world.register("a", "lossgrad_a", 10)
    reading = world.regions.view(ME, "a", 0, 10, writable=False)
    writing = world.regions.view(ME, "a", 0, 10, writable=True)
    world.regions.unregister_system(ME, "a")
    writing.write(b"abc")
    assert bytes(reading.memory) == b"abc3456789"


def test_the_budget_bounds_regions_and_gets_back_what_failed(world: World) -> None:
    world.file("lossgrad_a", b"x" * 1000)
    refused(world, "a", "lossgrad_absent", 900)
    world.register("a", "lossgrad_a", 900)
    error = refused(world, "b", "lossgrad_a", 200)
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.REGIONS_FULL)
    for index in range(7):
        world.register(f"more {index}", "lossgrad_a", 1)
    refused(world, "too many", "lossgrad_a", 1)


def test_only_callers_on_this_machine_share_memory(world: World) -> None:
    assert world.regions.owner(call("me")) == ME
    with pytest.raises(RequestError, match="on its own machine only") as caught:
        world.regions.owner(call("ipv4:10.0.0.1:5"))
    assert (caught.value.code, caught.value.reason) == (Code.UNIMPLEMENTED, Reason.SHARED_MEMORY_OFF)


def test_gpu_memory_is_refused_and_giving_it_back_is_not(world: World) -> None:
    with pytest.raises(RequestError) as caught:
        world.regions.register_cuda(ME, "a", b"\0" * 64, 0, 10)
    assert caught.value.code == Code.UNIMPLEMENTED
    world.regions.unregister_cuda(ME, "a")
    world.regions.unregister_cuda(ME, "")
    assert world.regions.cuda_regions(ME, "") == ()
    with pytest.raises(RequestError) as caught:
        world.regions.cuda_regions(ME, "a")
    assert caught.value.code == Code.NOT_FOUND


def test_a_directory_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    regions = SystemRegions(Budget(1, 10), ["lossgrad"], lambda _: ME, directory=tmp_path / "absent")
    with pytest.raises(RequestError) as caught:
        regions.register_system(ME, "a", "lossgrad", 0, 1)
    assert "absent" not in caught.value.message


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_a_full_file_system_is_told() -> None:
    """Writing into a hole takes a page; where there is none, a mapping would kill and pwrite fails."""
    name = f"lossgrad_{uuid.uuid4().hex}"
    path = Path("/dev/shm") / name
    path.touch(0o600)
    try:
        os.truncate(path, 1 << 20)
        regions = SystemRegions(Budget(1, 1 << 20), ["lossgrad"], lambda _: ME)
        regions.register_system(ME, "a", f"/{name}", 0, 1 << 20)
        view = regions.view(ME, "a", 0, 1 << 20, writable=True)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(RequestError) as caught:
                view.write(b"x")
        assert caught.value.code == Code.RESOURCE_EXHAUSTED
        view.write(b"x" * (1 << 20))
        assert path.read_bytes() == b"x" * (1 << 20)
        regions.close()
    finally:
        path.unlink()
