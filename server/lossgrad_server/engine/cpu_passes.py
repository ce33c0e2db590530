"""The walks over a job's elements: the sums of its weights, its losses and gradients.

Every walk is cut into units that do not depend on each other, so any range of them may be computed by any thread at any
time. What each finds goes to a place of its own in the job's state; the places are then added in order of their index
(cpu_finish.py). So neither pieces nor threads change a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_blocks import run_loop
from lossgrad_server.engine.cpu_extremes import add_extremes, add_special_extremes, clear_extremes, store_extremes
from lossgrad_server.engine.cpu_floats import store_run
from lossgrad_server.engine.cpu_intrinsics import array_at
from lossgrad_server.engine.cpu_layout import (
    BLOCK,
    CHUNK,
    MASK,
    SCRATCH_DIFFERENCE,
    SCRATCH_GRADIENT,
    SCRATCH_LOSS,
    SCRATCH_RUNS,
    SCRATCH_RUNS_LOST,
    SCRATCH_SCALE,
    SCRATCH_SPECIAL,
    SCRATCH_WEIGHT,
    SHORT_ROW,
    SPEC_DIVISOR,
    SPEC_EDGE,
    SPEC_FACTOR,
    WEIGHT,
)
from lossgrad_server.engine.cpu_load import load_block, load_mask, load_weights
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_special import recompute_block
from lossgrad_server.engine.cpu_sums import (
    add_compensated,
    clear,
    compensated,
    divided,
    fold,
    fold_compensated,
    fold_runs,
)
from lossgrad_server.engine.cpu_tables import (
    frame_at,
    job_of,
    lanes_of,
    lost_of,
    output_of,
    spec_address,
    spec_of,
    spec_state,
    state_of,
)
from lossgrad_server.engine.cpu_vectors import fence
from lossgrad_server.jobs import Reduction

_NONE = int(Reduction.NONE)


@inlined
def unit_span(job: Any, is_rows: Any, unit: Any) -> Any:
    """Return a unit's first element and how many it has. Not for short samples."""
    length = job.row_length if is_rows else job.element_count
    chunks = (length + CHUNK - 1) // CHUNK
    row = unit // chunks
    column = (unit - row * chunks) * CHUNK
    return row * length + column, min(CHUNK, length - column)


