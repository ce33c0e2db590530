"""Free memory goes back to the system, and nobody who allocates meanwhile waits for it. In a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lossgrad_api.allocator import keep_large_blocks, release_free_memory

MIB = 1 << 20
# Fills the heap with large and small blocks, frees most of them, and releases memory while another thread allocates.
PROGRAM = """
import ctypes, json, threading, time
from pathlib import Path
from lossgrad_api import allocator

allocator.keep_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


blocks = [bytearray(b"x") * size for size in (64 << 20, 3 << 20, 700_000, 40_000) for _ in range(6)]
kept = blocks[::5]
before = [bytes(block) for block in kept]
full = resident()
del blocks

ended, stop, started = [], threading.Event(), threading.Event()


def allocate():
    while not stop.is_set():
        libc.free(libc.malloc(200_000))
        ended.append(time.perf_counter())
        started.set()
        time.sleep(0.0002)


thread = threading.Thread(target=allocate)
thread.start()
started.wait()
begun = time.perf_counter()
released = allocator.release_free_memory()
done = time.perf_counter()
stop.set()
thread.join()
print(json.dumps({
    "released": released,
    "given_back": full - resident(),
    "allocations": sum(begun < at < done for at in ended),
    "seconds": done - begun,
    "intact": before == [bytes(block) for block in kept],
}))
"""


@pytest.mark.skipif(not keep_large_blocks(), reason="the allocator is not glibc's")
def test_free_memory_goes_back_while_others_allocate() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["released"]
    assert found["intact"]
    assert found["given_back"] > 250 * MIB, found
    # While malloc_trim gives as much back by itself, nobody allocates anything.
    assert found["allocations"] >= 5, found


def test_where_the_allocator_is_another_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossgrad_api.allocator._glibc", lambda: None)
    assert not release_free_memory()
