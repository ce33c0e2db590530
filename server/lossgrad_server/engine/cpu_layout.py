"""The tables that a plan becomes for the CPU kernels, and where their memory lies. No numba here.

A plan becomes one `program`: a JOB record, its SPEC records, its OUTPUT records and, where an operand is broadcast, a
LAYOUT record. Programs stand one behind the other in a batch. They are made once for a plan and kept with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

import numpy as np

from lossgrad_server.engine.cpu_formulas import factors
from lossgrad_server.jobs import (
    MAX_RANK,
    MAX_SPECS,
    DataType,
    JobPlan,
    Reduction,
    Role,
    SpecPlan,
    TensorPlan,
    unpack_header,
)
from lossgrad_server.work import SPEC_RESULT

# Every reduction is cut into chunks of this many elements; each becomes one float64 partial sum.
CHUNK: Final = 4096
# Element i of a chunk is added to lane i % LANES; at the chunk's end the lanes are folded in half until one is left.
LANES: Final = 64
# How many rows of LANES elements a loop takes at once.
ROWS: Final = 4
# The elements that are brought at a time, so that what is between the steps stays in the nearest cache.
BLOCK: Final = 512


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


# A job's operands, by their place in the tables.
INPUT, TARGET, WEIGHT, MASK = range(4)

_word = np.int64
_WALK_COUNT: Final = len(Walk)
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
        ("is_broadcast", _word, (4,)),
        ("operand_bytes", _word, (4,)),  # in the order in which they come
        ("row_count", _word),  # the samples of per-sample reductions, and their length; 0 without such reductions
        ("row_length", _word),
        ("divides_rows", _word),  # whether a mean over each sample divides by that sample's weights
        # The SUM records of input and target, from the program's start; 0 where no gradient is summed.
        ("sum_offsets", _word, (2,)),
        # The units of each Walk, 0 where there is nothing to do; and of the walks over all elements and over the samples.
        ("units", _word, (_WALK_COUNT,)),
        ("flat_units", _word),
        ("row_units", _word),
        # Where in the job's state, in words, the partial sums are: planes of one word for each unit. First the weights;
        # in a walk over all elements the counts of what is not masked; then for each spec its losses and how many of
        # them are not finite. Then the samples' divisors, and the running sums of broadcast gradients.
        ("flat_planes", _word),
        ("row_planes", _word),
        ("row_divisors", _word),
        ("running_sums", _word),
        ("state_words", _word),
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
        ("inverse_divisor", np.float64),
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
        # How many of each make up one step: about a chunk of elements. Where `kept` is the inner, `rows` of the other are
        # added side by side.
        ("kept_per_step", _word),
        ("reduced_per_step", _word),
        ("rows", _word),
        ("kept_rank", _word),
        ("kept_shape", _word, (MAX_RANK,)),
        ("kept_strides", _word, (MAX_RANK,)),
        ("reduced_rank", _word),
        ("reduced_shape", _word, (MAX_RANK,)),
        ("reduced_strides", _word, (MAX_RANK,)),
        ("outer_kept", _word),
        ("outer_reduced", _word),
        # Steps that fill the same elements make a group: they must be done in order.
        ("group", _word),
        ("group_count", _word),
    ]
)
# Where a job's memory lies: addresses. `operands` is the address of an array of addresses.
FRAME: Final = np.dtype(
    [(name, _word) for name in ("program", "operands", "outputs", "results", "state", "scratch", "loops")]
)

# Outputs start on cache lines.
OUTPUT_ALIGNMENT: Final = 64

# Scratch memory, one for each thread: offsets in bytes. First blocks of float64. Written ones start elsewhere within
# 512 bytes, a row of lanes, than those read at the same time: a load from where a store 4 KiB away is still under way
# waits for it (measured: a block takes up to 4 times as long).
_BLOCK_BYTES: Final = 8 * BLOCK
SCRATCH_DIFFERENCE: Final = 0
SCRATCH_WEIGHT: Final = _BLOCK_BYTES + 64
SCRATCH_SCALE: Final = 2 * _BLOCK_BYTES + 128
SCRATCH_GRADIENT: Final = 3 * _BLOCK_BYTES + 320
SCRATCH_LOSS: Final = 4 * _BLOCK_BYTES + 384
SCRATCH_INPUT: Final = 5 * _BLOCK_BYTES + 512 + 192
SCRATCH_TARGET: Final = 6 * _BLOCK_BYTES + 512 + 256
# A block's mask, a byte for each element, 0 or 1.
SCRATCH_MASK: Final = 7 * _BLOCK_BYTES + 1024
# Where the elements of a broadcast operand lie, and the elements themselves as they came.
SCRATCH_OFFSETS: Final = SCRATCH_MASK + BLOCK
SCRATCH_GATHERED: Final = SCRATCH_OFFSETS + _BLOCK_BYTES
SCRATCH_INDICES: Final = SCRATCH_GATHERED + _BLOCK_BYTES
# Sums of short runs (cpu_sums.fold_runs), and what they lost.
SCRATCH_RUNS: Final = SCRATCH_INDICES + 8 * MAX_RANK
SCRATCH_RUNS_LOST: Final = SCRATCH_RUNS + _BLOCK_BYTES
# The sums' lanes, and what they lost, for each spec.
SCRATCH_LANES: Final = SCRATCH_RUNS_LOST + _BLOCK_BYTES
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
# The running sums of a spec's broadcast gradient, what they lost, and the same of the step that is being added.
RUNNING_WORDS: Final = 4 * BLOCK


@dataclass(frozen=True, slots=True)
class Program:
    """A plan as the kernels read it, and what the worker must know to run it."""

    code: bytes
    spec_count: int
    operand_count: int
    # Its SPEC_RESULT records'.
    result_bytes: int
    # Where each output begins and ends in the memory that holds them all, and that memory's length, in bytes.
    output_spans: tuple[tuple[int, int], ...]
    output_bytes: int
    element_count: int
    state_bytes: int
    # About how long it takes: elements times losses.
    work: int
    # What there is to do, and how many units it has.
    walks: tuple[tuple[Walk, int], ...]


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
    _set_units(job, plan, sums)
    job["program_bytes"] = JOB.itemsize + len(tables)
    job["output_bytes"] = offset
    return Program(
        code=job.tobytes() + tables,
        spec_count=len(plan.specs),
        operand_count=len(plan.operands),
        result_bytes=SPEC_RESULT.size * len(plan.specs),
        output_spans=tuple(spans),
        output_bytes=offset,
        element_count=plan.element_count,
        state_bytes=8 * int(job["state_words"]),
        work=plan.element_count * len(plan.specs),
        walks=tuple((which, int(job["units"][which])) for which in Walk if job["units"][which]),
    )


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
    job["is_broadcast"] = [operand is not None and _is_broadcast(plan, operand) for operand in _operands(plan)]
    for place, operand in enumerate(plan.operands):
        job["operand_bytes"][place] = operand.byte_count
    if any(per_sample):
        job["row_count"] = plan.result_shape[0]
        job["row_length"] = math.prod(plan.result_shape[1:])
        job["divides_rows"] = _any_divides_rows(plan)
    job["is_pair"] = _is_pair(plan)
    return job


def _set_units(job: Any, plan: JobPlan, sums: dict[int, Any]) -> None:
    """Fill in how the walks are cut into units, and where they keep their partial sums."""
    flat = -(-plan.element_count // CHUNK)
    rows = 0
    row_count, row_length = int(job["row_count"]), int(job["row_length"])
    if 0 < row_length <= LANES:  # several to a unit
        rows = -(-row_count // (CHUNK // row_length))
    elif row_length:
        rows = row_count * -(-row_length // CHUNK)
    per_sample = [spec.reduction.is_per_sample for spec in plan.specs]
    units = job["units"]
    units[Walk.PREPARE] = units[Walk.FINISH] = 1
    if plan.weight is not None or plan.mask is not None:
        units[Walk.WEIGH_ALL] = flat
    if job["divides_rows"]:
        units[Walk.WEIGH_ROWS], units[Walk.DIVIDE_ROWS] = rows, row_count
    if not all(per_sample):
        units[Walk.WALK_ALL] = flat
    if any(per_sample):
        units[Walk.WALK_ROWS], units[Walk.FINISH_ROWS] = rows, row_count
    if plan.element_count:
        for operand, record in sums.items():
            units[Walk.SUM_INPUT if operand == INPUT else Walk.SUM_TARGET] = record["group"] * record["group_count"]
    job["flat_units"], job["row_units"] = flat, rows
    job["flat_planes"] = STATE_SPECS + SPEC_STATE_WORDS * len(plan.specs)
    job["row_planes"] = job["flat_planes"] + flat * (2 + 2 * len(plan.specs))
    job["row_divisors"] = job["row_planes"] + rows * (1 + 2 * len(plan.specs))
    job["running_sums"] = job["row_divisors"] + (row_count if job["divides_rows"] else 0)
    job["state_words"] = job["running_sums"] + (RUNNING_WORDS * len(plan.specs) if sums else 0)


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
        record["inverse_divisor"] = 1.0 / of_spec.divisor
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
        has_loss = spec.reduction == Reduction.NONE
        record["stores"] = in_scratch or (is_full and is_direct) or (has_loss and not is_pair)
        record["loop"] = _loop(
            is_float64=is_float64,
            is_pair=is_pair,
            is_full=is_full,
            has_loss=has_loss,
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
        kept_per_step = max(1, min(kept, BLOCK))
        rows = 1 << ((BLOCK // kept_per_step).bit_length() - 1)
        reduced_per_step = CHUNK // kept_per_step // rows * rows
        record["rows"] = rows
    else:
        reduced_per_step = max(1, min(reduced, CHUNK))
        kept_per_step = min(BLOCK, CHUNK // reduced_per_step)
    record["kept_per_step"], record["reduced_per_step"] = kept_per_step, reduced_per_step
    for name, is_kept in (("kept", True), ("reduced", False)):
        outer = [(extent, result) for extent, (own, result) in dimensions if (own != 0) == is_kept]
        record[f"{name}_rank"] = len(outer)
        for place, (extent, result) in enumerate(outer):
            record[f"{name}_shape"][place], record[f"{name}_strides"][place] = extent, result
        record[f"outer_{name}"] = math.prod(extent for extent, _ in outer)
    record["group"] = record["outer_reduced"] * -(-reduced // int(record["reduced_per_step"]))
    record["group_count"] = record["outer_kept"] * -(-kept // int(record["kept_per_step"]))
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
