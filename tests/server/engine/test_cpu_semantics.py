"""The compiled CPU engine, held against hand arithmetic, the reference and torch: the plain one's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.work import DeviceWorker
from tests.server.engine.test_against_torch import *  # noqa: F403
from tests.server.engine.test_worker_semantics import *  # type: ignore[assignment]  # noqa: F403
from tests.server.engine.test_worker_totals import *  # noqa: F403


@pytest.fixture(scope="module")
def worker() -> Iterator[DeviceWorker]:
    worker = CpuWorker(2)
    worker.warm_up()
    yield worker
    worker.close()
