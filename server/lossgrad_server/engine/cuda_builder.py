"""From a plan to what it needs of the CUDA kernels: its template, made once for each header and kept."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from lossgrad_server.engine.cuda_fields import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    FoldField,
    FoldFlag,
    LossCode,
    SegmentField,
    SegmentFlag,
    SpecField,
    SpecFlag,
)
from lossgrad_server.engine.cuda_template import (
    MAX_BYTES,
    SUMS,
    Expansion,
    Kernel,
    Place,
    Region,
    Rounding,
    Stage,
    Template,
    TooManyBytes,
    aligned,
)
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, Role, SpecPlan, unpack_header
from lossgrad_server.work import SPEC_RESULT


@lru_cache(maxsize=4096)
def template_of(header: bytes) -> Template:
    """Return the template for a JobPlan's header. Cached, because callers repeat themselves. Raises TooManyBytes."""
    plan = unpack_header(header)
    at_most = (8 * (len(plan.specs) * 2 + len(plan.operands)) + 8) * plan.element_count
    if at_most > MAX_BYTES:
        raise TooManyBytes(at_most)
    return _Builder(plan).build()


class _Builder:
    """Makes one template."""

    def __init__(self, plan: JobPlan) -> None:
        self._plan = plan
        self._sizes = [0] * len(Region)
        self._state: list[int] = []
        self._state_regions: list[int] = []
        self._programs: list[tuple[int, int, int]] = []
        self._expansions: list[Expansion] = []
        self._roundings: list[Rounding] = []
        self._is_selected = plan.weight is not None or plan.mask is not None
        # Outputs are written in float64, for torch to sum back and round.
        self._is_wide = plan.input.data_type != plan.target.data_type or (
            plan.includes_gradient and (plan.input.element_count != plan.element_count or plan.sends_target_gradient)
        )

    def build(self) -> Template:
        plan = self._plan
        operands = tuple(self._allocate(Region.INPUT, operand.byte_count) for operand in plan.operands)
        outputs = tuple(self._allocate(Region.OUTPUT, output.tensor.byte_count) for output in plan.outputs)
        numbers_byte_count = SPEC_RESULT.size * len(plan.specs)
        self._allocate(Region.NUMBERS, numbers_byte_count + (SUMS.size if self._is_selected else 0))
        self._weight_sum = Place(Region.NUMBERS, numbers_byte_count) if self._is_selected else None

        compute_type = DataType.FLOAT64 if plan.result_type == DataType.FLOAT64 else DataType.FLOAT32
        self._operand_type = compute_type if self._is_wide else plan.result_type
        self._output_type = DataType.FLOAT64 if self._is_wide else plan.result_type
        self._operand_fields = self._place_operands(operands)
        self._outputs = {
            (output.spec_index, output.role): (output.tensor, place)
            for output, place in zip(plan.outputs, outputs, strict=True)
        }
        whole = [index for index, spec in enumerate(plan.specs) if not spec.reduction.is_per_sample]
        samples = [index for index, spec in enumerate(plan.specs) if spec.reduction.is_per_sample]
        if whole or self._is_selected:
            self._add_segment(_Matrix(1, plan.element_count), whole, has_rows=False)
        if samples:
            row_length = math.prod(plan.result_shape[1:])
            self._add_segment(_Matrix(plan.result_shape[0], row_length), samples, has_rows=True)

        self._sizes[Region.STATE] = aligned(8 * len(self._state))
        return Template(
            plan=plan,
            sizes=tuple(self._sizes),
            operands=operands,
            outputs=outputs,
            weight_sum=self._weight_sum,
            state=_padded(self._state, self._sizes[Region.STATE], np.int64),
            state_regions=_padded(self._state_regions, self._sizes[Region.STATE], np.int8),
            # The kernels overwrite the first of each four where the loss is one number, and add to the last.
            numbers=_padded(
                [0, plan.element_count, _bits(float(plan.element_count)), 0] * len(plan.specs),
                self._sizes[Region.NUMBERS],
                np.int64,
            ),
            programs=np.array(self._programs, np.int64).reshape(-1, 3),
            expansions=tuple(self._expansions),
            roundings=tuple(self._roundings),
        )

    def _place_operands(self, operands: tuple[Place, ...]) -> dict[SegmentField, int | Place]:
        plan = self._plan
        types = [self._operand_type, self._operand_type]
        names = [SegmentField.INPUT, SegmentField.TARGET]
        flags = SegmentFlag(0)
        if plan.weight is not None:
            is_double = plan.weight.data_type == DataType.FLOAT64
            flags |= SegmentFlag.WEIGHT | (SegmentFlag.FLOAT64_WEIGHT if is_double else SegmentFlag(0))
            types.append(DataType.FLOAT64 if is_double else DataType.FLOAT32)
            names.append(SegmentField.WEIGHT)
        if plan.mask is not None:
            flags |= SegmentFlag.MASK
            types.append(DataType.BOOL)
            names.append(SegmentField.MASK)
        fields: dict[SegmentField, int | Place] = {SegmentField.FLAGS: int(flags)}
        for name, place, tensor, data_type in zip(names, operands, plan.operands, types, strict=True):
            fields[name] = place
            if tensor.data_type != data_type or tensor.element_count != plan.element_count:
                expanded = self._allocate(Region.SCRATCH, plan.element_count * data_type.itemsize)
                self._expansions.append(Expansion(place, tensor, expanded, data_type))
                fields[name] = expanded
        return fields

    def _add_segment(self, rows: _Matrix, spec_indices: list[int], *, has_rows: bool) -> None:
        plan = self._plan
        weight_sums = self._weight_sum
        fields = dict(self._operand_fields)
        if has_rows:
            divided = [plan.specs[index] for index in spec_indices if plan.specs[index].reduction.is_mean]
            if weight_sums is not None and any(spec.denominator is None for spec in divided):
                weight_sums = self._allocate(Region.SCRATCH, 8 * rows.row_count)
            else:
                weight_sums = None
        if weight_sums is not None:
            partials = self._allocate(Region.SCRATCH, 8 * rows.row_count * rows.chunks)
            fields[SegmentField.WEIGHT_PARTIALS] = partials
            self._add_fold(
                Stage.WEIGHT_FOLDS,
                rows,
                {FoldField.PARTIALS: partials, FoldField.OUTPUT: weight_sums, FoldField.OUTPUT_TYPE: DataType.FLOAT64},
            )
            if not has_rows:
                fields[SegmentField.UNMASKED_COUNT] = Place(weight_sums.region, weight_sums.offset + 8)
        specs = [self._spec_fields(index, plan.specs[index], rows, weight_sums) for index in spec_indices]
        places = [self._add_record(SpecField, spec) for spec in specs]
        fields |= {
            SegmentField.ROW_COUNT: rows.row_count,
            SegmentField.ROW_LENGTH: rows.row_length,
            SegmentField.ROWS_LOG2: rows.rows_log2,
            SegmentField.CHUNKS_PER_ROW: max(rows.chunks, 1),
            SegmentField.SPEC_COUNT: len(specs),
        }
        if places:
            fields[SegmentField.SPECS] = places[0]
        segment = self._add_record(SegmentField, fields)
        tile_count = rows.tile_count if has_rows else rows.chunks
        if weight_sums is not None:
            self._add_program(Kernel(Stage.WEIGHTS, has_rows), segment, tile_count)
        if specs:
            kernel = Kernel(
                Stage.LOSSES, has_rows, self._is_selected or has_rows, self._operand_type, self._output_type
            )
            self._add_program(kernel, segment, tile_count)

    def _spec_fields(
        self, index: int, spec: SpecPlan, rows: _Matrix, weight_sums: Place | None
    ) -> dict[SpecField, int | Place]:
        code, parameter = _formula(spec)
        fields: dict[SpecField, int | Place] = {
            SpecField.CODE: code,
            SpecField.PARAMETER: _bits(parameter),
            SpecField.HALF_PARAMETER: _bits(0.5 * parameter),
            SpecField.GRADIENT_SCALE: _bits(spec.gradient_scale),
            SpecField.NONFINITE_COUNT: Place(Region.NUMBERS, SPEC_RESULT.size * index + _NONFINITE_OFFSET),
        }
        flags = SpecFlag(0)
        fold: dict[FoldField, int | Place] = {}
        if spec.reduction.is_mean:
            flags |= SpecFlag.DIVISOR
            if spec.denominator is None and weight_sums is not None:
                divisor, stride = weight_sums, int(spec.reduction.is_per_sample)
            else:
                divisor, stride = (
                    self._constant(float(rows.row_length) if spec.denominator is None else spec.denominator),
                    0,
                )
            fields |= {SpecField.DIVISOR: divisor, SpecField.DIVISOR_STRIDE: stride}
            fold = {FoldField.FLAGS: FoldFlag.DIVISOR, FoldField.DIVISOR: divisor, FoldField.DIVISOR_STRIDE: stride}
        if spec.reduction == Reduction.NONE:
            flags |= SpecFlag.WRITE_LOSS
            fields[SpecField.LOSS] = self._written(index, (Role.LOSS,))
        else:
            flags |= SpecFlag.SUM
            partials = self._allocate(Region.SCRATCH, 8 * rows.row_count * rows.chunks)
            fields[SpecField.PARTIALS] = fold[FoldField.PARTIALS] = partials
            if spec.reduction.is_scalar:
                fold[FoldField.OUTPUT] = Place(Region.NUMBERS, SPEC_RESULT.size * index)
                fold[FoldField.OUTPUT_TYPE] = DataType.FLOAT64
            else:
                fold[FoldField.OUTPUT] = self._outputs[index, Role.LOSS][1]
                fold[FoldField.OUTPUT_TYPE] = self._plan.result_type
            self._add_fold(Stage.LOSS_FOLDS, rows, fold)
        if spec.include_gradient:
            flags |= SpecFlag.WRITE_GRADIENT
            fields[SpecField.GRADIENT] = self._written(index, (Role.INPUT_GRADIENT, Role.TARGET_GRADIENT))
        fields[SpecField.FLAGS] = flags
        return fields

    def _written(self, index: int, roles: tuple[Role, ...]) -> Place:
        """Return where the kernel writes an elementwise output."""
        if not self._is_wide:
            return self._outputs[index, roles[0]][1]
        wide = self._allocate(Region.SCRATCH, 8 * self._plan.element_count)
        for role in roles:
            if (index, role) in self._outputs:
                tensor, place = self._outputs[index, role]
                self._roundings.append(Rounding(wide, place, tensor, is_negated=role == Role.TARGET_GRADIENT))
        return wide

    def _add_fold(self, stage: Stage, rows: _Matrix, fields: Mapping[FoldField, int | Place]) -> None:
        record = self._add_record(FoldField, rows.fold() | dict(fields))
        self._add_program(Kernel(stage), record, rows.fold_tile_count)

    def _add_program(self, kernel: Kernel, record: Place, tile_count: int) -> None:
        if tile_count:
            self._programs.append((kernel.code, record.offset, tile_count))

    def _add_record(self, fields: type[IntEnum], values: Mapping[Any, int | Place]) -> Place:
        place = Place(Region.STATE, 8 * len(self._state))
        for name in fields:
            value = values.get(name, 0)
            region, number = value if isinstance(value, Place) else (Region.NOWHERE, int(value))
            self._state.append(number)
            self._state_regions.append(region)
        return place

    def _constant(self, value: float) -> Place:
        place = Place(Region.STATE, 8 * len(self._state))
        self._state.append(_bits(value))
        self._state_regions.append(Region.NOWHERE)
        return place

    def _allocate(self, region: Region, byte_count: int) -> Place:
        place = Place(region, self._sizes[region])
        self._sizes[region] += aligned(byte_count)
        return place


