"""A nursery whose processes have the CUDA worker on a simulated device that does everything as late as may be."""

from __future__ import annotations

import sys

from tests.server.engine.cuda_simulation import LateDevice  # isort: skip

from lossgrad_server.engine.cuda_worker import CudaWorker
from lossgrad_server.isolation import nursery
from lossgrad_server.isolation.device_process import Description
from tests.server.engine.cuda_building import KIB

PROGRAM = ("-m", "tests.server.isolation.simulated_nursery")


class SimulatedWorker(CudaWorker):
    """The CUDA worker without its warm-up of every kernel, which the interpreter takes minutes for."""

    def warm_up(self) -> None:
        self.allocate()


def create(_: object) -> SimulatedWorker:
    return SimulatedWorker(LateDevice(), slot_bytes=256 * KIB, alone_bytes=16 * KIB, piece_bytes=4 * KIB)


if __name__ == "__main__":
    sys.exit(
        nursery.main(
            create=create, tell=lambda _: Description("simulated", "GPU-0", "simulated"), tell_memory=lambda _: {}
        )
    )
