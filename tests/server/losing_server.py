"""lossgrad-server with a CPU that is lost at the first request of LOST_AT elements, as a GPU may be. Run as a program."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lossgrad_server import engine
from lossgrad_server.__main__ import main
from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import unpack_header
from lossgrad_server.work import BatchResult, DeviceWorker, Done, FailureKind, Pending, WorkFailure, WorkItem

LOST_AT = 13


class LosingWorker(CpuWorker):
    """Computes until its device is lost; then fails every item, as the CUDA worker does."""

    _has_lost = False

    @property
    def is_lost(self) -> bool:
        return self._has_lost

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        self._has_lost |= any(unpack_header(item.header).element_count == LOST_AT for item in items)
        if not self._has_lost:
            return super().submit(items)
        failed = WorkFailure(FailureKind.DEVICE_LOST, "the device cpu failed while it held this request")
        return Done(BatchResult([failed] * len(items), 0, 0, 0))


def create_worker(device: str, threads: int | None, kind: str = "fused") -> DeviceWorker:
    return LosingWorker()


if __name__ == "__main__":
    engine.create_worker = create_worker
    sys.exit(main())
