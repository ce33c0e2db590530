"""What stands before and after the walks: totals of weights, what gradients are multiplied by, the losses themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_exact import exact_sum, nearest_sum
from lossgrad_server.engine.cpu_intrinsics import array_at, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    CHUNK,
    MASK,
    SCRATCH_DIFFERENCE,
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
from lossgrad_server.engine.cpu_tables import (
    frame_at,
    job_of,
    output_of,
    spec_of,
    spec_state,
    state_of,
)
from lossgrad_server.jobs import Reduction
from lossgrad_server.work import MAX_PARTIALS, SPEC_RESULT, SPEC_TOTAL

_MEAN, _SUM, _SAMPLE_MEAN = int(Reduction.MEAN), int(Reduction.SUM), int(Reduction.SAMPLE_MEAN)
_RESULT_BYTES, _TOTAL_BYTES = SPEC_RESULT.size, SPEC_TOTAL.size


@inlined
def _combine(frame: Any, first: Any, count: Any) -> Any:
    """Return the float64 nearest to the exact sum of partial sums, and the one nearest to what that leaves."""
    return nearest_sum(frame.state + 8 * first, count, frame.scratch + SCRATCH_DIFFERENCE)


@inlined
def _count(frame: Any, first: Any, units: Any) -> Any:
    """Add up counts."""
    counts = state_of(frame, first, units)
    total = 0.0
    for index in range(units):
        total += counts[index]
    return total


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
        of_rows[row], _ = _combine(frame, job.row_planes + row * chunks, chunks)
    return 0


@native("int64(int64)")
def prepare(address: int) -> int:
    """Add up the weights, and work out what each spec's gradient is multiplied by."""
    frame = frame_at(address)
    job = job_of(frame)
    totals = state_of(frame, 0, 2)
    if job.types[WEIGHT] != 0 or job.types[MASK] != 0:
        total, _ = _combine(frame, job.flat_planes, job.flat_units)
        totals[STATE_COUNT] = _count(frame, job.flat_planes + job.flat_units, job.flat_units)
        totals[STATE_WEIGHT_SUM] = np.nan if np.isnan(total) else total
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
                total, rest = _combine(frame, job.row_planes + job.row_units * (2 * index + 1) + row * chunks, chunks)
                value[0] = row_loss(frame, job, spec, index, row, total, rest)
                store(frame, job, spec.loss_output, row, 1, 1.0, frame.scratch + SCRATCH_INPUT)
    return 0


@inlined
def _write_sum(frame: Any, partials: Any, count: Any, record: Any) -> None:
    """Write how many numbers an exact sum has, and these."""
    words = frame.scratch + SCRATCH_DIFFERENCE
    array_at(record, 1, np.int64)[0] = exact_sum(partials, count, words, record + 8, MAX_PARTIALS)


@native("int64(int64)")
def _write_totals(address: int) -> int:
    """Write each spec's SPEC_TOTAL record, behind the SPEC_RESULT records."""
    frame = frame_at(address)
    job = job_of(frame)
    flat = job.flat_units
    weights, weight_count = frame.state + 8 * job.flat_planes, flat
    if job.types[WEIGHT] == 0 and job.types[MASK] == 0:
        weights, weight_count = frame.state + 8 * STATE_COUNT, 1
    for index in range(job.spec_count):
        record = frame.results + job.spec_count * _RESULT_BYTES + index * _TOTAL_BYTES
        array_at(record, _TOTAL_BYTES, np.uint8)[:] = 0
        extremes = array_at(record, 2, np.float64)
        planes = job.extreme_planes + 2 * flat * index
        least, greatest = state_of(frame, planes, flat), state_of(frame, planes + flat, flat)
        extremes[0], extremes[1] = np.inf, -np.inf
        for unit in range(flat):
            extremes[0] = min(extremes[0], least[unit])
            extremes[1] = max(extremes[1], greatest[unit])
        _write_sum(frame, frame.state + 8 * (job.flat_planes + 2 * flat * (index + 1)), flat, record + 16)
        _write_sum(frame, weights, weight_count, record + 16 + 8 * (1 + MAX_PARTIALS))
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
            nonfinite_count = _count(frame, job.row_planes + rows * (2 * index + 2), rows)
        else:
            place = job.flat_planes + flat * (2 * index + 2)
            nonfinite_count = _count(frame, place + flat, flat)
            if spec.reduction == _MEAN or spec.reduction == _SUM:
                total, rest = _combine(frame, place, flat)
                numbers[0] = quotient(total, rest, spec_state(frame, index)[SPEC_DIVISOR])
        counts[1] = int(totals[STATE_COUNT])
        numbers[2] = totals[STATE_WEIGHT_SUM]
        counts[3] = int(nonfinite_count)
        if job.element_count == 0:
            _clear_output(frame, job, spec.summed_input_gradient_output)
            _clear_output(frame, job, spec.summed_target_gradient_output)
    if job.extreme_planes != 0:
        _write_totals(address)
    return 0


@inlined
def _clear_output(frame: Any, job: Any, index: Any) -> None:
    """Fill an output with zero bytes, if there is one."""
    if index >= 0:
        output = output_of(frame, job, index)
        array_at(frame.outputs + output.offset, output.byte_count, np.uint8)[:] = 0
