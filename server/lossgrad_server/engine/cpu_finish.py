"""What stands before and after the walks: totals of weights, what gradients are multiplied by, the losses themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_intrinsics import array_at, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    CHUNK,
    MASK,
    SCRATCH_INPUT,
    SHORT_ROW,
    SPEC_DIVISOR,
    SPEC_EDGE,
    SPEC_FACTOR,
    STATE_COUNT,
    STATE_WEIGHT_SUM,
    WEIGHT,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_passes import quotient, row_loss, store
from lossgrad_server.engine.cpu_sums import compensated, two_sum
from lossgrad_server.engine.cpu_tables import (
    frame_at,
    job_of,
    output_of,
    spec_of,
    spec_state,
    state_of,
)
from lossgrad_server.jobs import Reduction
from lossgrad_server.work import SPEC_RESULT

_MEAN, _SUM, _SAMPLE_MEAN = int(Reduction.MEAN), int(Reduction.SUM), int(Reduction.SAMPLE_MEAN)
_RESULT_BYTES = SPEC_RESULT.size


@inlined
def _combine(frame: Any, first: Any, count: Any) -> Any:
    """Add partial sums in the order of their index. Returns the sum, and what rounding lost of it."""
    partials = state_of(frame, first, count)
    total = 0.0
    lost = 0.0
    for index in range(count):
        total, error = two_sum(total, partials[index])
        lost += error
    return total, (lost if np.isfinite(total) else 0.0)


@native("int64(int64, int64, int64)")
def divide_rows(address: int, begin: int, end: int) -> int:
    """Add up the weights of samples of more than SHORT_ROW elements, or of none."""
    frame = frame_at(address)
    job = job_of(frame)
    if 0 < job.row_length <= SHORT_ROW:
        return 0
    chunks = (job.row_length + CHUNK - 1) // CHUNK
    of_rows = state_of(frame, job.row_divisors, job.row_count)
    for row in range(begin, end):
        total, lost = _combine(frame, job.row_planes + row * chunks, chunks)
        of_rows[row] = total + lost
    return 0


@native("int64(int64)")
def prepare(address: int) -> int:
    """Add up the weights, and work out what each spec's gradient is multiplied by."""
    frame = frame_at(address)
    job = job_of(frame)
    totals = state_of(frame, 0, 2)
    if job.types[WEIGHT] != 0 or job.types[MASK] != 0:
        total, lost = _combine(frame, job.flat_planes, job.flat_units)
        count, _ = _combine(frame, job.flat_planes + job.flat_units, job.flat_units)
        totals[STATE_COUNT] = count
        totals[STATE_WEIGHT_SUM] = np.nan if np.isnan(total) else compensated(total, lost)
    else:
        totals[STATE_COUNT] = job.element_count
        totals[STATE_WEIGHT_SUM] = job.element_count
    for index in range(job.spec_count):
        spec = spec_of(frame, index)
        own = spec_state(frame, index)
        divisor = 1.0
        if spec.reduction == _MEAN or spec.reduction == _SAMPLE_MEAN:
            if not np.isnan(spec.denominator):
                divisor = spec.denominator
            elif spec.reduction == _MEAN:
                divisor = totals[STATE_WEIGHT_SUM]
            elif not spec.divides_rows:
                divisor = float(job.row_length)
        own[SPEC_DIVISOR] = divisor
        own[SPEC_FACTOR] = _ratio(spec.slope * spec.gradient_scale, spec.divisor, divisor)
        own[SPEC_EDGE] = _ratio(spec.edge * spec.gradient_scale, 1.0, divisor)
    return 0


@inlined
def _ratio(value: Any, first: Any, second: Any) -> Any:
    """Return value / (first * second), rounded about once."""
    product = first * second
    result = value / product
    if not (np.isfinite(result) and np.isfinite(product)) or product == 0.0:
        return value / first / second
    error = fused_multiply_add(first, second, -product)
    remainder = fused_multiply_add(-result, product, value) - result * error
    return result + remainder / product


@native("int64(int64, int64, int64)")
def finish_rows(address: int, begin: int, end: int) -> int:
    """Add up the losses of samples of more than SHORT_ROW elements, or of none, and write them."""
    frame = frame_at(address)
    job = job_of(frame)
    if 0 < job.row_length <= SHORT_ROW:
        return 0
    chunks = (job.row_length + CHUNK - 1) // CHUNK
    value = array_at(frame.scratch + SCRATCH_INPUT, 1, np.float64)
    for index in range(job.spec_count):
        spec = spec_of(frame, index)
        if spec.is_per_sample:
            for row in range(begin, end):
                total, lost = _combine(frame, job.row_planes + job.row_units * (2 * index + 1) + row * chunks, chunks)
                value[0] = row_loss(frame, job, spec, index, row, total, lost)
                store(frame, job, spec.loss_output, row, 1, 1.0, frame.scratch + SCRATCH_INPUT)
    return 0


@native("int64(int64)")
def finish(address: int) -> int:
    """Add up the losses over all elements and write each spec's SPEC_RESULT record."""
    frame = frame_at(address)
    job = job_of(frame)
    totals = state_of(frame, 0, 2)
    flat, rows = job.flat_units, job.row_units
    for index in range(job.spec_count):
        spec = spec_of(frame, index)
        numbers = array_at(frame.results + index * _RESULT_BYTES, 4, np.float64)
        counts = array_at(frame.results + index * _RESULT_BYTES, 4, np.int64)
        numbers[0] = 0.0
        if spec.is_per_sample:
            nonfinite_count, _ = _combine(frame, job.row_planes + rows * (2 * index + 2), rows)
        else:
            place = job.flat_planes + flat * (2 * index + 2)
            nonfinite_count, _ = _combine(frame, place + flat, flat)
            if spec.reduction == _MEAN or spec.reduction == _SUM:
                total, lost = _combine(frame, place, flat)
                numbers[0] = quotient(total, lost, spec.divisor, spec_state(frame, index)[SPEC_DIVISOR])
        counts[1] = int(totals[STATE_COUNT])
        numbers[2] = totals[STATE_WEIGHT_SUM]
        counts[3] = int(nonfinite_count)
        if job.element_count == 0:
            _clear_output(frame, job, spec.summed_input_gradient_output)
            _clear_output(frame, job, spec.summed_target_gradient_output)
    return 0


@inlined
def _clear_output(frame: Any, job: Any, index: Any) -> None:
    """Fill an output with zero bytes, if there is one."""
    if index >= 0:
        output = output_of(frame, job, index)
        array_at(frame.outputs + output.offset, output.byte_count, np.uint8)[:] = 0
