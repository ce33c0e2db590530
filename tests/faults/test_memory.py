"""Memory that runs out: the device's, and the container's (R29, R32)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from tests.server.engine.cuda_simulation import SimulatedDevice, needs_interpreter  # isort: skip

import lossgrad
from lossgrad_server.engine import cuda_batch, cuda_launch
from tests.faults.resources import MIB, resident_bytes
from tests.prometheus import free_port
from tests.server.calling import Connect, failure_of, stub_on
from tests.server.engine.cuda_building import make_worker
from tests.server.program import Program
from tests.server.requests import L1, request
from tests.server.serving import HeldWorker, StartServer, eventually

# What the device of R29 can hold at a time, in elements.
DEVICE_ELEMENTS = 500


class ColdWorker(HeldWorker):
    """A CUDA worker on a simulated device, which Triton's interpreter warms up by its first request."""

    @property
    def device(self) -> str:
        return "cpu"  # of which there is something to be told; of a simulated one there is not

    def warm_up(self) -> None:
        pass


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let launches of more than DEVICE_ELEMENTS run out of memory; give the sizes of those that did."""
    failed: list[int] = []

    def compute(arena: Any, layout: Any) -> None:
        elements = sum(template.plan.element_count for template in layout.templates)
        if elements > DEVICE_ELEMENTS:
            failed.append(elements)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        cuda_launch.compute(arena, layout)

    monkeypatch.setattr(cuda_batch, "compute", compute)
    return failed


@needs_interpreter
def test_r29_a_batch_beyond_the_devices_memory_is_split_and_every_answer_right(
    start_server: StartServer, connect: Connect, small_device: list[int]
) -> None:
    worker = ColdWorker(make_worker(SimulatedDevice(), alone_kib=1 << 10))
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    chance = np.random.default_rng(29)
    pairs = [chance.standard_normal((2, int(size)), np.float32) for size in chance.integers(1, DEVICE_ELEMENTS, 40)]
    worker.hold()
    first = stub.ComputeLoss.future(request([1.0], [0.0], L1))
    worker.wait_for_batch()
    calls = [stub.ComputeLoss.future(request(*pair, L1), timeout=100) for pair in pairs]
    too_large = stub.ComputeLoss.future(
        request(np.ones(DEVICE_ELEMENTS + 1), np.zeros(DEVICE_ELEMENTS + 1), L1), timeout=100
    )
    eventually(lambda: running.batcher.admitted_requests == 42)  # one batch, beyond the device's memory
    worker.release()
    assert first.result().results[0].scalar == 1.0
    with pytest.raises(grpc.RpcError) as caught:
        too_large.result()
    for (input, target), call in zip(pairs, calls, strict=True):
        wanted = torch.nn.functional.l1_loss(torch.from_numpy(input).double(), torch.from_numpy(target).double())
        assert call.result().results[0].scalar == pytest.approx(wanted.item(), rel=1e-6)
    error = failure_of(caught.value)
    print(
        f"\nout of device memory: a batch of {max(small_device)} elements where {DEVICE_ELEMENTS} fit was split, "
        f"{len(small_device)} launches failed on the way; 40 of 40 right, the one that fits never: {error.message}"
    )
    assert max(small_device) > 4 * DEVICE_ELEMENTS
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.info.reason == "OUT_OF_DEVICE_MEMORY"
    assert "Tried to allocate" not in error.message
    # The worker lives.
    assert stub.ComputeLoss(request([3.0], [0.0], L1)).results[0].scalar == 3.0


CGROUPS = Path("/sys/fs/cgroup/memory")
SPARE_BYTES = 96 * MIB


@pytest.fixture
def group() -> Iterator[Path]:
    """Give a control group of the test's own for memory: what a container's limit is."""
    folder = CGROUPS / f"lossgrad-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here: {error}")
    yield folder
    eventually(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


class Supervised:
    """A server in a control group, started again whenever it ends, as `restart: unless-stopped` does."""

    def __init__(self, group: Path) -> None:
        self._group = group
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.codes: list[int] = []
        self._is_over = False
        self.program = self._start()
        self._thread = threading.Thread(target=self._watch)

    def _start(self) -> Program:
        # Its queue takes more than the group has: a mistake in the settings, as it happens.
        program = Program(f"--port={self._port}", "--metrics-port=-1", "--threads=1")
        (self._group / "cgroup.procs").write_text(str(program.process.pid))
        program.address()
        return program

    def _watch(self) -> None:
        while True:
            code = self.program.process.wait()
            if self._is_over:
                return
            self.codes.append(code)
            self.program.close()
            # What killed it was too little memory for what was asked, so the one after gets enough to start.
            self.program = self._start()

    def __enter__(self) -> Supervised:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.program.process.kill()
        self._thread.join()
        self.program.close()


@pytest.mark.faults
def test_r32_a_server_beyond_its_containers_memory_is_killed_and_callers_recover(group: Path) -> None:
    x, y = np.full(64, 3, np.float32), np.ones(64, np.float32)
    big = np.ones(24 * MIB // 4, np.float32)
    with Supervised(group) as supervised, lossgrad.LossClient(supervised.address, timeout=30) as client:
        assert client.l1(x, y).value == 2.0
        limit = resident_bytes(supervised.program.process.pid) + SPARE_BYTES
        (group / "memory.limit_in_bytes").write_text(str(limit))

        def ask() -> None:
            with lossgrad.LossClient(supervised.address, retries=0, timeout=20) as greedy:
                try:
                    greedy.l1(big, big, reduction="none", gradient=True)
                except lossgrad.LossgradError as error:
                    failures.append(error)

        failures: list[lossgrad.LossgradError] = []
        callers = [threading.Thread(target=ask) for _ in range(16)]
        for caller in callers:
            caller.start()
        eventually(lambda: supervised.codes)
        killed_at = time.monotonic()
        for caller in callers:
            caller.join()
        value = None
        while value is None:
            try:
                value = client.l1(x, y, timeout=30).value
            except lossgrad.Unavailable:
                assert time.monotonic() - killed_at < 60, supervised.codes
                time.sleep(0.2)
        recovered = time.monotonic() - killed_at
    kinds = sorted({type(error).__name__ for error in failures})
    print(
        f"\n{limit / MIB:.0f} MiB and no more: killed with {supervised.codes[0]} (a container's exit code "
        f"{128 - supervised.codes[0]}); {len(failures)} callers got {kinds}; served {recovered:.1f} s after the kill"
    )
    assert supervised.codes[0] == -signal.SIGKILL
    assert value == 2.0
    assert set(kinds) <= {"Unavailable", "Overloaded"}
