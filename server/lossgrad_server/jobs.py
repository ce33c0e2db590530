"""What is to be computed, as plain values: `JobPlan` is a checked request without its tensors' bytes.

A plan packs into a short header of fixed-size records and back, so that a worker may live in another process: what
crosses to it is this header and raw bytes (work.py). Nothing here knows gRPC, protobuf or torch. Who makes plans, and
checks everything that they promise: transport/checks.py.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Final

MAX_SPECS: Final = 16
MAX_RANK: Final = 16


class DataType(IntEnum):
    """The type of a tensor's elements. The numbers are those of lossgrad_api.v1.DataType."""

    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT32 = 3
    FLOAT64 = 4
    INT64 = 5
    INT32 = 6
    INT16 = 7
    INT8 = 8
    UINT8 = 9
    BOOL = 10

    @property
    def itemsize(self) -> int:
        """The size of one element in bytes."""
        return _ITEMSIZE[self]

    @property
    def is_floating_point(self) -> bool:
        """Whether losses and gradients can have this type."""
        return self <= DataType.FLOAT64


_ITEMSIZE: Final[dict[int, int]] = {1: 2, 2: 2, 3: 4, 4: 8, 5: 8, 6: 4, 7: 2, 8: 1, 9: 1, 10: 1}


class LossKind(IntEnum):
    """The loss function. The numbers are those of the fields of lossgrad_api.v1.LossSpec.function."""

    SMOOTH_L1 = 1
    HUBER = 2
    L1 = 3
    MSE = 4


class Reduction(IntEnum):
    """How the elements' losses become the answer. The numbers are those of lossgrad_api.v1.Reduction."""

    NONE = 1
    MEAN = 2
    SUM = 3
    SAMPLE_MEAN = 4
    SAMPLE_SUM = 5

    @property
    def is_scalar(self) -> bool:
        """Whether the answer is one number, which travels as a double; otherwise it is a tensor."""
        return self in (Reduction.MEAN, Reduction.SUM)

    @property
    def is_mean(self) -> bool:
        """Whether the answer is divided: by the sum of weights, or by the spec's denominator."""
        return self in (Reduction.MEAN, Reduction.SAMPLE_MEAN)

    @property
    def is_per_sample(self) -> bool:
        """Whether the answer has one number for each index of the first dimension."""
        return self in (Reduction.SAMPLE_MEAN, Reduction.SAMPLE_SUM)


class Role(IntEnum):
    """What an output tensor is. The numbers are those of its field in lossgrad_api.v1.LossResult."""

    LOSS = 2
    TARGET_GRADIENT = 6
    INPUT_GRADIENT = 7


@dataclass(frozen=True, slots=True)
class SpecPlan:
    """One loss to compute. `parameter` is smooth_l1's beta (at least 0), huber's delta (above 0), otherwise 0."""

    kind: LossKind
    parameter: float
    reduction: Reduction
    include_gradient: bool = False
    denominator: float | None = None
    gradient_scale: float = 1.0
    include_total: bool = (
        False  # whether the answer has its total; the worker is asked by JobPlan.wants_totals, for all
    )


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor's data type and shape."""

    data_type: DataType
    shape: tuple[int, ...]

    @property
    def element_count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """How many bytes its elements take."""
        return math.prod(self.shape) * self.data_type.itemsize


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """A tensor of the answer: for which spec (by index), what it is, its type and shape."""

    spec_index: int
    role: Role
    tensor: TensorPlan