_NONFINITE_OFFSET: Final = struct.calcsize("<dqd")


class _Matrix(NamedTuple):
    """The matrix as which a segment is walked, and how its rows are cut."""

    row_count: int
    row_length: int

    @property
    def chunks(self) -> int:
        """How many chunks a row has, and partial sums."""
        return -(-self.row_length // CHUNK_ELEMENTS)

    @property
    def rows_log2(self) -> int:
        """The logarithm of the number of rows that one tile holds."""
        return _log2(max(BLOCK_ELEMENTS // _power_of_two(self.row_length), 1))

    @property
    def tile_count(self) -> int:
        """How many tiles of whole rows, or of chunks of one, there are."""
        return -(-self.row_count // (1 << self.rows_log2)) * self.chunks

    @property
    def fold_tile_count(self) -> int:
        """How many tiles its fold has."""
        return -(-self.row_count // (1 << self._fold_rows_log2))

    @property
    def _fold_rows_log2(self) -> int:
        return _log2(max(BLOCK_ELEMENTS // _power_of_two(self.chunks), 1))

    def fold(self) -> dict[FoldField, int | Place]:
        """Return the fields of the fold of its partial sums that depend on its shape."""
        return {
            FoldField.ROW_COUNT: self.row_count,
            FoldField.PARTIALS_PER_ROW: self.chunks,
            FoldField.ROWS_LOG2: self._fold_rows_log2,
        }


def _formula(spec: SpecPlan) -> tuple[LossCode, float]:
    match spec.kind:
        case LossKind.SMOOTH_L1 if spec.parameter == 0:
            return LossCode.L1, 0.0
        case LossKind.SMOOTH_L1 if math.isinf(spec.parameter):
            return LossCode.SMOOTH_L1_INFINITE, 0.0
        case LossKind.SMOOTH_L1:
            return LossCode.SMOOTH_L1, spec.parameter
        case LossKind.HUBER:
            return LossCode.HUBER, spec.parameter
        case LossKind.L1:
            return LossCode.L1, 0.0
        case LossKind.MSE:
            return LossCode.MSE, 0.0


def _bits(value: float) -> int:
    """Return a float64's bits as an int64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least the count, and 1."""
    return 1 << max(count - 1, 0).bit_length()


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _padded(numbers: list[int], byte_count: int, dtype: type[np.signedinteger[Any]]) -> np.ndarray[Any, Any]:
    """Return as many numbers as int64 fill the bytes, zeros behind the given ones."""
    return np.array(numbers + [0] * (byte_count // 8 - len(numbers)), dtype)
