"""A block of a job's operands, from wherever they lie to differences and weights in scratch memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_floats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
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
    SCRATCH_GATHERED,
    SCRATCH_INDICES,
    SCRATCH_INPUT,
    SCRATCH_MASK,
    SCRATCH_OFFSETS,
    SCRATCH_SCALE,
    SCRATCH_SINGLES,
    SCRATCH_TARGET,
    SCRATCH_WEIGHT,
    TARGET,
    WEIGHT,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_tables import frame_at, job_of, state_of
from lossgrad_server.jobs import DataType

# An innermost dimension shorter than this is gathered element by element.
_SHORT_RUN = 64
_ITEM_SIZES = (0, *(data_type.itemsize for data_type in DataType))


@inlined
def _load_run(as_float32: Any, data_type: Any, address: Any, stride: Any, count: Any, destination: Any) -> None:
    if as_float32:
        load_float32(data_type, address, stride, count, destination)
    else:
        load_float64(data_type, address, stride, count, destination)


@inlined
def _gather(dtype: Any, address: Any, offsets: Any, count: Any, destination: Any) -> None:
    source = array_at(address, 1, dtype)
    gathered = array_at(destination, count, dtype)
    for j in range(count):
        gathered[j] = source[offsets[j]]


@native("int64(int64, int64, int64, int64)")
def gather_operand(address: int, operand: int, start: int, count: int) -> int:
    """Copy a broadcast operand's elements, in the result's order and as they are, to SCRATCH_GATHERED."""
    frame = frame_at(address)
    job = job_of(frame)
    layout = array_at(frame.program + job.layout_offset, 1, LAYOUT)[0]
    offsets = array_at(frame.scratch + SCRATCH_OFFSETS, count, np.int64)
    indices = array_at(frame.scratch + SCRATCH_INDICES, layout.rank, np.int64)
    last = layout.rank - 1
    extent = layout.shape[last]
    stride = layout.strides[operand, last]
    rest = start
    offset = 0
    for dimension in range(last, -1, -1):
        outer = rest // layout.shape[dimension]
        indices[dimension] = rest - outer * layout.shape[dimension]
        offset += indices[dimension] * layout.strides[operand, dimension]
        rest = outer
    filled = 0
    while filled < count:
        run = min(count - filled, extent - indices[last])
        for _ in range(run):
            offsets[filled] = offset
            offset += stride
            filled += 1
        # On to the next index of the dimension outside, and back to the first of this one, as often as one is full.
        indices[last] += run
        dimension = last
        while dimension > 0 and indices[dimension] == layout.shape[dimension]:
            offset += (
                layout.strides[operand, dimension - 1] - layout.shape[dimension] * layout.strides[operand, dimension]
            )
            indices[dimension] = 0
            dimension -= 1
            indices[dimension] += 1
    source = _operand_address(frame, job, operand)
    gathered = frame.scratch + SCRATCH_GATHERED
    size = _ITEM_SIZES[job.types[operand]]
    if size == 1:
        _gather(np.uint8, source, offsets, count, gathered)
    elif size == 2:
        _gather(np.uint16, source, offsets, count, gathered)
    elif size == 4:
        _gather(np.uint32, source, offsets, count, gathered)
    else:
        _gather(np.uint64, source, offsets, count, gathered)
    return 0


@inlined
def _operand_address(frame: Any, job: Any, operand: Any) -> Any:
    place = WEIGHT if operand == MASK and job.types[WEIGHT] == 0 else operand
    return array_at(frame.operands, 4, np.int64)[place]


@native("int64(int64, int64, int64, int64, int64, int64)")
def load_operand(address: int, operand: int, start: int, count: int, as_float32: int, destination: int) -> int:
    """Read an operand's elements in the result's order, as often as broadcasting repeats them, as float32 or as float64."""
    frame = frame_at(address)
    job = job_of(frame)
    first = _operand_address(frame, job, operand)
    data_type = job.types[operand]
    size = _ITEM_SIZES[data_type]
    if not job.is_broadcast[operand]:
        _load_run(as_float32, data_type, first + start * size, 1, count, destination)
        return 0
    layout = array_at(frame.program + job.layout_offset, 1, LAYOUT)[0]
    last = layout.rank - 1
    extent = layout.shape[last]
    if extent < _SHORT_RUN:
        gather_operand(address, operand, start, count)
        _load_run(as_float32, data_type, frame.scratch + SCRATCH_GATHERED, 1, count, destination)
        return 0
    stride = layout.strides[operand, last]
    item = 4 if as_float32 else 8
    filled = 0
    while filled < count:
        rest = (start + filled) // extent
        column = start + filled - rest * extent
        offset = column * stride
        for dimension in range(last - 1, -1, -1):
            outer = rest // layout.shape[dimension]
            offset += (rest - outer * layout.shape[dimension]) * layout.strides[operand, dimension]
            rest = outer
        run = min(count - filled, extent - column)
        _load_run(as_float32, data_type, first + offset * size, stride, run, destination + filled * item)
        filled += run
    return 0


@native("int64(int64, int64, int64)")
def load_mask(address: int, start: int, count: int) -> int:
    """Bring the mask as bytes, 0 or 1. Returns how many elements are not masked."""
    frame = frame_at(address)
    job = job_of(frame)
    source = _operand_address(frame, job, MASK) + start
    if job.is_broadcast[MASK]:
        gather_operand(address, MASK, start, count)
        source = frame.scratch + SCRATCH_GATHERED
    truths = array_at(source, count, np.uint8)
    mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
    for j in range(count):
        mask[j] = 1 if truths[j] != 0 else 0
    unmasked = 0
    for j in range(count):
        unmasked += mask[j]
    return unmasked


@native("int64(int64, int64, int64)")
def load_singles(address: int, start: int, count: int) -> int:
    """Bring input - target of `count` elements, from `start` on, as float32; 0 where masked. After `load_mask`."""
    frame = frame_at(address)
    job = job_of(frame)
    differences = array_at(frame.scratch + SCRATCH_SINGLES, count, np.float32)
    addresses = array_at(frame.operands, 4, np.int64)
    first, second = addresses[INPUT], addresses[TARGET]
    if job.pair_type == BFLOAT16:
        u = array_at(first + 2 * start, count, np.uint16)
        v = array_at(second + 2 * start, count, np.uint16)
        for j in range(count):
            differences[j] = bfloat16_value(u[j]) - bfloat16_value(v[j])
    elif job.pair_type == FLOAT16:
        u = array_at(first + 2 * start, count, np.uint16)
        v = array_at(second + 2 * start, count, np.uint16)
        for j in range(count):
            differences[j] = float16_value(u[j]) - float16_value(v[j])
    else:
        if job.pair_type == FLOAT32:
            first += 4 * start
            second += 4 * start
        else:
            first, second = frame.scratch + SCRATCH_INPUT, frame.scratch + SCRATCH_TARGET
            load_operand(address, INPUT, start, count, 1, first)
            load_operand(address, TARGET, start, count, 1, second)
        x = array_at(first, count, np.float32)
        y = array_at(second, count, np.float32)
        for j in range(count):
            differences[j] = x[j] - y[j]
    if job.types[MASK] != 0:
        mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
        for j in range(count):
            # Selected away, not multiplied by 0: a NaN behind the mask stays behind it.
            differences[j] = differences[j] if mask[j] != 0 else np.float32(0.0)
    return 0


@native("int64(int64, int64, int64)")
def load_doubles(address: int, start: int, count: int) -> int:
    """Do what `load_singles` does for a job that is computed in float64."""
    frame = frame_at(address)
    job = job_of(frame)
    differences = array_at(frame.scratch + SCRATCH_DIFFERENCE, count, np.float64)
    addresses = array_at(frame.operands, 4, np.int64)
    first, second = addresses[INPUT] + 8 * start, addresses[TARGET] + 8 * start
    if job.pair_type != FLOAT64:
        first, second = frame.scratch + SCRATCH_INPUT, frame.scratch + SCRATCH_TARGET
        load_operand(address, INPUT, start, count, 0, first)
        load_operand(address, TARGET, start, count, 0, second)
    x = array_at(first, count, np.float64)
    y = array_at(second, count, np.float64)
    for j in range(count):
        differences[j] = x[j] - y[j]
    if job.types[MASK] != 0:
        mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
        for j in range(count):
            differences[j] = differences[j] if mask[j] != 0 else 0.0
    return 0


@native("int64(int64, int64, int64)")
def load_weights(address: int, start: int, count: int) -> int:
    """Bring the weights as float64: 1 where none are sent, 0 where masked. After `load_mask`."""
    frame = frame_at(address)
    job = job_of(frame)
    weights = array_at(frame.scratch + SCRATCH_WEIGHT, count, np.float64)
    if job.types[WEIGHT] != 0:
        load_operand(address, WEIGHT, start, count, 0, frame.scratch + SCRATCH_WEIGHT)
    else:
        for j in range(count):
            weights[j] = 1.0
    if job.types[MASK] != 0:
        mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
        for j in range(count):
            weights[j] = weights[j] if mask[j] != 0 else 0.0
    return 0


@native("int64(int64, int64, int64)")
def load_scales(address: int, start: int, count: int) -> int:
    """Divide the weights by the sum of the weights of each element's sample. Returns 1 if all quotients are finite.

    After `load_weights`. Masked elements get 0, whatever their sample's sum.
    """
    frame = frame_at(address)
    job = job_of(frame)
    of_rows = state_of(frame, job.row_divisors, job.row_count)
    weights = array_at(frame.scratch + SCRATCH_WEIGHT, count, np.float64)
    scales = array_at(frame.scratch + SCRATCH_SCALE, count, np.float64)
    row = start // job.row_length
    last = (row + 1) * job.row_length - start
    j = 0
    while j < count:
        divisor = of_rows[row]
        while j < min(last, count):
            scales[j] = weights[j] / divisor
            j += 1
        row += 1
        last += job.row_length
    if job.types[MASK] != 0:
        mask = array_at(frame.scratch + SCRATCH_MASK, count, np.uint8)
        for j in range(count):
            scales[j] = scales[j] if mask[j] != 0 else 0.0
    infinite = 0
    for j in range(count):
        infinite += 0 if np.isfinite(scales[j]) else 1
    return 1 if infinite == 0 else 0


@native("int64(int64, int64, int64, int64, int64)")
def load_block(address: int, is_rows: int, is_narrow: int, start: int, count: int) -> int:
    """Bring a block: mask, differences, and what the job needs of weights. Returns 1 if the weights are of use.

    They are not where a sample's own weights make the gradient's weights infinite or NaN. Differences in float32 are
    brought as float64 too, unless `is_narrow`.
    """
    frame = frame_at(address)
    job = job_of(frame)
    if job.types[MASK] != 0:
        load_mask(address, start, count)
    if job.is_float64:
        load_doubles(address, start, count)
    else:
        load_singles(address, start, count)
        if not is_narrow:
            narrow = array_at(frame.scratch + SCRATCH_SINGLES, count, np.float32)
            wide = array_at(frame.scratch + SCRATCH_DIFFERENCE, count, np.float64)
            for j in range(count):
                wide[j] = narrow[j]
    if job.is_weighted:
        load_weights(address, start, count)
        if is_rows and job.divides_rows:
            return load_scales(address, start, count)
    return 1
