"""One job on one device: operands in, losses, gradients and counts out, all as tensors that stay on the device.

Every spec is one walk over the result's elements in pieces, so that the float64 temporaries are a few pieces large
however large the job is. Only a gradient that has to be summed back to a broadcast operand is held whole in float64.
The size of a piece changes no bits (reductions.py). Sums over all elements are exact sums of their chunks' (exact_sums.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossgrad_server.engine.exact_sums import exact_sum, quotient, rounded
from lossgrad_server.engine.losses import loss_and_derivative
from lossgrad_server.engine.reductions import CHUNK_ELEMENTS, RowSums, sum_to_shape
from lossgrad_server.engine.tensors import TORCH_TYPES, OperandReader, round_into
from lossgrad_server.jobs import DataType, JobPlan, Reduction, Role, SpecPlan
from lossgrad_server.work import SpecTotal

# How many float64 arrays of a piece's length live at a time, counted from above.
_TEMPORARIES_PER_PIECE = 8


@dataclass(frozen=True, slots=True)
class Computed:
    """A job's answer, on the device. `numbers` is float64, a row for each spec: the fields of SPEC_RESULT.

    `totals` is a record for each spec, where the plan wants them.
    """

    numbers: Tensor
    outputs: list[Tensor]
    totals: list[SpecTotal]


def required_bytes(plan: JobPlan, piece_elements: int) -> int:
    """Return about how much device memory the job takes, counted from above."""
    piece = _TEMPORARIES_PER_PIECE * 8 * min(plan.element_count, piece_elements)
    operands = sum(_expanded_bytes(plan, tensor.element_count, tensor.data_type) for tensor in plan.operands)
    wide = any(spec.include_gradient for spec in plan.specs) and _sums_a_gradient(plan)
    return plan.input_byte_count + operands + plan.output_byte_count + piece + (16 * plan.element_count if wide else 0)


def _expanded_bytes(plan: JobPlan, element_count: int, data_type: DataType) -> int:
    return 0 if element_count == plan.element_count else plan.element_count * data_type.itemsize


def _sums_a_gradient(plan: JobPlan) -> bool:
    return plan.input.element_count != plan.element_count or (
        plan.sends_target_gradient and plan.target.element_count != plan.element_count
    )


class Computation:
    """Computes one job. Call `run` once."""

    def __init__(self, plan: JobPlan, operands: Sequence[Tensor], device: torch.device, piece_elements: int) -> None:
        """`operands` are the bytes of `plan.operands` as flat uint8 tensors on the device.

        `piece_elements` is a multiple of CHUNK_ELEMENTS.
        """
        if piece_elements % CHUNK_ELEMENTS:
            raise ValueError(f"piece_elements is {piece_elements}; it must be a multiple of {CHUNK_ELEMENTS}")
        self._plan = plan
        self._device = device
        self._piece_elements = piece_elements
        readers = [
            OperandReader(data, tensor, plan.result_shape, plan.element_count)
            for data, tensor in zip(operands, plan.operands, strict=True)
        ]
        self._input, self._target = readers[0], readers[1]
        self._weight = readers[2] if plan.weight is not None else None
        self._mask = readers[-1] if plan.mask is not None else None
        # float16 and bfloat16 are subtracted in float32, as torch's CPU kernels do; float32 and float64 in themselves.
        self._difference_dtype = torch.float64 if plan.result_type == DataType.FLOAT64 else torch.float32

    def run(self) -> Computed:
        """Compute every spec. On CUDA this waits where a sum is of more than one chunk."""
        plan = self._plan
        counts = self._count_elements()
        weights = self._sum_weights()
        weight_sums = self._full(1, rounded(weights))
        if any(spec.reduction == Reduction.SAMPLE_MEAN and spec.denominator is None for spec in plan.specs):
            sample_weight_sums = self._sum_weights_of_samples()
        else:
            sample_weight_sums = weight_sums
        outputs = [
            torch.empty(output.tensor.element_count, dtype=TORCH_TYPES[output.tensor.data_type], device=self._device)
            for output in plan.outputs
        ]
        rows: list[Tensor] = []
        totals: list[SpecTotal] = []
        for index, spec in enumerate(plan.specs):
            of_spec = {
                output.role: tensor
                for output, tensor in zip(plan.outputs, outputs, strict=True)
                if output.spec_index == index
            }
            divisors = sample_weight_sums if spec.reduction.is_per_sample else weight_sums
            extremes = _Extremes(self._device) if plan.wants_totals else None
            scalar, nonfinite_count, total = self._compute(spec, divisors, of_spec, extremes)
            rows.append(torch.stack((scalar, counts, weight_sums[0], nonfinite_count)))
            if extremes is not None:
                totals.append(SpecTotal(*extremes.result(), total, weights))
        return Computed(torch.stack(rows), outputs, totals)

    def _compute(
        self, spec: SpecPlan, weight_sums: Tensor, outputs: dict[Role, Tensor], extremes: _Extremes | None
    ) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Fill the spec's outputs and extremes.

        Returns its scalar and its count of non-finite losses, both 0-d float64, and the exact sum of its losses, which
        is none where nothing needs it.
        """
        row_count, row_length = self._rows(spec.reduction.is_per_sample)
        divisors: Tensor | None = None
        if spec.reduction.is_mean:
            # A tensor, not a number, for the reason given in losses.py.
            divisors = weight_sums if spec.denominator is None else self._full(row_count, spec.denominator)
        is_summed = spec.reduction != Reduction.NONE or extremes is not None
        sums = RowSums(row_count, row_length, self._device) if is_summed else None
        gradients = _GradientSinks(self._plan, outputs, self._device) if spec.include_gradient else None
        nonfinite_count = torch.zeros((), dtype=torch.int64, device=self._device)

        for first_row, rows, first_column, columns in self._pieces(row_count, row_length):
            start = first_row * row_length + first_column
            stop = start + rows * columns
            loss, gradient = loss_and_derivative(spec.kind, spec.parameter, self._difference(start, stop))
            masked_out = None if self._mask is None else self._mask.read(start, stop).logical_not_()
            weight = None if self._weight is None else self._weight.read(start, stop).to(torch.float64)

            finite = loss < math.inf  # false for NaN too; no loss is negative
            if masked_out is not None:
                finite.logical_or_(masked_out)
            nonfinite_count += (stop - start) - finite.count_nonzero()

            if weight is not None:
                loss.mul_(weight)
            if extremes is not None:
                extremes.add(loss, masked_out)
            if masked_out is not None:
                loss.masked_fill_(masked_out, 0.0)
            if spec.reduction == Reduction.NONE:
                round_into(outputs[Role.LOSS][start:stop], loss)
            if sums is not None:
                sums.add(loss.view(rows, columns), first_row, first_column)

            if gradients is not None:
                # dl/dinput * w * gradient_scale / divisor
                if weight is not None:
                    gradient.mul_(weight)
                if spec.gradient_scale != 1.0:
                    gradient.mul_(spec.gradient_scale)
                if divisors is not None:
                    gradient.view(rows, columns).div_(divisors[first_row : first_row + rows, None])
                if masked_out is not None:
                    gradient.masked_fill_(masked_out, 0.0)
                gradients.write(start, stop, gradient)

        if gradients is not None:
            gradients.finish()
        scalar = torch.zeros((), dtype=torch.float64, device=self._device)
        total: tuple[float, ...] = ()
        if sums is not None and spec.reduction.is_per_sample:
            of_rows = sums.totals()
            round_into(outputs[Role.LOSS], of_rows if divisors is None else of_rows / divisors)
        elif sums is not None:
            total = sums.total()
            if spec.reduction.is_scalar:
                (scalar,) = self._full(1, quotient(total, 1.0 if divisors is None else divisors.item()))
        return scalar, nonfinite_count.to(torch.float64), total

    def _difference(self, start: int, stop: int) -> Tensor:
        """Return d = input - target as float64, for the caller to overwrite."""
        input = self._input.read(start, stop).to(self._difference_dtype)
        target = self._target.read(start, stop).to(self._difference_dtype)
        return (input - target).to(torch.float64)

    def _count_elements(self) -> Tensor:
        """Return how many elements are not masked, 0-d float64 (exact up to 2^53)."""
        if self._mask is None:
            return torch.full((), float(self._plan.element_count), dtype=torch.float64, device=self._device)
        count = torch.zeros((), dtype=torch.int64, device=self._device)
        for start in range(0, self._plan.element_count, self._piece_elements):
            count += self._mask.read(start, min(start + self._piece_elements, self._plan.element_count)).count_nonzero()
        return count.to(torch.float64)

    def _sum_weights(self) -> tuple[float, ...]:
        """Return the exact sum of the unmasked elements' weights."""
        if self._weight is None and self._mask is None:
            return exact_sum([float(self._plan.element_count)])
        return self._add_weights(*self._rows(per_sample=False)).total()

    def _sum_weights_of_samples(self) -> Tensor:
        """Return the sum of the unmasked elements' weights of each sample."""
        row_count, row_length = self._rows(per_sample=True)
        if self._weight is None and self._mask is None:
            return self._full(row_count, float(row_length))
        return self._add_weights(row_count, row_length).totals()

    def _add_weights(self, row_count: int, row_length: int) -> RowSums:
        sums = RowSums(row_count, row_length, self._device)
        for first_row, rows, first_column, columns in self._pieces(row_count, row_length):
            start = first_row * row_length + first_column
            stop = start + rows * columns
            if self._weight is None:
                assert self._mask is not None  # noqa: S101
                weight = self._mask.read(start, stop).to(torch.float64)
            else:
                # copy: the sum overwrites it, and it may be a view of the received bytes.
                weight = self._weight.read(start, stop).to(torch.float64, copy=True)
                if self._mask is not None:
                    weight.masked_fill_(self._mask.read(start, stop).logical_not_(), 0.0)
            sums.add(weight.view(rows, columns), first_row, first_column)
        return sums

    def _full(self, length: int, value: float) -> Tensor:
        return torch.full((length,), value, dtype=torch.float64, device=self._device)

    def _rows(self, per_sample: bool) -> tuple[int, int]:
        """Return the matrix as which the result is walked: a row for each sample, or one row of all elements."""
        if not per_sample:
            return 1, self._plan.element_count
        return self._plan.result_shape[0], math.prod(self._plan.result_shape[1:])

    def _pieces(self, row_count: int, row_length: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield first row, row count, first column, column count: whole rows, or parts of one on chunk boundaries."""
        if row_length == 0:
            return
        if row_length > self._piece_elements:
            for row in range(row_count):
                for column in range(0, row_length, self._piece_elements):
                    yield row, 1, column, min(self._piece_elements, row_length - column)
        else:
            rows_per_piece = self._piece_elements // row_length
            for row in range(0, row_count, rows_per_piece):
                yield row, min(rows_per_piece, row_count - row), 0, row_length


class _Extremes:
    """The least and the greatest of a spec's losses, NaN and masked ones left out."""

    def __init__(self, device: torch.device) -> None:
        self._minimum = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._maximum = -self._minimum

    def add(self, losses: Tensor, masked_out: Tensor | None) -> None:
        """Take in the losses of at least one element."""
        left_out = losses.isnan()
        if masked_out is not None:
            left_out.logical_or_(masked_out)
        self._minimum = torch.minimum(self._minimum, losses.masked_fill(left_out, math.inf).amin())
        self._maximum = torch.maximum(self._maximum, losses.masked_fill(left_out, -math.inf).amax())

    def result(self) -> tuple[float, float]:
        """Return them. Waits for the device."""
        # A weight may be negative, and -0.0 and 0.0 are one number.
        return self._minimum.item() + 0.0, self._maximum.item() + 0.0


class _GradientSinks:
    """Where a spec's gradient goes: straight into outputs of the result's shape, summed into broadcast ones."""

    def __init__(self, plan: JobPlan, outputs: dict[Role, Tensor], device: torch.device) -> None:
        self._plan = plan
        self._direct: list[tuple[Role, Tensor]] = []
        self._summed: list[tuple[Role, Tensor, tuple[int, ...]]] = []
        for role, tensor in ((Role.INPUT_GRADIENT, plan.input), (Role.TARGET_GRADIENT, plan.target)):
            if role not in outputs:
                continue
            if tensor.element_count == plan.element_count:
                self._direct.append((role, outputs[role]))
            else:
                self._summed.append((role, outputs[role], tensor.shape))
        self._wide = torch.empty(plan.element_count if self._summed else 0, dtype=torch.float64, device=device)

    def write(self, start: int, stop: int, gradient: Tensor) -> None:
        """Take the input's gradient of those elements."""
        if self._summed:
            self._wide[start:stop] = gradient
        for role, output in self._direct:
            round_into(output[start:stop], gradient if role == Role.INPUT_GRADIENT else -gradient)

    def finish(self) -> None:
        """Sum the gradients of broadcast operands back to their shapes."""
        for role, output, shape in self._summed:
            total = sum_to_shape(self._wide.view(self._plan.result_shape), shape)
            round_into(output, total if role == Role.INPUT_GRADIENT else -total)
