"""The CUDA worker on a GPU, its kernels compiled. Its CPU twins are test_cuda_semantics.py and test_cuda_batches.py."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.server.engine.cuda_simulation import needs_gpu  # isort: skip

from lossgrad_server.engine.cuda_worker import CudaWorker
from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import FailureKind, WorkFailure, WorkResult
from tests.server.engine.building import FLOATS, Job, answers, check, job, result_bytes, run, spec
from tests.server.engine.cuda_building import jobs_of_every_path
from tests.server.engine.test_cuda_semantics import (  # noqa: F401  # run here with this module's worker
    test_a_batch_of_every_loss_reduction_and_shape_is_the_reference_s,
    test_a_gradient_is_rounded_once_to_a_half,
    test_denormal_numbers_are_not_flushed,
    test_every_number_is_the_plain_worker_s,
    test_lengths_around_blocks_and_chunks_are_the_reference_s,
    test_samples_of_any_length_are_the_reference_s,
    test_sixteen_specs_over_the_same_operands_are_the_reference_s,
    test_targets_that_are_not_floating_point_are_the_reference_s,
)
from tests.server.engine.test_worker_batches import mixed_jobs
from tests.server.engine.test_worker_semantics import (  # noqa: F401  # these, too
    test_a_loss_beyond_its_type_is_finite_as_a_sum_and_infinite_as_an_element,
    test_a_loss_scaled_float16_gradient_is_right_beyond_30_million_elements_worth_of_divisor,
    test_a_sample_without_elements_has_mean_nan_and_harms_no_other,
    test_an_empty_mean_is_nan_and_an_empty_sum_0,
    test_any_byte_but_zero_is_true,
    test_broadcast_operands_get_their_gradients_summed_back,
    test_infinity_minus_infinity_is_nan,
    test_kinks_nan_and_infinity,
    test_no_loss_is_a_negative_zero,
    test_nothing_passes_a_mask,
    test_right_where_torch_overflows_or_underflows,
    test_rows_longer_than_a_chunk_are_the_reference_s,
    test_the_extremes_of_beta_and_delta_are_the_reference_s,
    test_weights_and_a_denominator_by_hand,
    test_zero_weights_give_a_mean_of_nan,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
KIB = 1024


@pytest.fixture(scope="module")
def worker() -> CudaWorker:
    worker = CudaWorker(torch.device("cuda:0"))
    worker.warm_up()
    return worker


@pytest.fixture(scope="module")
def small_worker() -> CudaWorker:
    """Give a worker that splits batches and cuts requests where others do not."""
    worker = CudaWorker(torch.device("cuda:0"), slot_bytes=256 * KIB, alone_bytes=16 * KIB, piece_bytes=4 * KIB)
    worker.allocate()
    return worker


def test_company_and_pieces_change_no_bits(worker: CudaWorker, small_worker: CudaWorker) -> None:
    random = np.random.default_rng(80)
    jobs = mixed_jobs() + jobs_of_every_path()
    alone = [result_bytes(run(worker, one)) for one in jobs]
    for _ in range(50):
        chosen = random.integers(0, len(jobs), size=random.integers(1, 40))
        for one in (worker, small_worker):
            outcomes = one.run([jobs[index].item for index in chosen]).outcomes
            for index, outcome in zip(chosen, outcomes, strict=True):
                assert isinstance(outcome, WorkResult)
                assert result_bytes(outcome) == alone[index]


def test_batches_under_way_at_a_time_do_not_touch_each_other(small_worker: CudaWorker) -> None:
    jobs = jobs_of_every_path()
    alone = [result_bytes(run(small_worker, one)) for one in jobs]
    for _ in range(50):
        pendings = [
            small_worker.submit([one.item for one in jobs[start : start + 2]]) for start in range(0, len(jobs), 2)
        ]
        for start, pending in enumerate(pendings):
            for outcome, expected in zip(pending.result().outcomes, alone[2 * start : 2 * start + 2], strict=True):
                assert isinstance(outcome, WorkResult)
                assert result_bytes(outcome) == expected


def test_ten_million_elements_are_as_good_as_the_plain_worker_s(worker: CudaWorker) -> None:
    random = np.random.default_rng(81)
    x, y = random.standard_normal((2, 10_000_019), np.float32)
    plan = job([spec(), spec(LossKind.MSE, reduction=Reduction.SUM), spec(LossKind.HUBER, 0.3)], x[:1], y[:1]).plan
    tensor = dataclasses.replace(plan.input, shape=x.shape)
    one = Job(dataclasses.replace(plan, input=tensor, target=tensor), (x.tobytes(), y.tobytes()))
    ours, theirs = run(worker, one), run(TorchWorker(torch.device("cpu")), one)
    # The gradient to the bit; sums of ten million terms that are added in another order, to 1e-14.
    assert [bytes(output) for output in ours.outputs] == [bytes(output) for output in theirs.outputs]
    for our, their in zip(
        np.frombuffer(ours.scalars, "<f8")[::4], np.frombuffer(theirs.scalars, "<f8")[::4], strict=True
    ):
        assert our == pytest.approx(their, rel=1e-14)
    assert result_bytes(run(worker, one)) == result_bytes(ours)


def test_a_request_too_large_for_a_gpu_fails_alone(worker: CudaWorker) -> None:
    side = 1 << 20
    huge = job(spec(), np.zeros((side, 1)), np.zeros((1, side)))
    failed, outcome = worker.run([huge.item, job(spec(LossKind.L1), [3.0], [0.0]).item]).outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.OUT_OF_MEMORY
    assert int(failed.message.split("about ")[1].split()[0]) > 4 * side * side
    assert int(failed.message.split("where ")[1].split()[0]) > 0
    assert isinstance(outcome, WorkResult)
    assert not worker.is_lost
    check(worker, job(spec(), [1.0, 2.0], [0.0, 0.0]))


def test_memory_is_used_again(worker: CudaWorker) -> None:
    large = job(
        [spec(reduction=reduction) for reduction in list(Reduction)], np.ones((900, 1000)), np.zeros((900, 1000))
    )
    readings: list[int] = []
    for _ in range(5):
        run(worker, large)
        readings.append(torch.cuda.memory_reserved(0))
    assert all(before == after for before, after in pairwise(readings[1:]))


_LOSING = """
import torch
from lossgrad_server.engine import cuda_batch
from lossgrad_server.engine.cuda_worker import CudaWorker
from tests.server.engine.building import job, spec