@dataclass(frozen=True)
class JobPlan:
    """A checked request without its tensors' bytes.

    Promised by whoever makes one: 1 to MAX_SPECS specs; at most MAX_RANK dimensions; input and target broadcast to
    `result_shape`, weight (floating point) and mask (bool) to it without extending it; at least one of input and target
    is floating point, and input is if a spec includes the gradient; per-sample reductions come with at least one
    dimension; a denominator only with a mean. `wants_totals` asks for a SPEC_TOTAL record of each spec beside its answer
    (work.py), and comes with mean, sum and none only.
    """

    specs: tuple[SpecPlan, ...]
    input: TensorPlan
    target: TensorPlan
    weight: TensorPlan | None = None
    mask: TensorPlan | None = None
    wants_totals: bool = False

    @cached_property
    def result_shape(self) -> tuple[int, ...]:
        """The shape that input and target broadcast to."""
        return broadcast_shapes(self.input.shape, self.target.shape)

    @cached_property
    def result_type(self) -> DataType:
        """The floating-point type that input and target promote to; losses that are tensors have it."""
        return promote_types(self.input.data_type, self.target.data_type)

    @cached_property
    def element_count(self) -> int:
        """How many elements the result has, masked ones included."""
        return math.prod(self.result_shape)

    @cached_property
    def operands(self) -> tuple[TensorPlan, ...]:
        """The tensors whose bytes come with the job, in the order in which they come: input, target, weight, mask."""
        return tuple(tensor for tensor in (self.input, self.target, self.weight, self.mask) if tensor is not None)

    @cached_property
    def sends_target_gradient(self) -> bool:
        """Whether the target's gradient is part of the answer where a gradient is included.

        It is not where it can be had as -input_gradient: with equal shapes, and input in the type computed in.
        """
        return self.target.data_type.is_floating_point and (
            self.input.shape != self.target.shape or self.input.data_type != self.result_type
        )

    @cached_property
    def kind(self) -> LossKind | None:
        """The loss function that all specs name; None where they name several."""
        kinds = {spec.kind for spec in self.specs}
        return kinds.pop() if len(kinds) == 1 else None

    @cached_property
    def includes_gradient(self) -> bool:
        """Whether any spec asks for the gradient."""
        return any(spec.include_gradient for spec in self.specs)

    @cached_property
    def outputs(self) -> tuple[OutputPlan, ...]:
        """The answer's tensors, in the order in which their bytes come back: by spec, and by role within a spec."""
        outputs: list[OutputPlan] = []
        for index, spec in enumerate(self.specs):
            if not spec.reduction.is_scalar:
                shape = self.result_shape[:1] if spec.reduction.is_per_sample else self.result_shape
                outputs.append(OutputPlan(index, Role.LOSS, TensorPlan(self.result_type, shape)))
            if spec.include_gradient:
                if self.sends_target_gradient:
                    outputs.append(OutputPlan(index, Role.TARGET_GRADIENT, self.target))
                outputs.append(OutputPlan(index, Role.INPUT_GRADIENT, self.input))
        return tuple(outputs)

    @cached_property
    def input_byte_count(self) -> int:
        """The bytes of tensor data that come with the job."""
        return sum(tensor.byte_count for tensor in self.operands)

    @cached_property
    def output_byte_count(self) -> int:
        """The bytes of tensor data that its answer has."""
        return sum(output.tensor.byte_count for output in self.outputs)

    @cached_property
    def header(self) -> bytes:
        """The plan packed: a fixed-size record, one for each spec, one for each tensor. `unpack_header` reads it."""
        has_weight, has_mask = self.weight is not None, self.mask is not None
        parts = [_HEADER.pack(_VERSION, len(self.specs), has_weight, has_mask, self.wants_totals)]
        for spec in self.specs:
            denominator = math.nan if spec.denominator is None else spec.denominator
            parts.append(
                _SPEC.pack(
                    spec.kind,
                    spec.reduction,
                    spec.include_gradient,
                    spec.include_total,
                    spec.parameter,
                    denominator,
                    spec.gradient_scale,
                )
            )
        for tensor in self.operands:
            dimensions = tensor.shape + (0,) * (MAX_RANK - len(tensor.shape))
            parts.append(_TENSOR.pack(tensor.data_type, len(tensor.shape), *dimensions))
        return b"".join(parts)


_VERSION: Final = 2
_HEADER: Final = struct.Struct("<BB???3x")  # version, spec count, has weight, has mask, wants totals
# kind, reduction, include_gradient, include_total, parameter, denominator (NaN: none), scale
_SPEC: Final = struct.Struct("<BB??4xddd")
_TENSOR: Final = struct.Struct(f"<BB6x{MAX_RANK}q")  # data type, rank, shape


@lru_cache(maxsize=4096)
def unpack_header(header: bytes) -> JobPlan:
    """Return the plan that `JobPlan.header` packed. Cached, because callers repeat themselves."""
    version, spec_count, has_weight, has_mask, wants_totals = _HEADER.unpack_from(header, 0)
    if version != _VERSION:
        raise ValueError(f"job header has version {version}, this worker reads {_VERSION}; restart both sides")
    offset = _HEADER.size
    specs: list[SpecPlan] = []
    for _ in range(spec_count):
        kind, reduction, include_gradient, include_total, parameter, denominator, scale = _SPEC.unpack_from(
            header, offset
        )
        offset += _SPEC.size
        specs.append(
            SpecPlan(
                kind=LossKind(kind),
                parameter=parameter,
                reduction=Reduction(reduction),
                include_gradient=include_gradient,
                denominator=None if math.isnan(denominator) else denominator,
                gradient_scale=scale,
                include_total=include_total,
            )
        )
    tensors: list[TensorPlan] = []
    for _ in range(2 + has_weight + has_mask):
        data_type, rank, *dimensions = _TENSOR.unpack_from(header, offset)
        offset += _TENSOR.size
        tensors.append(TensorPlan(DataType(data_type), tuple(dimensions[:rank])))
    return JobPlan(
        specs=tuple(specs),
        input=tensors[0],
        target=tensors[1],
        weight=tensors[2] if has_weight else None,
        mask=tensors[-1] if has_mask else None,
        wants_totals=wants_totals,
    )


def broadcast_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that both broadcast to, as torch.broadcast_shapes does. ValueError if there is none."""
    if first == second:
        return first
    rank = max(len(first), len(second))
    shape: list[int] = []
    for a, b in zip((1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True):
        if a != b and a != 1 and b != 1:
            raise ValueError(f"shapes {list(first)} and {list(second)} do not broadcast")
        shape.append(b if a == 1 else a)
    return tuple(shape)


def promote_types(first: DataType, second: DataType) -> DataType:
    """Return the type that torch.promote_types gives, for a pair of which at least one is floating point."""
    if first == second:
        return first
    if not first.is_floating_point:
        return second
    if not second.is_floating_point:
        return first
    # The numbers of the floating-point types ascend with their range, save float16 and bfloat16, which meet in float32.
    return max(first, second, DataType.FLOAT32)
