"""A client's memory grows by a few slices, however large the tensors and data sets are that it sends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lossgrad.sources import MappedPages
from tests.faults.resources import MIB, resident_bytes
from tests.server.serving import RunningServer

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory"
)
ELEMENTS = 48 << 20  # 192 MiB of float32
PROGRAM = """
import re, sys
import numpy as np
import lossgrad

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def array(name, mode):
    return np.lib.format.open_memmap(name, mode, np.float32, ({elements},))

input, target, gradient = array("input.npy", "r"), array("target.npy", "r"), array("gradient.npy", "r+")
with lossgrad.LossClient(sys.argv[1], max_message_bytes=64 << 20) as client:
    client.l1(input[:1000], target[:1000], gradient=True)
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    value = {call}
    print(value, memory("VmHWM") - before)
"""
CALLS = {
    "a call": "client.l1(input, target).value",
    "a gradient": "client.l1(input, target, gradient=True, gradient_out=gradient, reduction='sum').value",
    "an evaluation of one batch": "client.evaluate([(input, target)], in_flight_bytes=16 << 20)[0].mean",
    "an evaluation": (
        "client.evaluate(((input[i : i + (1 << 20)], target[i : i + (1 << 20)]) "
        "for i in range(0, len(input), 1 << 20)), lossgrad.L1(), in_flight_bytes=16 << 20)[0].mean"
    ),
    "an evaluation of small batches": (
        "client.evaluate(((input[i : i + 100_000], target[i : i + 100_000]) "
        "for i in range(0, len(input), 100_000)), lossgrad.L1(), in_flight_bytes=16 << 20)[0].mean"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that take no room on the disk: they are all holes, but for the first element."""
    folder = tmp_path_factory.mktemp("mapped")
    for name in ("input", "target", "gradient"):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (ELEMENTS,))
        array[-1] = name == "input"
        array.flush()
    return folder


@needs_linux
@pytest.mark.parametrize("kind", CALLS)
def test_what_is_mapped_and_sent_takes_the_memory_of_a_few_slices(
    kind: str, server: RunningServer, folder: Path
) -> None:
    program = PROGRAM.format(elements=ELEMENTS, call=CALLS[kind])
    command = [sys.executable, "-c", program, server.address]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, grown = map(float, done.stdout.split())
    expected = {"a gradient": 1.0, "an evaluation of one batch": 0.5 / ELEMENTS}.get(kind, 1.0 / ELEMENTS)
    assert value == expected
    assert grown < 96, grown  # four slices of 4 MiB are under way, each as arrays, encoded, in gRPC, and as an answer
    if kind == "a gradient":
        gradient = np.load(folder / "gradient.npy", mmap_mode="r")
        assert (gradient[0], gradient[-1]) == (0.0, 1.0)


@needs_linux
def test_pages_of_a_shared_map_are_let_go_and_what_was_written_is_kept(tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (8 << 20,))
    array[:] = np.arange(8 << 20)
    pages = MappedPages.of(array[100:-100].reshape(-1, 2))
    assert pages is not None
    before = resident_bytes(os.getpid())
    pages.release(0, array.nbytes - 800)
    assert before - resident_bytes(os.getpid()) > 28 * MIB
    np.testing.assert_array_equal(array, np.arange(8 << 20, dtype=np.float32))
    pages.release(5, 4000)  # no whole page


def test_a_private_map_and_plain_memory_are_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(4096, np.float32))
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    assert MappedPages.of(private) is None
    assert MappedPages.of(np.asarray(private)[3:]) is None
    assert MappedPages.of(np.ones(3)) is None
    shared = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert MappedPages.of(np.asarray(shared)[3:]) is not None