worker = CudaWorker(torch.device("cuda:0"))
worker.warm_up()
good = job(spec(), [3.0], [0.0]).item
before = worker.submit([good])
assert type(before.result().outcomes[0]).__name__ == "WorkResult"
compute = cuda_batch.compute

def failing(arena, layout):
    compute(arena, layout)
    torch._assert_async(torch.zeros(1, device=arena.device))

cuda_batch.compute = failing
kinds = [outcome.kind.name for outcome in worker.run([good, good]).outcomes]
cuda_batch.compute = compute
kinds += [outcome.kind.name for outcome in worker.run([good]).outcomes]
worker.close()
print(worker.is_lost, *kinds)
"""


def test_a_failed_device_is_lost_for_good() -> None:
    done = subprocess.run([sys.executable, "-c", _LOSING], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "DEVICE_LOST", "DEVICE_LOST", "DEVICE_LOST"], done.stderr


@pytest.mark.parametrize("data_type", FLOATS)
def test_denormal_gradients_of_a_large_mean_survive(worker: CudaWorker, data_type: DataType) -> None:
    tiny = {DataType.FLOAT16: 1e-7, DataType.BFLOAT16: 1e-39, DataType.FLOAT32: 1e-44, DataType.FLOAT64: 1e-322}
    one = job(spec(LossKind.L1, denominator=1.0, scale=tiny[data_type]), np.ones(5000), np.zeros(5000), data_type)
    check(worker, one)
    (answer,) = answers(worker, one)
    gradient: Any = answer.input_gradient
    assert gradient.min() > 0
