"""Gradients of broadcast operands: every element's gradient summed back to the operand's shape, in float64.

An element of such a gradient is the sum over all elements of the result that the operand's element was used for, in the
order of their index: those that lie side by side in memory are added up as a loss is (a chunk at a time, lanes folded),
everything else one after the other, and what rounding loses is kept. The walk is cut into steps of about a chunk.
Steps of one group fill the same elements and must come one after the other; groups do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_blocks import run_loop
from lossgrad_server.engine.cpu_intrinsics import array_at
from lossgrad_server.engine.cpu_layout import (
    BLOCK,
    INPUT,
    LANES,
    SCRATCH_DIFFERENCE,
    SCRATCH_GRADIENT,
    SCRATCH_LOSS,
    SCRATCH_SCALE,
    SCRATCH_SPARE,
    SCRATCH_WEIGHT,
    SPEC_EDGE,
    SPEC_FACTOR,
    SUM,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_passes import load_block, store
from lossgrad_server.engine.cpu_special import recompute_block
from lossgrad_server.engine.cpu_sums import add_compensated, clear, compensated, fold, fold_compensated, two_sum
from lossgrad_server.engine.cpu_tables import (
    frame_at,
    job_of,
    lanes_of,
    lost_of,
    spec_address,
    spec_of,
    spec_state,
    state_of,
)


@inlined
def _summed_output(spec: Any, operand: Any) -> Any:
    return spec.summed_input_gradient_output if operand == INPUT else spec.summed_target_gradient_output


@inlined
def _running_offset(job: Any, index: Any) -> Any:
    return job.running_sums + 2 * BLOCK * index


@inlined
def _running(frame: Any, job: Any, index: Any) -> Any:
    """Return the running sums of a spec, and behind them what those lost."""
    return state_of(frame, _running_offset(job, index), 2 * BLOCK)


@inlined
def _offset(index: Any, rank: Any, shape: Any, strides: Any) -> Any:
    """Return how far the `index`-th of some dimensions' elements lies from the first."""
    offset = 0
    for dimension in range(rank - 1, -1, -1):
        outer = index // shape[dimension]
        offset += (index - outer * shape[dimension]) * strides[dimension]
        index = outer
    return offset


@native("int64(int64, int64, int64, int64)")
def compute_gradients(address: int, index: int, count: int, is_finite: int) -> int:
    """Compute the gradients of the block that is loaded, as float64, into scratch memory."""
    frame = frame_at(address)
    spec = spec_of(frame, index)
    own = spec_state(frame, index)
    factor = own[SPEC_FACTOR]
    differences = frame.scratch + SCRATCH_DIFFERENCE
    lanes = frame.scratch + SCRATCH_SPARE
    lost = lanes + 8 * LANES
    clear(lanes, lost, count)
    run_loop(
        frame, spec.sum_loop, count, differences, differences, SCRATCH_SCALE if spec.divides_rows else SCRATCH_WEIGHT,
        frame.scratch + SCRATCH_GRADIENT, frame.scratch + SCRATCH_LOSS, lanes, lost, spec_address(frame, index), factor,
        own[SPEC_EDGE],
    )  # fmt: skip
    if not (is_finite and np.isfinite(factor) and np.isfinite(fold(lanes, count))):
        if not job_of(frame).is_weighted:
            weights = array_at(frame.scratch + SCRATCH_WEIGHT, count, np.float64)
            weights[:] = 1.0
        recompute_block(address, index, count)
    return 0


@native("int64(int64, int64, int64, int64, int64, int64)")
def add_rows(address: int, operand: int, start: int, length: int, rows: int, width: int) -> int:
    """Add `rows` rows of `width` elements, each `length` after the last, element by element."""
    frame = frame_at(address)
    job = job_of(frame)
    gradients = array_at(frame.scratch + SCRATCH_GRADIENT, BLOCK, np.float64)
    together = BLOCK // length if width == length else 1
    for row in range(0, rows, together):
        row_count = min(together, rows - row)
        count = row_count * width
        is_finite = load_block(address, job.divides_rows, start + row * length, count)
        for index in range(job.spec_count):
            if _summed_output(spec_of(frame, index), operand) >= 0:
                compute_gradients(address, index, count, is_finite)
                running = _running(frame, job, index)
                for own in range(row_count):
                    for k in range(width):
                        running[k], error = two_sum(running[k], gradients[own * width + k])
                        running[BLOCK + k] += error
    return 0


