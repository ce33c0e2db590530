"""What the CUDA worker answers, held against the reference: its kernels run in Triton's interpreter, on the CPU.

Its twin on a GPU is test_cuda_gpu.py. The facts are those of the plain worker's tests, with this worker in its place.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.server.engine.cuda_simulation import SimulatedDevice, compute_on_cpu, needs_interpreter  # isort: skip

from lossgrad_server.engine import cuda_folds
from lossgrad_server.engine.cuda_fields import BLOCK_ELEMENTS, BLOCK_LOG2, CHUNK_ELEMENTS, FoldField, FoldFlag
from lossgrad_server.engine.cuda_worker import CudaWorker
from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction, TensorPlan
from lossgrad_server.work import DeviceWorker, WorkResult
from tests import reference
from tests.server.engine.building import FLOATS, Job, answers, check, job, spec
from tests.server.engine.test_worker_semantics import (  # noqa: F401  # run here with this module's worker
    SHAPES,
    random_jobs,
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
    test_scalars_are_sent_only_for_scalar_reductions_and_outputs_only_when_asked,
    test_shards_with_a_common_denominator_add_up_to_the_whole,
    test_the_extremes_of_beta_and_delta_are_the_reference_s,
    test_weights_and_a_denominator_by_hand,
    test_zero_weights_give_a_mean_of_nan,
)

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def worker() -> DeviceWorker:
    worker = CudaWorker(SimulatedDevice(), slot_bytes=1 << 22, alone_bytes=1 << 20, piece_bytes=1 << 18)
    worker.warm_up()
    return worker


@pytest.mark.parametrize("data_type", FLOATS)
@pytest.mark.parametrize("extras", ["nothing", "weight", "mask", "both", "denominators"])
def test_a_batch_of_every_loss_reduction_and_shape_is_the_reference_s(
    worker: DeviceWorker, extras: str, data_type: DataType
) -> None:
    random = np.random.default_rng(40)
    jobs: list[Job] = []
    for shape in SHAPES:
        options: dict[str, Any] = {"denominators": extras == "denominators"}
        if extras in ("weight", "both", "denominators"):
            weight_type = DataType.FLOAT64 if extras == "both" else data_type
            options |= {"weight": random.uniform(0.1, 3, size=shape), "weight_type": weight_type}
        if extras in ("mask", "both"):
            options["mask"] = random.random(shape) < 0.6
        jobs += random_jobs(41, data_type, shape, **options)
    outcomes = worker.submit([one.item for one in jobs]).result().outcomes
    for one, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, WorkResult)
        reference.assert_matches(one.plan, one.operands, outcome)


@pytest.mark.parametrize("data_type", [DataType.BFLOAT16, DataType.FLOAT64])
@pytest.mark.parametrize("around", [16, BLOCK_ELEMENTS, CHUNK_ELEMENTS])
def test_lengths_around_blocks_and_chunks_are_the_reference_s(
    worker: DeviceWorker, around: int, data_type: DataType
) -> None:
    random = np.random.default_rng(42)
    specs = [spec(parameter=0.7), spec(LossKind.MSE, reduction=Reduction.SUM)]
    for count in (around - 1, around, around + 1):
        weight = random.uniform(0.1, 2, count)
        mask = random.random(count) < 0.9
        check(worker, job(specs, random.normal(size=count), random.normal(size=count), data_type))
        check(worker, job(specs[0], random.normal(size=count), np.zeros(count), data_type, weight=weight, mask=mask))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 65, 511, 512, 513, 1023, 1024, 1025, 4096, 4097])
@pytest.mark.parametrize("extras", ["nothing", "both"])
def test_samples_of_any_length_are_the_reference_s(worker: DeviceWorker, extras: str, length: int) -> None:
    random = np.random.default_rng(43)
    # More rows than one program holds, and not a multiple of it.
    shape = (min(2 * (BLOCK_ELEMENTS // length) + 1, 2051), length)
    options: dict[str, Any] = {}
    if extras == "both":
        options = {"weight": random.uniform(0.1, 2, shape), "mask": random.random(shape) < 0.9}
    specs = [spec(parameter=0.7, reduction=Reduction.SAMPLE_MEAN), spec(reduction=Reduction.SAMPLE_SUM, gradient=False)]
    check(worker, job(specs, random.normal(size=shape), random.normal(size=shape), **options))


@pytest.mark.parametrize("per_row", [0, 1, 2, 3, 700, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("output_type", FLOATS)
def test_partials_of_any_number_are_folded_and_divided(output_type: DataType, per_row: int) -> None:
    random = np.random.default_rng(44)
    row_count = 5
    rows_log2 = (BLOCK_ELEMENTS // max(per_row, 1)).bit_length() - 1 if per_row < BLOCK_ELEMENTS else 0
    while rows_log2 and (1 << rows_log2) * per_row > BLOCK_ELEMENTS:
        rows_log2 -= 1
    partials = random.normal(size=(row_count, per_row))
    divisors = random.uniform(1, 2, size=row_count)
    record_start, tiles_start, divisors_start, output_start, partials_start = 0, 256, 1024, 2048, 4096
    arena = torch.full((partials_start + partials.nbytes,), 0xFF, dtype=torch.uint8)
    fields = {
        FoldField.FLAGS: FoldFlag.DIVISOR,
        FoldField.PARTIALS: partials_start,
        FoldField.ROW_COUNT: row_count,
        FoldField.PARTIALS_PER_ROW: per_row,
        FoldField.ROWS_LOG2: rows_log2,
        FoldField.DIVISOR: divisors_start,
        FoldField.DIVISOR_STRIDE: 1,
        FoldField.OUTPUT_TYPE: output_type,
        FoldField.OUTPUT: output_start,
    }
    tile_count = -(-row_count // (1 << rows_log2))
    tiles = np.array([[record_start, tile] for tile in range(tile_count)])
    memory = arena.numpy()
    for start, values in (
        (record_start, np.array([fields[field] for field in FoldField])),
        (tiles_start, tiles),
        (divisors_start, divisors),
        (partials_start, partials),
    ):
        memory[start : start + values.nbytes] = np.ascontiguousarray(values).view(np.uint8).ravel()
    with compute_on_cpu():
        kernels: Any = cuda_folds
        kernels.fold_kernel[(tile_count,)](arena, arena[tiles_start:].view(torch.int64), LEVELS=BLOCK_LOG2)
    plan = TensorPlan(output_type, (row_count,))
    written = reference.decode(memory[output_start : output_start + plan.byte_count].tobytes(), plan)
    expected = [math.fsum(row) / divisor for row, divisor in zip(partials, divisors, strict=True)]
    reference.assert_close(written, np.array(expected), output_type, 8, "fold", cancelled=per_row)


@pytest.mark.parametrize("data_type", FLOATS)
def test_every_number_is_the_plain_worker_s(worker: DeviceWorker, data_type: DataType) -> None:
    # Both use only what IEEE 754 fixes, in the same order up to a block's length; so nothing may differ.
    random = np.random.default_rng(45)
    plain = TorchWorker(torch.device("cpu"))
    specs = [
        spec(kind, 0.3, reduction, scale=1.7)
        for kind, reduction in zip(list(LossKind) * 2, list(Reduction) * 2, strict=False)
    ]
    for shape in ((5,), (3, 317), (1024,)):
        all_options: list[dict[str, Any]] = [
            {},
            {"weight": random.uniform(-1, 2, shape), "mask": random.random(shape) < 0.8},
        ]
        for options in all_options:
            # Values of every exponent, denormal ones among them. What overflows becomes NaN.
            exponents = (-1080, 1000) if data_type == DataType.FLOAT64 else (-30, 15)
            x, y = (np.ldexp(random.normal(size=shape), random.integers(*exponents, shape)) for _ in range(2))
            one = job(specs, x, y, data_type, **options)
            ours, theirs = answers(worker, one), answers(plain, one)
            for field in dataclasses.fields(ours[0]):
                for our, their in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(getattr(our, field.name), getattr(their, field.name))


def test_denormal_numbers_are_not_flushed(worker: DeviceWorker) -> None:
    smallest = {DataType.FLOAT16: 2.0**-24, DataType.BFLOAT16: 2.0**-133, DataType.FLOAT32: 2.0**-149}
    for data_type, unit in {**smallest, DataType.FLOAT64: 2.0**-1074}.items():
        specs = [spec(LossKind.L1, reduction=Reduction.NONE), spec(LossKind.HUBER, 1.0, Reduction.NONE)]
        absolute, huber = answers(worker, job(specs, [unit, -3 * unit], [0.0, 0.0], data_type))
        np.testing.assert_array_equal(absolute.loss, [unit, 3 * unit])
        np.testing.assert_array_equal(huber.input_gradient, [unit, -3 * unit])
        (scaled,) = answers(worker, job(spec(LossKind.L1, scale=unit, denominator=1.0), [1.0], [0.0], data_type))
        np.testing.assert_array_equal(scaled.input_gradient, [unit])


def test_a_gradient_is_rounded_once_to_a_half(worker: DeviceWorker) -> None:
    # 1 + 2^-11 + 2^-40 lies just above a tie of float16, on it in float32.
    scale = 1 + 2.0**-11 + 2.0**-40
    (result,) = answers(worker, job(spec(LossKind.L1, reduction=Reduction.SUM, scale=scale), [1.0], [0.0], FLOATS[0]))
    np.testing.assert_array_equal(result.input_gradient, [1 + 2.0**-10])
    scale = 1 + 2.0**-8 + 2.0**-40
    (result,) = answers(worker, job(spec(LossKind.L1, reduction=Reduction.SUM, scale=scale), [1.0], [0.0], FLOATS[1]))
    np.testing.assert_array_equal(result.input_gradient, [1 + 2.0**-7])


@pytest.mark.parametrize("data_type", [DataType.INT64, DataType.INT8, DataType.UINT8, DataType.BOOL])
def test_targets_that_are_not_floating_point_are_the_reference_s(worker: DeviceWorker, data_type: DataType) -> None:
    random = np.random.default_rng(46)
    target = random.integers(0, 2 if data_type == DataType.BOOL else 100, size=300)
    if data_type == DataType.INT64:
        target = target * (1 << 40) + 1  # not all of it fits float32
    specs = [spec(parameter=3.0, reduction=reduction) for reduction in list(Reduction)]
    check(worker, job(specs, random.normal(size=300), target, DataType.BFLOAT16, target_type=data_type))


def test_sixteen_specs_over_the_same_operands_are_the_reference_s(worker: DeviceWorker) -> None:
    random = np.random.default_rng(47)
    specs = [spec(LossKind.SMOOTH_L1, 0.1 * index, list(Reduction)[index % 5]) for index in range(16)]
    check(worker, job(specs, random.normal(size=(7, 190)), random.normal(size=(7, 190)), DataType.FLOAT16))
