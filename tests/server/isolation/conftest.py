"""A worker in a process of its own, shared by the tests of this folder: loading torch takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.isolation.keeper import ProcessSettings
from lossgrad_server.isolation.memory import why_impossible
from lossgrad_server.isolation.worker import IsolatedWorker
from tests.server.isolation.failing_nursery import PROGRAM

LIMIT_SECONDS = 30.0
THREADS = 2


@pytest.fixture(scope="session")
def isolated() -> Iterator[IsolatedWorker]:
    if reason := why_impossible():
        pytest.skip(reason)
    worker = IsolatedWorker(ProcessSettings("cpu", THREADS, "fused", "warning", program=PROGRAM), LIMIT_SECONDS)
    worker.warm_up()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def thread_worker() -> Iterator[CpuWorker]:
    worker = CpuWorker(THREADS)
    worker.warm_up()
    yield worker
    worker.close()
