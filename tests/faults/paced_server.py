"""A server program whose device has a known pace: lossgrad-server with a worker that takes so long for each request.

Run as `python -m tests.faults.paced_server MILLISECONDS [flags of lossgrad-server]`. What is computed is right; only slow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from unittest import mock

from lossgrad_server import __main__, engine
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import DeviceWorker, Done, WorkItem


class PacedWorker:
    """A worker that takes `seconds` for each request, whatever its size, one batch at a time."""

    def __init__(self, inner: DeviceWorker, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def slots(self) -> int:
        return 1

    @property
    def inline_work(self) -> int:
        return 0  # the event loop must not sleep

    @property
    def is_lost(self) -> bool:
        return False

    def is_large(self, plan: JobPlan) -> bool:
        return False

    def warm_up(self) -> None:
        self._inner.warm_up()

    def submit(self, items: Sequence[WorkItem]) -> Done:
        done_at = time.monotonic() + self._seconds * len(items)
        result = self._inner.submit(items).result()
        time.sleep(max(0.0, done_at - time.monotonic()))
        return Done(result)

    def close(self) -> None:
        self._inner.close()


def main() -> int:
    milliseconds = float(sys.argv.pop(1))
    create_worker = engine.create_worker

    def create_paced(device: str, threads: int | None, kind: str) -> PacedWorker:
        return PacedWorker(create_worker(device, threads, kind), milliseconds / 1e3)

    with mock.patch.object(engine, "create_worker", create_paced):
        return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
