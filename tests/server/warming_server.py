"""lossgrad-server whose worker never gets warm, as one that compiles for long. Run as a program."""

from __future__ import annotations

import sys
import time

from lossgrad_server import engine
from lossgrad_server.__main__ import main
from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.work import DeviceWorker


class WarmingWorker(CpuWorker):
    """Warms up."""

    def warm_up(self) -> None:
        time.sleep(3600)


def create_worker(device: str, threads: int | None, kind: str = "fused") -> DeviceWorker:
    return WarmingWorker()


if __name__ == "__main__":
    engine.create_worker = create_worker
    sys.exit(main())