@native("int64(int64, int64, int64, int64, int64, int64)")
def add_columns(address: int, operand: int, start: int, length: int, rows: int, width: int) -> int:
    """Add up `width` runs of `rows` elements, each run `length` after the last, to one element each."""
    frame = frame_at(address)
    job = job_of(frame)
    if length > LANES:
        for k in range(width):
            for index in range(job.spec_count):
                clear(lanes_of(frame, index), lost_of(frame, index), rows)
            for row in range(0, rows, BLOCK):
                count = min(BLOCK, rows - row)
                is_finite = load_block(address, job.divides_rows, start + k * length + row, count)
                for index in range(job.spec_count):
                    if _summed_output(spec_of(frame, index), operand) >= 0:
                        compute_gradients(address, index, count, is_finite)
                        values = frame.scratch + SCRATCH_GRADIENT
                        add_compensated(values, count, lanes_of(frame, index), lost_of(frame, index))
            for index in range(job.spec_count):
                _add_run(frame, job, index, k, rows)
        return 0
    together = BLOCK // length
    for first in range(0, width, together):
        run_count = min(together, width - first)
        is_finite = load_block(address, job.divides_rows, start + first * length, run_count * length)
        for index in range(job.spec_count):
            if _summed_output(spec_of(frame, index), operand) >= 0:
                compute_gradients(address, index, run_count * length, is_finite)
                for k in range(run_count):
                    clear(lanes_of(frame, index), lost_of(frame, index), length)
                    values = frame.scratch + SCRATCH_GRADIENT + 8 * k * length
                    add_compensated(values, length, lanes_of(frame, index), lost_of(frame, index))
                    _add_run(frame, job, index, first + k, length)
    return 0


@inlined
def _add_run(frame: Any, job: Any, index: Any, k: Any, length: Any) -> None:
    running = _running(frame, job, index)
    total = fold_compensated(lanes_of(frame, index), lost_of(frame, index), length)
    running[k], error = two_sum(running[k], total)
    running[BLOCK + k] += error


@native("int64(int64, int64, int64, int64)")
def sum_gradient(address: int, operand: int, begin: int, end: int) -> int:
    """Do steps of the walk for one operand."""
    frame = frame_at(address)
    job = job_of(frame)
    record = array_at(frame.program + job.sum_offsets[operand], 1, SUM)[0]
    kept_blocks = (record.kept + record.kept_per_step - 1) // record.kept_per_step
    reduced_blocks = (record.reduced + record.reduced_per_step - 1) // record.reduced_per_step
    group = record.group
    for step in range(begin, end):
        block = step // group
        within = step - block * group
        outer = block // kept_blocks
        first = (block - outer * kept_blocks) * record.kept_per_step
        width = min(record.kept_per_step, record.kept - first)
        outer_reduced = within // reduced_blocks
        row = (within - outer_reduced * reduced_blocks) * record.reduced_per_step
        rows = min(record.reduced_per_step, record.reduced - row)
        start = _offset(outer, record.kept_rank, record.kept_shape, record.kept_strides)
        start += _offset(outer_reduced, record.reduced_rank, record.reduced_shape, record.reduced_strides)
        for index in range(job.spec_count):
            if within == 0:
                _running(frame, job, index)[: 2 * BLOCK] = 0.0
        if record.kept_is_inner:
            add_rows(address, operand, start + row * record.kept + first, record.kept, rows, width)
        else:
            add_columns(address, operand, start + first * record.reduced + row, record.reduced, rows, width)
        if within == group - 1:
            for index in range(job.spec_count):
                output = _summed_output(spec_of(frame, index), operand)
                if output >= 0:
                    running = _running(frame, job, index)
                    running_at = frame.state + 8 * _running_offset(job, index)
                    for k in range(width):
                        total = compensated(running[k], running[BLOCK + k])
                        running[k] = np.nan if np.isnan(total) else total
                    store(frame, job, output, outer * record.kept + first, width, 1.0 - 2.0 * operand, running_at)
    return 0
