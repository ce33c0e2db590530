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
    RUNNING_WORDS,
    SCRATCH_GRADIENT,
    SCRATCH_LOSS,
    SCRATCH_RUNS,
    SCRATCH_RUNS_LOST,
    SCRATCH_SCALE,
    SCRATCH_SPARE,
    SCRATCH_WEIGHT,
    SHORT_ROW,
    SPEC_EDGE,
    SPEC_FACTOR,
    SUM,
)
from lossgrad_server.engine.cpu_load import load_block
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_passes import store
from lossgrad_server.engine.cpu_special import recompute_block
from lossgrad_server.engine.cpu_sums import (
    add_compensated,
    add_each,
    add_sums,
    clear,
    clear_all,
    compensated,
    fold,
    fold_compensated,
    fold_rows,
    fold_runs,
)
from lossgrad_server.engine.cpu_tables import (
    differences_of,
    frame_at,
    job_of,
    lanes_of,
    lost_of,
    spec_address,
    spec_of,
    spec_state,
)


@inlined
def _summed_output(spec: Any, operand: Any) -> Any:
    return spec.summed_input_gradient_output if operand == INPUT else spec.summed_target_gradient_output


@inlined
def _running(frame: Any, job: Any, index: Any) -> Any:
    """Return the addresses of a spec's running sums and what they lost, and of the step's sums and what those lost."""
    first = frame.state + 8 * (job.running_sums + RUNNING_WORDS * index)
    return first, first + 8 * BLOCK, first + 16 * BLOCK, first + 24 * BLOCK


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
    differences = differences_of(frame, spec)
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


@native("int64(int64, int64, int64, int64, int64, int64, int64)")
def add_rows(address: int, operand: int, start: int, length: int, rows: int, width: int, together: int) -> int:
    """Add `rows` rows of `width` elements, each `length` after the last, element by element.

    `together` rows are added to as many rows of lanes, side by side; more than one only where they are contiguous.
    """
    frame = frame_at(address)
    job = job_of(frame)
    used = min(rows, together)
    for index in range(job.spec_count):
        _, _, lanes, lost = _running(frame, job, index)
        clear_all(lanes, lost, used * width)
    for row in range(0, rows, together):
        count = min(together, rows - row) * width
        is_finite = load_block(address, job.divides_rows, 0, start + row * length, count)
        for index in range(job.spec_count):
            if _summed_output(spec_of(frame, index), operand) >= 0:
                compute_gradients(address, index, count, is_finite)
                _, _, lanes, lost = _running(frame, job, index)
                add_each(lanes, lost, frame.scratch + SCRATCH_GRADIENT, count)
    for index in range(job.spec_count):
        running, running_lost, lanes, lost = _running(frame, job, index)
        fold_rows(lanes, lost, used, width)
        add_sums(running, running_lost, lanes, lost, width)
    return 0


@native("int64(int64, int64, int64, int64, int64, int64)")
def add_columns(address: int, operand: int, start: int, length: int, rows: int, width: int) -> int:
    """Add up `width` runs of `rows` elements, each run `length` after the last, to one element each."""
    frame = frame_at(address)
    job = job_of(frame)
    gradients = frame.scratch + SCRATCH_GRADIENT
    sums, lost = frame.scratch + SCRATCH_RUNS, frame.scratch + SCRATCH_RUNS_LOST
    together = BLOCK // length if length <= SHORT_ROW else 1
    for first in range(0, width, together):
        run_count = min(together, width - first)
        if length > SHORT_ROW:
            for index in range(job.spec_count):
                clear(lanes_of(frame, index), lost_of(frame, index), rows)
        for row in range(0, rows, BLOCK):
            count = run_count * min(BLOCK, rows - row)
            is_finite = load_block(address, job.divides_rows, 0, start + first * length + row, count)
            for index in range(job.spec_count):
                if _summed_output(spec_of(frame, index), operand) >= 0:
                    compute_gradients(address, index, count, is_finite)
                    if length > SHORT_ROW:
                        add_compensated(gradients, count, lanes_of(frame, index), lost_of(frame, index))
                    else:
                        fold_runs(gradients, run_count, length, sums, lost)
                        running, running_lost, _, _ = _running(frame, job, index)
                        add_sums(running + 8 * first, running_lost + 8 * first, sums, lost, run_count)
        if length > SHORT_ROW:
            for index in range(job.spec_count):
                total = array_at(sums, 1, np.float64)
                array_at(lost, 1, np.float64)[0] = 0.0
                total[0] = fold_compensated(lanes_of(frame, index), lost_of(frame, index), rows)
                running, running_lost, _, _ = _running(frame, job, index)
                add_sums(running + 8 * first, running_lost + 8 * first, sums, lost, 1)
    return 0


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
                running, running_lost, _, _ = _running(frame, job, index)
                clear_all(running, running_lost, width)
        if record.kept_is_inner:
            step_start = start + row * record.kept + first
            add_rows(address, operand, step_start, record.kept, rows, width, record.rows)
        else:
            add_columns(address, operand, start + first * record.reduced + row, record.reduced, rows, width)
        if within == group - 1:
            for index in range(job.spec_count):
                output = _summed_output(spec_of(frame, index), operand)
                if output >= 0:
                    running, running_lost, _, _ = _running(frame, job, index)
                    totals = array_at(running, width, np.float64)
                    errors = array_at(running_lost, width, np.float64)
                    for k in range(width):
                        total = compensated(totals[k], errors[k])
                        totals[k] = np.nan if np.isnan(total) else total
                    store(frame, job, output, outer * record.kept + first, width, 1.0 - 2.0 * operand, running)
    return 0