@native("int64(int64, int64, int64)")
def weigh_short_rows(address: int, begin: int, end: int) -> int:
    """Sum the weights of samples of at most SHORT_ROW elements."""
    frame = frame_at(address)
    job = job_of(frame)
    length = job.row_length
    together = BLOCK // length
    first_row = begin * (CHUNK // length)
    last_row = min(job.row_count, end * (CHUNK // length))
    sums, lost = frame.scratch + SCRATCH_RUNS, frame.scratch + SCRATCH_RUNS_LOST
    totals = array_at(sums, BLOCK, np.float64)
    errors = array_at(lost, BLOCK, np.float64)
    for row in range(first_row, last_row, together):
        count = min(together, last_row - row)
        if job.types[MASK] != 0:
            load_mask(address, row * length, count * length)
        load_weights(address, row * length, count * length)
        fold_runs(frame.scratch + SCRATCH_WEIGHT, count, length, sums, lost)
        of_rows = state_of(frame, job.row_divisors + row, count)
        for index in range(count):
            of_rows[index] = compensated(totals[index], errors[index])
    return 0


@native("int64(int64, int64, int64, int64)")
def weigh(address: int, is_rows: int, begin: int, end: int) -> int:
    """Sum the weights of units, and count what is not masked."""
    frame = frame_at(address)
    job = job_of(frame)
    if is_rows and job.row_length <= SHORT_ROW:
        weigh_short_rows(address, begin, end)
        return 0
    weights = frame.scratch + SCRATCH_WEIGHT
    lanes, lost = lanes_of(frame, 0), lost_of(frame, 0)
    for unit in range(begin, end):
        start, length = unit_span(job, is_rows, unit)
        clear(lanes, lost, length)
        unmasked = 0
        for offset in range(0, length, BLOCK):
            count = min(BLOCK, length - offset)
            unmasked += load_mask(address, start + offset, count) if job.types[MASK] != 0 else count
            if job.types[WEIGHT] != 0:
                load_weights(address, start + offset, count)
                add_compensated(weights, count, lanes, lost)
        total = fold_compensated(lanes, lost, length) if job.types[WEIGHT] != 0 else float(unmasked)
        if is_rows:
            state_of(frame, job.row_planes + unit, 1)[0] = total
        else:
            state_of(frame, job.flat_planes + unit, 1)[0] = total
            state_of(frame, job.flat_planes + job.flat_units + unit, 1)[0] = unmasked
    return 0


@inlined
def fold_lanes(frame: Any, job: Any, index: Any, length: Any) -> Any:
    """Return the sum of a spec's lanes after `length` elements over the spec's divisor, rounded once."""
    lanes, divisor = lanes_of(frame, index), spec_of(frame, index).divisor
    if job.is_float64:
        lost = lost_of(frame, index)
        fold_compensated(lanes, lost, length)
        return divided(array_at(lanes, 1, np.float64)[0], array_at(lost, 1, np.float64)[0], divisor)
    return fold(lanes, length) / divisor


@inlined
def store(frame: Any, job: Any, index: Any, start: Any, count: Any, sign: Any, values: Any) -> None:
    """Write float64 values, `sign` times those at an address, as elements of an output."""
    output = output_of(frame, job, index)
    store_run(output.data_type, frame.outputs + output.offset, start, count, sign, values)


@native("int64(int64, int64, int64, int64)")
def run_block(address: int, index: int, start: int, count: int) -> int:
    """Compute a block of one spec. What the loop leaves in scratch memory is not stored yet."""
    frame = frame_at(address)
    job = job_of(frame)
    spec = spec_of(frame, index)
    own = spec_state(frame, index)
    first = frame.scratch + SCRATCH_DIFFERENCE
    second = first
    if job.is_pair:
        addresses = array_at(frame.operands, 2, np.int64)
        first = addresses[0] + 4 * start
        second = addresses[1] + 4 * start
    gradients = frame.scratch + SCRATCH_GRADIENT
    if spec.direct_gradient_output >= 0 and not spec.is_full:
        size = 8 if job.is_float64 else 4
        gradients = frame.outputs + output_of(frame, job, spec.direct_gradient_output).offset + start * size
    losses = frame.scratch + SCRATCH_LOSS
    if job.is_pair and spec.reduction == _NONE:
        losses = frame.outputs + output_of(frame, job, spec.loss_output).offset + 4 * start
    run_loop(
        frame, spec.loop, count, first, second, SCRATCH_SCALE if spec.divides_rows else SCRATCH_WEIGHT, gradients,
        losses, lanes_of(frame, index), lost_of(frame, index), spec_address(frame, index),
        own[SPEC_FACTOR], own[SPEC_EDGE],
    )  # fmt: skip
    return 0


@native("int64(int64, int64, int64, int64, int64)")
def store_block(address: int, index: int, start: int, count: int, with_direct: int) -> int:
    """Write what a block left in scratch memory to the outputs, `with_direct` also what a plain loop writes itself."""
    frame = frame_at(address)
    job = job_of(frame)
    spec = spec_of(frame, index)
    gradients = frame.scratch + SCRATCH_GRADIENT
    if with_direct and spec.direct_gradient_output >= 0:
        store(frame, job, spec.direct_gradient_output, start, count, 1.0, gradients)
    if spec.input_gradient_output >= 0:
        store(frame, job, spec.input_gradient_output, start, count, 1.0, gradients)
    if spec.target_gradient_output >= 0:
        store(frame, job, spec.target_gradient_output, start, count, -1.0, gradients)
    if spec.reduction == _NONE:
        losses = array_at(frame.scratch + SCRATCH_LOSS, count, np.float64)
        divisor = spec.divisor
        if divisor != 1.0:
            for j in range(count):
                losses[j] = losses[j] / divisor
        store(frame, job, spec.loss_output, start, count, 1.0, frame.scratch + SCRATCH_LOSS)
    return 0


@inlined
def extremes_at(job: Any, index: Any, unit: Any) -> Any:
    """Return where in the state a unit's least loss of a spec is, its greatest being `flat_units` behind; 0 for none."""
    return job.extreme_planes + 2 * job.flat_units * index + unit if job.extreme_planes != 0 else 0


@native("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def recompute_chunk(
    address: int, is_rows: int, index: int, start: int, length: int, partial_at: int, count_at: int, unit: int
) -> int:
    """Compute a chunk again that holds NaN or infinity, and put its partial sum and its count of those in the state."""
    frame = frame_at(address)
    extremes = extremes_at(job_of(frame), index, unit)
    special = array_at(frame.scratch + SCRATCH_SPECIAL, 3, np.float64)
    total = 0.0
    term_count = 0.0
    nonfinite_count = 0.0
    for offset in range(0, length, BLOCK):
        count = min(BLOCK, length - offset)
        _load_for_recompute(address, is_rows, start + offset, count)
        recompute_block(address, index, count)
        total += special[0]
        term_count += special[1]
        nonfinite_count += special[2]
        if extremes != 0:
            add_special_extremes(address, index, count, extremes, extremes + job_of(frame).flat_units)
        store_block(address, index, start + offset, count, 1)
    if term_count > 0:
        total = total / spec_of(frame, index).divisor
        state_of(frame, partial_at, 1)[0] = np.nan if np.isnan(total) else total
    state_of(frame, count_at, 1)[0] = nonfinite_count
    return 0


@inlined
def _load_for_recompute(address: Any, is_rows: Any, start: Any, count: Any) -> None:
    load_block(address, is_rows, start, count)
    if not job_of(frame_at(address)).is_weighted:
        load_weights(address, start, count)


@inlined
def row_loss(frame: Any, job: Any, spec: Any, index: Any, row: Any, total: Any, rest: Any) -> Any:
    """Return a sample's loss from its sum."""
    divisor = spec_state(frame, index)[SPEC_DIVISOR]
    if spec.divides_rows:
        divisor = state_of(frame, job.row_divisors + row, 1)[0]
    return quotient(total, rest, divisor)


@inlined
def quotient(total: Any, rest: Any, divisor: Any) -> Any:
    """Return a sum, with what its rounding left, over a divisor, rounded about once. NaN is always the same one."""
    result = divided(total, rest, divisor)
    return np.nan if np.isnan(result) else result


@native("int64(int64, int64, int64, int64)")
def finish_short_rows(address: int, index: int, first_row: int, row_count: int) -> int:
    """Sum and write the samples of a block whose losses are in scratch memory."""
    frame = frame_at(address)
    job = job_of(frame)
    spec = spec_of(frame, index)
    sums, lost = frame.scratch + SCRATCH_RUNS, frame.scratch + SCRATCH_RUNS_LOST
    fold_runs(frame.scratch + SCRATCH_LOSS, row_count, job.row_length, sums, lost)
    totals = array_at(sums, row_count, np.float64)
    errors = array_at(lost, row_count, np.float64)
    divisor, mean_divisor = spec.divisor, spec_state(frame, index)[SPEC_DIVISOR]
    if job.is_float64:
        for row in range(row_count):
            totals[row] = divided(totals[row], errors[row], divisor)
    else:
        for row in range(row_count):
            totals[row] = compensated(totals[row], errors[row]) / divisor
    if spec.divides_rows:
        divisors = state_of(frame, job.row_divisors + first_row, row_count)
        for row in range(row_count):
            totals[row] = totals[row] / divisors[row]
    else:
        for row in range(row_count):
            totals[row] = totals[row] / mean_divisor
    for row in range(row_count):
        totals[row] = np.nan if np.isnan(totals[row]) else totals[row]
    store(frame, job, spec.loss_output, first_row, row_count, 1.0, sums)
    return 0


@native("int64(int64, int64)")
def walk_short_rows(address: int, unit: int) -> int:
    """Compute samples of at most SHORT_ROW elements, several to a block. Their loops are `full` ones."""
    frame = frame_at(address)
    job = job_of(frame)
    nonfinite_counts = job.row_planes + 2 * job.row_units + unit
    special = array_at(frame.scratch + SCRATCH_SPECIAL, 3, np.float64)
    length = job.row_length
    together = BLOCK // length
    first_row = unit * (CHUNK // length)
    last_row = min(job.row_count, first_row + CHUNK // length)
    for index in range(job.spec_count):
        state_of(frame, nonfinite_counts + 2 * index * job.row_units, 1)[0] = 0.0
    for row in range(first_row, last_row, together):
        row_count = min(together, last_row - row)
        start, count = row * length, row_count * length
        is_finite = load_block(address, 1, start, count)
        for index in range(job.spec_count):
            spec = spec_of(frame, index)
            if spec.is_per_sample:
                clear(lanes_of(frame, index), lost_of(frame, index), count)
                run_block(address, index, start, count)
                factor = spec_state(frame, index)[SPEC_FACTOR]
                if not (is_finite and np.isfinite(factor) and np.isfinite(fold(lanes_of(frame, index), count))):
                    recompute_block(address, index, count)
                    state_of(frame, nonfinite_counts + 2 * index * job.row_units, 1)[0] += special[2]
                store_block(address, index, start, count, 1)
                finish_short_rows(address, index, row, row_count)
    return 0


@native("int64(int64, int64, int64, int64)")
def walk(address: int, is_rows: int, begin: int, end: int) -> int:
    """Compute units of the specs that reduce over all elements, or of those that reduce over each sample."""
    frame = frame_at(address)
    job = job_of(frame)
    if is_rows and job.row_length <= SHORT_ROW:
        for unit in range(begin, end):
            walk_short_rows(address, unit)
        return 0
    units = job.row_units if is_rows else job.flat_units
    planes = job.row_planes + job.row_units if is_rows else job.flat_planes + 2 * job.flat_units
    for unit in range(begin, end):
        start, length = unit_span(job, is_rows, unit)
        for index in range(job.spec_count):
            if spec_of(frame, index).is_per_sample == is_rows:
                clear(lanes_of(frame, index), lost_of(frame, index), length)
                if job.extreme_planes != 0:
                    clear_extremes(address, index)
        is_finite = 1
        # A loop for a pair reads the operands itself; if it leaves nothing in scratch memory it does the unit at once.
        step = CHUNK if job.is_pair and not spec_of(frame, 0).stores else BLOCK
        for offset in range(0, length, step):
            count = min(step, length - offset)
            if not job.is_pair:
                is_finite &= load_block(address, is_rows, start + offset, count)
            for index in range(job.spec_count):
                spec = spec_of(frame, index)
                if spec.is_per_sample == is_rows:
                    run_block(address, index, start + offset, count)
                    if job.extreme_planes != 0:
                        add_extremes(address, index, count)
                    if spec.stores:
                        store_block(address, index, start + offset, count, spec.is_full)
        for index in range(job.spec_count):
            if spec_of(frame, index).is_per_sample == is_rows:
                place = planes + 2 * index * units + unit
                partial = fold_lanes(frame, job, index, length)
                state_of(frame, place, 1)[0] = partial
                state_of(frame, place + units, 1)[0] = 0.0
                is_special = not (
                    is_finite and np.isfinite(partial) and np.isfinite(spec_state(frame, index)[SPEC_FACTOR])
                )
                extremes = extremes_at(job, index, unit)
                if extremes != 0:
                    store_extremes(address, index, is_special, extremes, extremes + units)
                if is_special:
                    recompute_chunk(address, is_rows, index, start, length, place, place + units, unit)
    if job.streams:
        fence()
    return 0
