"""The tables that a plan becomes for the CPU kernels, and where their memory lies. No numba here.

A plan becomes one `program`: a JOB record, its SPEC records, its OUTPUT records and, where an operand is broadcast, a
LAYOUT record. Programs stand one behind the other in a batch. They are made once for a plan and kept with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

import numpy as np

from lossgrad_server.engine.cpu_formulas import factors
from lossgrad_server.jobs import MAX_RANK, MAX_SPECS, DataType, JobPlan, Reduction, Role, SpecPlan, TensorPlan, unpack_header

# Every reduction is cut into chunks of this many elements; each becomes one float64 partial sum.
CHUNK: Final = 4096
# Element i of a chunk is added to lane i % LANES; at the chunk's end the lanes are folded in half until one is left.
LANES: Final = 64
# The elements that are computed at a time, so that what is between the steps stays in the nearest cache.
ROWS_PER_BLOCK: Final = 4
BLOCK: Final = LANES * ROWS_PER_BLOCK



class Loop(IntEnum):
    """The loops of cpu_blocks.py. Those of a `pair` subtract two float32 operands themselves."""

    PAIR = 0
    PAIR_GRADIENT = 1
    PAIR_LOSS = 2
    PAIR_LOSS_GRADIENT = 3
    PLAIN = 4
    PLAIN_GRADIENT = 5
    PLAIN_WIDE_GRADIENT = 6
    FULL = 7
    FLOAT64_PLAIN = 8
    FLOAT64_GRADIENT = 9
    FLOAT64_FULL = 10


# A job's operands, by their place in the tables.
INPUT, TARGET, WEIGHT, MASK = range(4)
# What a block's gradient is written as. FLOAT64 is also what becomes every other type in a second step.
NO_GRADIENT, FLOAT32_GRADIENT, FLOAT64_GRADIENT = range(3)

_word = np.int64
JOB: Final = np.dtype(
    [
        ("program_bytes", _word),
        ("element_count", _word),
        ("is_float64", _word),  # what is computed in: float64, or float32 for everything else
        ("is_weighted", _word),  # whether blocks need weights
        ("is_pair", _word),  # whether its loop is one for a pair
        ("pair_type", _word),  # the type of both input and target where they are of one type and shape, otherwise 0
        ("spec_count", _word),
        ("operand_count", _word),
        ("output_count", _word),
        ("output_bytes", _word),
        ("layout_offset", _word),  # from the program's start, 0 where nothing is broadcast
        ("types", _word, (4,)),  # of the operands, 0 where there is none
        ("has_flat_specs", _word),
        ("has_row_specs", _word),
        ("row_count", _word),  # the samples of per-sample reductions, and their length; 0 without such reductions
        ("row_length", _word),
        ("divides_rows", _word),  # whether a mean over each sample divides by that sample's weights
        # The SUM records of input and target, from the program's start; 0 where no gradient is summed.
        ("sum_offsets", _word, (2,)),
    ]
)
SPEC: Final = np.dtype(
    [
        ("kind", _word),
        ("parameter", np.float64),
        ("reduction", _word),
        ("denominator", np.float64),  # NaN where there is none
        ("gradient_scale", np.float64),
        # cpu_formulas.Factors
        ("limit", np.float64),
        ("divisor", np.float64),
        ("slope", np.float64),
        ("edge", np.float64),
        ("half", np.float64),
        ("scale", np.float64),
        ("second_scale", np.float64),
        ("is_per_sample", _word),
        ("divides_rows", _word),  # whether each sample is divided by its own weights
        ("loop", _word),
        ("sum_loop", _word),  # the loop for the gradients of broadcast operands
        ("stores", _word),  # whether anything is left in scratch memory that must be stored
        ("is_full", _word),  # whether the loop is a `full` one: gradient and loss are left in scratch memory
        # Which of the job's outputs each tensor is, -1 where it is not sent. A gradient is `direct` where a plain loop
        # writes it at once, `summed` where the operand was broadcast.
        ("loss_output", _word),
        ("direct_gradient_output", _word),
        ("input_gradient_output", _word),
        ("target_gradient_output", _word),
        ("summed_input_gradient_output", _word),
        ("summed_target_gradient_output", _word),
    ]
)
OUTPUT: Final = np.dtype([("data_type", _word), ("byte_count", _word), ("offset", _word)])
# The result's shape, outermost dimension first, with dimensions made one wherever that changes no operand's order, and
# by how many elements each operand moves along each of them: 0 where it is broadcast.
LAYOUT: Final = np.dtype([("rank", _word), ("shape", _word, (MAX_RANK,)), ("strides", _word, (4, MAX_RANK))])
# How the gradient of a broadcast operand is summed back to its shape (cpu_sums.py). Along the result's innermost
# dimensions as the operand sees them, `kept` elements are told apart and `reduced` are summed, `kept` being the inner of
# the two or the outer; what remains are the outer dimensions, kept ones and reduced ones, outermost first.
SUM: Final = np.dtype(
    [
        ("kept_is_inner", _word),
        ("kept", _word),
        ("reduced", _word),
        # How many of each make up one step: about a chunk of elements.
        ("kept_per_step", _word),
        ("reduced_per_step", _word),
        ("kept_rank", _word),
        ("kept_shape", _word, (MAX_RANK,)),
        ("kept_strides", _word, (MAX_RANK,)),
        ("reduced_rank", _word),
        ("reduced_shape", _word, (MAX_RANK,)),
        ("reduced_strides", _word, (MAX_RANK,)),
        ("outer_kept", _word),
        ("outer_reduced", _word),
    ]
)
# Where a job's memory lies: addresses. `operands` is the address of an array of addresses.
FRAME: Final = np.dtype([(name, _word) for name in ("program", "operands", "outputs", "results", "state", "scratch", "loops")])

# Outputs start on cache lines.
OUTPUT_ALIGNMENT: Final = 64

# Scratch memory, one for each thread: offsets in bytes. A block of float64 each, and the mask's bytes.
_BLOCK_BYTES: Final = 8 * BLOCK
SCRATCH_INPUT, SCRATCH_TARGET, SCRATCH_DIFFERENCE, SCRATCH_WEIGHT, SCRATCH_SCALE, SCRATCH_GRADIENT, SCRATCH_LOSS = (
    index * _BLOCK_BYTES for index in range(7)
)
SCRATCH_MASK: Final = 7 * _BLOCK_BYTES
# The sums' lanes, and what they lost, for each spec.
SCRATCH_LANES: Final = SCRATCH_MASK + _BLOCK_BYTES
SCRATCH_LOST: Final = SCRATCH_LANES + MAX_SPECS * 8 * LANES
# Three numbers that recompute_block returns.
SCRATCH_SPECIAL: Final = SCRATCH_LOST + MAX_SPECS * 8 * LANES
# Lanes, and what they lost, of a sum that only tells whether all is finite.
SCRATCH_SPARE: Final = SCRATCH_SPECIAL + 64
SCRATCH_BYTES: Final = SCRATCH_SPARE + 2 * 8 * LANES

# A job's state: words of 8 bytes, float64 all of them. First the two totals, then for each spec what it needs for the
# gradient, then the partial sums (`state_words`).
STATE_COUNT, STATE_WEIGHT_SUM = range(2)
STATE_SPECS: Final = 2
SPEC_FACTOR, SPEC_EDGE, SPEC_DIVISOR, SPEC_STATE_WORDS = range(4)


class Walk(IntEnum):
    """What there is to do for a job, in the order in which it must be done."""

    WEIGH_ALL = 0
    WEIGH_ROWS = 1
    DIVIDE_ROWS = 2
    PREPARE = 3
    WALK_ALL = 4
    WALK_ROWS = 5
    FINISH_ROWS = 6
    FINISH = 7
    SUM_INPUT = 8
    SUM_TARGET = 9


@dataclass(frozen=True, slots=True)
class Stage:
    """A walk and how many units it has. Units of one group must be done in order, by one thread."""

    walk: Walk
    unit_count: int
    group: int = 1


@dataclass(frozen=True, slots=True)
class Program:
    """A plan as the kernels read it, and what the worker must know to run it."""

    code: bytes
    spec_count: int
    # The operands' byte counts, as int64 in bytes.
    operand_count: int
    operand_sizes: bytes
    # Where each output begins and ends in the memory that holds them all, and that memory's length, in bytes.
    output_spans: tuple[tuple[int, int], ...]
    output_bytes: int
    element_count: int
    state_bytes: int
    # About how long it takes: elements times losses.
    work: int
    stages: tuple[Stage, ...]


@lru_cache(maxsize=4096)
def program_of(header: bytes) -> Program:
    """Return the program of the plan that a header holds. Cached, because callers repeat themselves."""
    plan = unpack_header(header)
    outputs = np.zeros(len(plan.outputs), OUTPUT)
    spans: list[tuple[int, int]] = []
    offset = 0
    for output, record in zip(plan.outputs, outputs, strict=True):
        byte_count = output.tensor.byte_count
        record["data_type"], record["byte_count"], record["offset"] = output.tensor.data_type, byte_count, offset
        spans.append((offset, offset + byte_count))
        offset += -(-byte_count // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
    job = _job(plan)
    specs = _specs(plan)
    job["is_weighted"] = specs["is_full"].any()
    tables = specs.tobytes() + outputs.tobytes()
    if any(_is_broadcast(plan, operand) for operand in plan.operands):
        job["layout_offset"] = JOB.itemsize + len(tables)
        tables += _layout(plan).tobytes()
    sums: dict[int, Any] = {}
    sends_gradient = any(spec.include_gradient for spec in plan.specs)
    for operand, tensor in ((INPUT, plan.input), (TARGET, plan.target)):
        is_sent = sends_gradient and (operand == INPUT or plan.sends_target_gradient)
        if is_sent and _is_broadcast(plan, tensor):
            job["sum_offsets"][operand] = JOB.itemsize + len(tables)
            sums[operand] = _sum(plan, tensor)
            tables += sums[operand].tobytes()
    job["program_bytes"] = JOB.itemsize + len(tables)
    job["output_bytes"] = offset
    return Program(
        code=job.tobytes() + tables,
        spec_count=len(plan.specs),
        operand_count=len(plan.operands),
        operand_sizes=np.array([operand.byte_count for operand in plan.operands], np.int64).tobytes(),
        output_spans=tuple(spans),
        output_bytes=offset,
        element_count=plan.element_count,
        state_bytes=8 * int(state_offsets(_record(job), *unit_counts(_record(job)))[-1]),
        work=plan.element_count * len(plan.specs),
        stages=tuple(_stages(job, sums)),
    )


def _record(record: Any) -> Any:
    """Return a record whose fields are attributes, as they are to numba."""
    return record.reshape(1).view(np.recarray)[0]


def _stages(job: Any, sums: dict[int, Any]) -> Iterator[Stage]:
    flat, rows = unit_counts(_record(job))
    if job["types"][WEIGHT] or job["types"][MASK]:
        yield Stage(Walk.WEIGH_ALL, flat)
    if job["divides_rows"]:
        yield Stage(Walk.WEIGH_ROWS, rows)
        yield Stage(Walk.DIVIDE_ROWS, int(job["row_count"]))
    yield Stage(Walk.PREPARE, 1)
    if job["has_flat_specs"]:
        yield Stage(Walk.WALK_ALL, flat)
    if job["has_row_specs"]:
        yield Stage(Walk.WALK_ROWS, rows)
        yield Stage(Walk.FINISH_ROWS, int(job["row_count"]))
    yield Stage(Walk.FINISH, 1)
    if job["element_count"]:
        for operand, record in sums.items():
            steps, group = sum_steps(_record(record))
            yield Stage(Walk.SUM_INPUT if operand == INPUT else Walk.SUM_TARGET, int(steps), int(group))


def _job(plan: JobPlan) -> Any:
    job = np.zeros((), JOB)
    per_sample = [spec.reduction.is_per_sample for spec in plan.specs]
    job["element_count"] = plan.element_count
    job["is_float64"] = plan.result_type == DataType.FLOAT64
    if plan.input == plan.target:
        job["pair_type"] = plan.input.data_type
    job["spec_count"] = len(plan.specs)
    job["operand_count"] = len(plan.operands)
    job["output_count"] = len(plan.outputs)
    job["types"] = [0 if operand is None else operand.data_type for operand in _operands(plan)]
    job["has_flat_specs"] = not all(per_sample)
    if any(per_sample):
        job["has_row_specs"] = True
        job["row_count"] = plan.result_shape[0]
        job["row_length"] = math.prod(plan.result_shape[1:])
        job["divides_rows"] = _any_divides_rows(plan)
    job["is_pair"] = _is_pair(plan)
    return job


def _specs(plan: JobPlan) -> Any:
    is_float64 = plan.result_type == DataType.FLOAT64
    is_pair = _is_pair(plan)
    specs = np.zeros(len(plan.specs), SPEC)
    places = {(output.spec_index, output.role): place for place, output in enumerate(plan.outputs)}
    for index, (spec, record) in enumerate(zip(plan.specs, specs, strict=True)):
        record["kind"], record["parameter"], record["reduction"] = spec.kind, spec.parameter, spec.reduction
        record["denominator"] = math.nan if spec.denominator is None else spec.denominator
        record["gradient_scale"] = spec.gradient_scale
        of_spec = factors(spec, is_float64=is_float64)
        for name in ("limit", "divisor", "slope", "edge", "half", "scale", "second_scale"):
            record[name] = getattr(of_spec, name)
        record["loss_output"] = places.get((index, Role.LOSS), -1)
        for name, role, tensor in (
            ("input_gradient_output", Role.INPUT_GRADIENT, plan.input),
            ("target_gradient_output", Role.TARGET_GRADIENT, plan.target),
        ):
            place = places.get((index, role), -1)
            summed = _is_broadcast(plan, tensor)
            record[name] = -1 if summed else place
            record[f"summed_{name}"] = place if summed else -1
        record["direct_gradient_output"] = -1
        computed_in = DataType.FLOAT64 if is_float64 else DataType.FLOAT32
        has_target = record["target_gradient_output"] >= 0
        if record["input_gradient_output"] >= 0 and not has_target and plan.input.data_type == computed_in:
            record["direct_gradient_output"] = record["input_gradient_output"]
            record["input_gradient_output"] = -1
        record["is_per_sample"] = spec.reduction.is_per_sample
        record["divides_rows"] = _divides_rows(plan, spec)
        is_short = spec.reduction.is_per_sample and math.prod(plan.result_shape[1:]) <= LANES
        is_full = (
            is_short
            or plan.weight is not None
            or (spec.reduction.is_per_sample and _any_divides_rows(plan))
            or (spec.reduction == Reduction.NONE and not is_pair)
        )
        record["is_full"] = is_full
        is_direct = record["direct_gradient_output"] >= 0
        in_scratch = record["input_gradient_output"] >= 0 or has_target
        record["stores"] = in_scratch or spec.reduction == Reduction.NONE or (is_full and is_direct)
        record["loop"] = _loop(
            is_float64=is_float64,
            is_pair=is_pair,
            is_full=is_full,
            has_loss=spec.reduction == Reduction.NONE,
            has_gradient=is_direct or in_scratch,
            is_direct=is_direct,
        )
        if is_float64:
            record["sum_loop"] = Loop.FLOAT64_FULL if is_full else Loop.FLOAT64_GRADIENT
        else:
            record["sum_loop"] = Loop.FULL if is_full else Loop.PLAIN_WIDE_GRADIENT
    return specs


def _loop(
    *, is_float64: bool, is_pair: bool, is_full: bool, has_loss: bool, has_gradient: bool, is_direct: bool
) -> Loop:
    if is_pair:
        if has_loss:
            return Loop.PAIR_LOSS_GRADIENT if has_gradient else Loop.PAIR_LOSS
        return Loop.PAIR_GRADIENT if has_gradient else Loop.PAIR
    if is_float64:
        if is_full:
            return Loop.FLOAT64_FULL
        return Loop.FLOAT64_GRADIENT if has_gradient else Loop.FLOAT64_PLAIN
    if is_full:
        return Loop.FULL
    if has_gradient:
        return Loop.PLAIN_GRADIENT if is_direct else Loop.PLAIN_WIDE_GRADIENT
    return Loop.PLAIN


def _is_pair(plan: JobPlan) -> bool:
    """Return whether a loop reads the operands itself: one spec, and two float32 tensors with nothing between them."""
    (spec, *others) = plan.specs
    return (
        not others
        and plan.input == plan.target
        and plan.input.data_type == DataType.FLOAT32
        and plan.weight is None
        and plan.mask is None
        and not (spec.reduction.is_per_sample and math.prod(plan.result_shape[1:]) <= LANES)
    )


def _divides_rows(plan: JobPlan, spec: SpecPlan) -> bool:
    has_weights = plan.weight is not None or plan.mask is not None
    return has_weights and spec.reduction == Reduction.SAMPLE_MEAN and spec.denominator is None


def _any_divides_rows(plan: JobPlan) -> bool:
    return any(_divides_rows(plan, spec) for spec in plan.specs)


def _operands(plan: JobPlan) -> tuple[TensorPlan | None, ...]:
    return plan.input, plan.target, plan.weight, plan.mask


def _is_broadcast(plan: JobPlan, operand: TensorPlan) -> bool:
    return operand.element_count != plan.element_count


def _layout(plan: JobPlan) -> Any:
    strides = [_strides(operand, plan.result_shape) for operand in _operands(plan)]
    merged = _merged(plan.result_shape, strides)
    layout = np.zeros((), LAYOUT)
    layout["rank"] = len(merged)
    for dimension, (extent, own) in enumerate(merged):
        layout["shape"][dimension] = extent
        layout["strides"][:, dimension] = own
    return layout


def _sum(plan: JobPlan, operand: TensorPlan) -> Any:
    """Return how the operand's gradient is summed. The dimensions, merged, are kept and reduced in turn."""
    whole = TensorPlan(operand.data_type, plan.result_shape)
    strides = [_strides(operand, plan.result_shape), _strides(whole, plan.result_shape)]
    dimensions = _merged(plan.result_shape, strides)
    record = np.zeros((), SUM)
    record["kept"] = record["reduced"] = 1
    record["kept_is_inner"] = bool(dimensions) and dimensions[-1][1][0] != 0
    for _ in range(min(2, len(dimensions))):
        extent, (own, _result) = dimensions.pop()
        record["kept" if own else "reduced"] = extent
    kept, reduced = int(record["kept"]), int(record["reduced"])
    if record["kept_is_inner"]:
        kept_per_step = min(kept, BLOCK)
        reduced_per_step = CHUNK // kept_per_step
    else:
        reduced_per_step = min(reduced, CHUNK)
        kept_per_step = min(BLOCK, CHUNK // max(reduced_per_step, 1)) if reduced <= CHUNK else 1
    record["kept_per_step"], record["reduced_per_step"] = kept_per_step, max(reduced_per_step, 1)
    for name, is_kept in (("kept", True), ("reduced", False)):
        outer = [(extent, result) for extent, (own, result) in dimensions if (own != 0) == is_kept]
        record[f"{name}_rank"] = len(outer)
        for place, (extent, result) in enumerate(outer):
            record[f"{name}_shape"][place], record[f"{name}_strides"][place] = extent, result
        record[f"outer_{name}"] = math.prod(extent for extent, _ in outer)
    return record


def _merged(shape: tuple[int, ...], strides: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Return extent and strides of each dimension, neighbours made one where all strides allow it."""
    merged: list[tuple[int, list[int]]] = []
    for dimension, extent in enumerate(shape):
        own = [of_operand[dimension] for of_operand in strides]
        if extent == 1:
            continue
        if merged and all(outer == inner * extent for outer, inner in zip(merged[-1][1], own, strict=True)):
            merged[-1] = (merged[-1][0] * extent, own)
        else:
            merged.append((extent, own))
    return merged


def _strides(operand: TensorPlan | None, shape: tuple[int, ...]) -> list[int]:
    strides = [0] * len(shape)
    if operand is not None:
        step = 1
        for own, extent in enumerate(reversed(operand.shape), start=1):
            if extent != 1:
                strides[-own] = step
            step *= extent
    return strides


def unit_counts(job: Any) -> tuple[int, int]:
    """Return into how many units the walks over all elements, and over the samples, are cut.

    A unit is a chunk; short samples share one, CHUNK // row_length of them. Usable by numba.
    """
    flat = (job.element_count + CHUNK - 1) // CHUNK
    rows = 0
    if job.has_row_specs and job.row_length > 0:
        if job.row_length <= LANES:
            together = CHUNK // job.row_length
            rows = (job.row_count + together - 1) // together
        else:
            rows = job.row_count * ((job.row_length + CHUNK - 1) // CHUNK)
    return flat, rows


def state_offsets(job: Any, flat: int, rows: int) -> tuple[int, int, int, int, int]:
    """Return where a job's state holds its partial sums, in words, and how many words it has. Usable by numba.

    The flat walk's planes (weights, counts, then losses and non-finite counts of each spec; a word for each unit), the
    samples' planes (weights, then as before), the samples' divisors, the running sums of broadcast gradients, the end.
    `flat` and `rows` are the job's unit_counts.
    """
    flat_planes = STATE_SPECS + SPEC_STATE_WORDS * job.spec_count
    row_planes = flat_planes + flat * (2 + 2 * job.spec_count)
    divisors = row_planes + rows * (1 + 2 * job.spec_count)
    running = divisors + (job.row_count if job.divides_rows else 0)
    end = running
    if job.sum_offsets[0] > 0 or job.sum_offsets[1] > 0:
        end += 2 * BLOCK * job.spec_count
    return flat_planes, row_planes, divisors, running, end


def sum_steps(record: Any) -> tuple[int, int]:
    """Return how many steps a SUM record's walk has, and how many of them make a group. Usable by numba."""
    kept_blocks = (record.kept + record.kept_per_step - 1) // record.kept_per_step
    reduced_blocks = (record.reduced + record.reduced_per_step - 1) // record.reduced_per_step
    group = record.outer_reduced * reduced_blocks
    return record.outer_kept * kept_blocks * group, group
