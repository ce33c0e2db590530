"""The worker on a GPU. Its CPU twins are test_worker_semantics.py and test_worker_batches.py, with the same jobs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import DeviceWorker, FailureKind, WorkFailure, WorkResult
from tests.server.engine.building import FLOATS, Job, check, job, result_bytes, run, spec
from tests.server.engine.test_worker_batches import mixed_jobs
from tests.server.engine.test_worker_semantics import random_jobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_worker() -> DeviceWorker:
    worker = TorchWorker(torch.device("cuda:0"))
    worker.warm_up()
    return worker


@pytest.mark.parametrize("data_type", FLOATS)
def test_a_gpu_gives_the_reference_s_answers(cuda_worker: DeviceWorker, data_type: DataType) -> None:
    random = np.random.default_rng(30)
    for shape in ((), (0, 3), (7,), (5, 900)):
        mask = random.random(shape) < 0.7
        for one in random_jobs(31, data_type, shape, weight=random.uniform(0.1, 2, shape), mask=mask):
            check(cuda_worker, one)
    check(cuda_worker, job(spec(), random.normal(size=(30, 1)), random.normal(size=(1, 20)), data_type))


@pytest.mark.parametrize("beta", [0.0, 5e-324, 1e-310, 1e-50, 1.0, 1e39, np.inf])
def test_a_gpu_gives_the_reference_s_answers_at_the_extremes(cuda_worker: DeviceWorker, beta: float) -> None:
    d = [0.0, -0.0, 0.1, 1.0, 3e-7, 250.0, -60000.0, np.nan, np.inf, -np.inf]
    check(cuda_worker, job(spec(parameter=beta, reduction=Reduction.NONE), d, np.zeros(len(d)), DataType.FLOAT64))


def test_company_and_pieces_change_no_bits_on_a_gpu(cuda_worker: DeviceWorker) -> None:
    jobs = mixed_jobs()
    alone = [result_bytes(run(cuda_worker, one)) for one in jobs]
    for outcomes in (
        cuda_worker.submit([one.item for one in jobs]).result().outcomes,
        TorchWorker(torch.device("cuda:0"), piece_elements=4096).run([one.item for one in jobs]).outcomes,
    ):
        for outcome, expected in zip(outcomes, alone, strict=True):
            assert isinstance(outcome, WorkResult)
            assert result_bytes(outcome) == expected


def test_a_request_too_large_for_a_gpu_fails_alone(cuda_worker: DeviceWorker) -> None:
    side = 1 << 20
    huge: Job = job(spec(), np.zeros((side, 1)), np.zeros((1, side)))
    good = job(spec(LossKind.L1), [3.0], [0.0])
    failed, outcome = cuda_worker.submit([huge.item, good.item]).result().outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.OUT_OF_MEMORY
    assert isinstance(outcome, WorkResult)
