"""A block of a job's operands, from wherever they lie to differences and weights in scratch memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float64

from lossgrad_server.engine.cpu_floats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    bfloat16_value,
    float16_value,
    load_float32,
    load_float64,
)
from lossgrad_server.engine.cpu_intrinsics import array_at
from lossgrad_server.engine.cpu_layout import (
    INPUT,
    LAYOUT,
    MASK,
    SCRATCH_DIFFERENCE,
    SCRATCH_INPUT,
    SCRATCH_MASK,
    SCRATCH_SCALE,
    SCRATCH_TARGET,
    SCRATCH_WEIGHT,
    TARGET,
    WEIGHT,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_tables import frame_at, job_of, state_of
from lossgrad_server.jobs import DataType

_ITEM_SIZES = (0, *(data_type.itemsize for data_type in DataType))


@inlined
def _load_run(as_float32: Any, data_type: Any, address: Any, stride: Any, count: Any, destination: Any) -> None:
    if as_float32:
        load_float32(data_type, address, stride, count, destination)
    else:
        load_float64(data_type, address, stride, count, destination)


@native("int64(int64, int64, int64, int64, int64, int64)")
def load_operand(address: int, operand: int, start: int, count: int, as_float32: int, destination: int) -> int:
    """Read an operand's elements in the result's order, as often as broadcasting repeats them, as float32 or as float64."""
    frame = frame_at(address)
    job = job_of(frame)
    place = operand
    if operand == MASK and job.types[WEIGHT] == 0:
        place = WEIGHT
    first = array_at(frame.operands, 4, np.int64)[place]
    data_type = job.types[operand]
    size = _ITEM_SIZES[data_type]
    if job.layout_offset == 0:
        _load_run(as_float32, data_type, first + start * size, 1, count, destination)
        return 0
    layout = array_at(frame.program + job.layout_offset, 1, LAYOUT)[0]
    last = layout.rank - 1
    item = 4 if as_float32 else 8
    filled = 0
    while filled < count:
        # Where element start + filled lies, and how far the innermost dimension goes on from there.
        rest = start + filled
        offset = 0
        run = count - filled
        for dimension in range(last, -1, -1):
            extent = layout.shape[dimension]
            index = rest % extent
            rest //= extent
            offset += index * layout.strides[operand, dimension]
            if dimension == last:
                run = min(run, extent - index)
        stride = layout.strides[operand, last] if last >= 0 else 0
        _load_run(as_float32, data_type, first + offset * size, stride, run, destination + filled * item)
        filled += run
    return 0


@native("int64(int64, int64, int64)")
def load_differences(address: int, start: int, count: int) -> int:
    """Bring input - target of `count` elements, from `start` on, as float64; 0 where masked, and the mask itself."""
    frame = frame_at(address)
    job = job_of(frame)
    differences = array_at(frame.scratch + SCRATCH_DIFFERENCE, count, np.float64)
    addresses = array_at(frame.operands, 4, np.int64)
    first, second = addresses[INPUT], addresses[TARGET]
    if job.pair_type == FLOAT32:
        x = array_at(first + 4 * start, count, np.float32)
        y = array_at(second + 4 * start, count, np.float32)
        for j in range(count):
            differences[j] = float64(x[j] - y[j])
    elif job.pair_type == BFLOAT16:
        u = array_at(first + 2 * start, count, np.uint16)
        v = array_at(second + 2 * start, count, np.uint16)
        for j in range(count):
            differences[j] = float64(bfloat16_value(u[j]) - bfloat16_value(v[j]))
    elif job.pair_type == FLOAT16:
        u = array_at(first + 2 * start, count, np.uint16)
        v = array_at(second + 2 * start, count, np.uint16)
        for j in range(count):
            differences[j] = float64(float16_value(u[j]) - float16_value(v[j]))
    elif job.is_float64:
        p = array_at(frame.scratch + SCRATCH_INPUT, count, np.float64)
        q = array_at(frame.scratch + SCRATCH_TARGET, count, np.float64)
        load_operand(address, INPUT, start, count, 0, frame.scratch + SCRATCH_INPUT)
        load_operand(address, TARGET, start, count, 0, frame.scratch + SCRATCH_TARGET)
        for j in range(count):
            differences[j] = p[j] - q[j]
    else:
        r = array_at(frame.scratch + SCRATCH_INPUT, count, np.float32)
        s = array_at(frame.scratch + SCRATCH_TARGET, count, np.float32)
        load_operand(address, INPUT, start, count, 1, frame.scratch + SCRATCH_INPUT)
        load_operand(address, TARGET, start, count, 1, frame.scratch + SCRATCH_TARGET)
        for j in range(count):
            differences[j] = float64(r[j] - s[j])
    if job.types[MASK] != 0:
        mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
        truths = array_at(frame.scratch + SCRATCH_TARGET, count, np.float64)
        load_operand(address, MASK, start, count, 0, frame.scratch + SCRATCH_TARGET)
        for j in range(count):
            mask[j] = truths[j] != 0.0
            # Selected away, not multiplied by 0: a NaN behind the mask stays behind it.
            differences[j] = differences[j] if truths[j] != 0.0 else 0.0
    return 0


@native("int64(int64, int64, int64)")
def load_weights(address: int, start: int, count: int) -> int:
    """Bring the weights as float64, as factors of the loss and of the gradient: 1 where none are sent, 0 where masked.

    Returns how many elements are not masked.
    """
    frame = frame_at(address)
    job = job_of(frame)
    weights = array_at(frame.scratch + SCRATCH_WEIGHT, count, np.float64)
    scales = array_at(frame.scratch + SCRATCH_SCALE, count, np.float64)
    if job.types[WEIGHT] != 0:
        load_operand(address, WEIGHT, start, count, 0, frame.scratch + SCRATCH_WEIGHT)
    else:
        for j in range(count):
            weights[j] = 1.0
    unmasked = count
    if job.types[MASK] != 0:
        truths = array_at(frame.scratch + SCRATCH_TARGET, count, np.float64)
        load_operand(address, MASK, start, count, 0, frame.scratch + SCRATCH_TARGET)
        unmasked = 0
        for j in range(count):
            weights[j] = weights[j] if truths[j] != 0.0 else 0.0
            unmasked += 1 if truths[j] != 0.0 else 0
    for j in range(count):
        scales[j] = weights[j]
    return unmasked


@native("int64(int64, int64, int64)")
def divide_scales(address: int, start: int, count: int) -> int:
    """Divide the gradient's weights by the weights of each element's sample. Returns 1 if those quotients are finite.

    Called after `load_weights`.
    """
    frame = frame_at(address)
    job = job_of(frame)
    of_rows = state_of(frame, job.row_divisors, job.row_count)
    scales = array_at(frame.scratch + SCRATCH_SCALE, count, np.float64)
    truths = array_at(frame.scratch + SCRATCH_TARGET, count, np.float64)
    has_mask = job.types[MASK] != 0
    is_finite = 1
    j = 0
    while j < count:
        row = (start + j) // job.row_length
        last = min(count, (row + 1) * job.row_length - start)
        divisor = of_rows[row]
        while j < last:
            scales[j] = 0.0 if has_mask and truths[j] == 0.0 else scales[j] / divisor
            if not np.isfinite(scales[j]):
                is_finite = 0
            j += 1
    return is_finite
