"""CUDA workers with little memory, and jobs of every path that there is through them."""

from __future__ import annotations

import numpy as np

from tests.server.engine.cuda_simulation import SimulatedDevice  # isort: skip

from lossgrad_server.engine.cuda_device import Device
from lossgrad_server.engine.cuda_worker import CudaWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import WorkFailure, WorkResult
from tests.server.engine.building import FLOATS, Job, job, result_bytes, spec

KIB = 1024


def make_worker(
    device: Device | None = None, *, slot_kib: int = 256, alone_kib: int = 16, piece_kib: int = 4
) -> CudaWorker:
    """Return a worker with little memory, so that small jobs are split and cut as large ones are. Not warmed up."""
    worker = CudaWorker(
        device or SimulatedDevice(), slot_bytes=slot_kib * KIB, alone_bytes=alone_kib * KIB, piece_bytes=piece_kib * KIB
    )
    worker.allocate()
    return worker


def jobs_of_every_path() -> list[Job]:
    """Return small jobs of every kind of launch, NaN and infinity among their data."""
    random = np.random.default_rng(50)
    jobs: list[Job] = []
    kinds, reductions = list(LossKind), list(Reduction)
    for index, shape in enumerate([(1,), (17, 3), (1025,), (0, 2), (40, 9), (2, 1030), (3, 1, 2), (64,)]):
        x, y = random.normal(size=shape), random.normal(size=shape)
        if x.size and index % 3 == 0:
            x.flat[0], y.flat[-1] = np.nan, np.inf
        specs = [
            spec(kinds[(index + at) % 4], 0.3 + index, reductions[(index + at) % 5]) for at in range(1 + index % 3)
        ]
        weight = random.uniform(0, 2, size=shape) if index % 2 else None
        mask = random.random(shape) < 0.8 if index % 4 > 1 else None
        jobs.append(job(specs, x, y, FLOATS[index % 4], weight=weight, mask=mask))
    jobs.append(job(spec(reduction=Reduction.SUM), random.normal(size=(9, 1)), random.normal(size=(1, 11))))
    jobs.append(job(spec(), random.normal(size=7), np.arange(7), DataType.FLOAT16, target_type=DataType.INT32))
    return jobs


def outcome_bytes(outcome: WorkResult | WorkFailure) -> tuple[bytes, ...]:
    assert isinstance(outcome, WorkResult), outcome
    return result_bytes(outcome)
