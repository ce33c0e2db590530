"""From a plan to the program that the CPU kernels read: the tables of cpu_layout.py, made once for a plan and kept."""

# mypy: disable-error-code="call-overload, no-any-return"
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_formulas import factors
from lossgrad_server.engine.cpu_layout import (
    BLOCK,
    CHUNK,
    INPUT,
    JOB,
    LAYOUT,
    OUTPUT,
    OUTPUT_ALIGNMENT,
    RUNNING_WORDS,
    SHORT_ROW,
    SPEC,
    SPEC_STATE_WORDS,
    STATE_SPECS,
    STREAMED_BYTES,
    STREAMED_LOOPS,
    SUM,
    TARGET,
    Loop,
    Walk,
)
from lossgrad_server.jobs import DataType, JobPlan, Reduction, Role, SpecPlan, TensorPlan, unpack_header
from lossgrad_server.work import SPEC_RESULT, SPEC_TOTAL, Buffer, WorkResult


@dataclass(frozen=True, slots=True)
class Program:
    """A plan as the kernels read it, and what the worker must know to run it."""

    code: bytes
    spec_count: int
    operand_count: int
    # Its SPEC_RESULT records', and those of the SPEC_TOTAL records behind them.
    result_bytes: int
    total_bytes: int
    # Where each output begins and ends in the memory that holds them all, and that memory's length, in bytes.
    output_spans: tuple[tuple[int, int], ...]
    output_bytes: int
    element_count: int
    state_bytes: int
    # About how long it takes: elements times losses.
    work: int
    # What there is to do, and how many units it has.
    walks: tuple[tuple[Walk, int], ...]

    def result(self, records: bytes, outputs: tuple[Buffer, ...]) -> WorkResult:
        """Return the job's result, from its records and its outputs."""
        if self.total_bytes:
            return WorkResult(records[: -self.total_bytes], outputs, records[-self.total_bytes :])
        return WorkResult(records, outputs)


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
    job["streams"] = np.isin(specs["loop"], STREAMED_LOOPS).any()
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
    total_bytes = SPEC_TOTAL.size * len(plan.specs) if plan.wants_totals else 0
    job["result_bytes"] = SPEC_RESULT.size * len(plan.specs) + total_bytes
    return Program(
        code=job.tobytes() + tables,
        spec_count=len(plan.specs),
        operand_count=len(plan.operands),
        result_bytes=int(job["result_bytes"]),
        total_bytes=total_bytes,
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
    if 0 < row_length <= SHORT_ROW:  # several to a unit
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
    end = job["running_sums"] + (RUNNING_WORDS * len(plan.specs) if sums else 0)
    if plan.wants_totals:
        job["extreme_planes"] = end
        end += 2 * flat * len(plan.specs)
    job["state_words"] = end


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
        is_short = spec.reduction.is_per_sample and math.prod(plan.result_shape[1:]) <= SHORT_ROW
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
            is_beyond_caches=plan.output_byte_count >= STREAMED_BYTES,
        )
        if is_float64:
            record["sum_loop"] = Loop.FLOAT64_FULL if is_full else Loop.FLOAT64_GRADIENT
        else:
            record["sum_loop"] = Loop.FULL if is_full else Loop.PLAIN_WIDE_GRADIENT
    return specs


def _loop(
    *,
    is_float64: bool,
    is_pair: bool,
    is_full: bool,
    has_loss: bool,
    has_gradient: bool,
    is_direct: bool,
    is_beyond_caches: bool,
) -> Loop:
    if is_pair:
        if has_loss:
            return Loop.PAIR_LOSS_GRADIENT if has_gradient else Loop.PAIR_LOSS
        if has_gradient:
            return Loop.PAIR_STREAMED_GRADIENT if is_beyond_caches else Loop.PAIR_GRADIENT
        return Loop.PAIR
    if is_float64:
        if is_full:
            return Loop.FLOAT64_FULL
        if is_direct and is_beyond_caches:
            return Loop.FLOAT64_STREAMED_GRADIENT
        return Loop.FLOAT64_GRADIENT if has_gradient else Loop.FLOAT64_PLAIN
    if is_full:
        return Loop.FULL
    if has_gradient:
        if not is_direct:
            return Loop.PLAIN_WIDE_GRADIENT
        return Loop.PLAIN_STREAMED_GRADIENT if is_beyond_caches else Loop.PLAIN_GRADIENT
    return Loop.PLAIN


def _is_pair(plan: JobPlan) -> bool:
    """Return whether a loop reads the operands itself: one spec, and two float32 tensors with nothing between them.

    Totals need differences in scratch memory, too.
    """
    (spec, *others) = plan.specs
    return (
        not others
        and not plan.wants_totals
        and plan.input == plan.target
        and plan.input.data_type == DataType.FLOAT32
        and plan.weight is None
        and plan.mask is None
        and not (spec.reduction.is_per_sample and math.prod(plan.result_shape[1:]) <= SHORT_ROW)
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
