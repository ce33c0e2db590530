"""Checks a ModelInferRequest and makes its plan: the job, where its tensors are, and how its answer looks.

Everything that a JobPlan promises is established here, before the queue, and every refusal names the tensor, gives both
values and says what to change. A plan depends on nothing but the request's header, so it serves every request with an
equal one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lossgrad_server.errors import InvalidRequest, Reason, TooLarge
from lossgrad_server.jobs import MAX_RANK, DataType, JobPlan, Reduction, Role, SpecPlan, TensorPlan
from lossgrad_server.transport.open_inference import parameters as parameters_of
from lossgrad_server.transport.open_inference.codec import ResponseForm, response_form
from lossgrad_server.transport.open_inference.models import (
    COUNT,
    DATA_TYPE_NAMES,
    DATA_TYPES,
    GRAD,
    INPUT,
    LOSS,
    MASK,
    TARGET,
    UNUSED_DATA_TYPES,
    VERSION,
    WEIGHT,
    Model,
)

# What a response holds beside its tensors' data, at most, the echoed id left out.
_RESPONSE_OVERHEAD_BYTES: Final = 2048
_FLOATS: Final = tuple(name for name, data_type in DATA_TYPES.items() if data_type.is_floating_point)


@dataclass(frozen=True, slots=True)
class RegionPlace:
    """A tensor's place in a region of shared memory."""

    region: str
    offset: int
    byte_size: int

    def overlaps(self, other: RegionPlace) -> bool:
        """Return whether both share bytes, as far as their names tell."""
        return (
            self.region == other.region
            and self.offset < other.offset + other.byte_size
            and other.offset < self.offset + self.byte_size
        )


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """One output of the answer. `tensor` is what it holds; `job_output` the index among JobPlan.outputs that gives it.

    `job_output` is None for COUNT, and for a LOSS that is one number.
    """

    name: str
    tensor: TensorPlan
    job_output: int | None
    place: RegionPlace | None


@dataclass(frozen=True, slots=True)
class InputPlan:
    """One operand of the job: its place in shared memory, or the index of its entry among the raw contents, or neither
    where it came as typed contents of the input number `index`.
    """

    name: str
    tensor: TensorPlan
    index: int
    raw_index: int | None
    place: RegionPlace | None


@dataclass(frozen=True, slots=True)
class InferPlan:
    """A checked request without its tensors' bytes."""

    model: Model
    job: JobPlan
    inputs: tuple[InputPlan, ...]  # in the order of JobPlan.operands
    outputs: tuple[OutputPlan, ...]  # in the order of the answer
    form: ResponseForm
    timeout_seconds: float | None
    is_bulk: bool
    wants_final_flag: bool

    @property
    def row_count(self) -> int:
        """How many rows the request has: what the protocol calls its batch size."""
        return self.job.input.shape[0] if self.job.input.shape else 1

    @property
    def uses_regions(self) -> bool:
        """Whether any tensor is in shared memory."""
        return any(one.place is not None for one in self.inputs) or any(one.place is not None for one in self.outputs)

    @property
    def counts_rows(self) -> bool:
        """Whether COUNT says for each row how many of its elements the mask lets take part."""
        per_row = self.job.specs[0].reduction.is_per_sample and self.job.mask is not None
        return per_row and any(output.name == COUNT for output in self.outputs)


def make_plan(model: Model, request: Any, raw_count: int, typed: Mapping[int, object], max_bytes: int) -> InferPlan:
    """Return the plan of a ModelInferRequest. Raises RequestError.

    `raw_count` is how many raw_input_contents came with it, `typed` has the indices of the inputs with packed contents.
    """
    spec = parameters_of.loss_spec(model, request.parameters)
    inputs = _inputs(model, request.inputs, raw_count, typed)
    tensors = {name: plan.tensor for name, plan in inputs.items()}
    _check_tensors(tensors, spec)
    job = JobPlan((spec,), tensors[INPUT], tensors[TARGET], tensors.get(WEIGHT), tensors.get(MASK))
    outputs = _outputs(model, request.outputs, job)
    _check_size(outputs, max_bytes)
    return InferPlan(
        model,
        job,
        tuple(inputs[name] for name in (INPUT, TARGET, WEIGHT, MASK) if name in inputs),
        outputs,
        response_form(
            model.name,
            VERSION,
            [(one.name, DATA_TYPE_NAMES[one.tensor.data_type], one.tensor.shape) for one in outputs],
            [0 if one.place else one.tensor.byte_count for one in outputs],
        ),
        parameters_of.timeout_seconds(request.parameters),
        parameters_of.is_bulk(request.parameters),
        parameters_of.wants_final_flag(request.parameters),
    )


def _inputs(model: Model, inputs: Sequence[Any], raw_count: int, typed: Mapping[int, object]) -> dict[str, InputPlan]:
    plans: dict[str, InputPlan] = {}
    in_message = 0  # inputs so far that are not in shared memory: the protocol gives a raw entry to those only
    for index, tensor in enumerate(inputs):
        name = tensor.name
        if name not in model.input_names:
            sibling = model.with_input(name)
            hint = "" if sibling is None else f", and {sibling.name} takes {name}"
            raise InvalidRequest(
                f"model {model.name} has no input {name[:128]!r}; it takes {', '.join(model.input_names)}{hint}",
                reason=Reason.UNKNOWN_TENSOR,
                field=f"inputs[{index}].name",
            )
        if name in plans:
            raise InvalidRequest(
                f"input {name} comes twice; send it once", reason=Reason.UNKNOWN_TENSOR, field=f"inputs[{index}].name"
            )
        place = _place(f"input {name}", f"inputs[{index}]", tensor.parameters)
        has_contents = index in typed or tensor.contents.ByteSize() > 0
        if has_contents and (raw_count or place is not None):
            other = "in shared memory" if place is not None else "beside raw_input_contents"
            raise InvalidRequest(
                f"input {name} has typed contents {other}; send its elements in one way",
                reason=Reason.DATA_LENGTH_MISMATCH,
                field=f"inputs[{index}].contents",
            )
        plan = _tensor(name, f"inputs[{index}]", tensor.datatype, tuple(tensor.shape))
        if place is not None and place.byte_size != plan.byte_count:
            raise length_mismatch(name, plan, place.byte_size, "its place in shared memory has")
        raw_index = in_message if raw_count and place is None else None
        in_message += place is None
        plans[name] = InputPlan(name, plan, index, raw_index, place)
    for tensor in model.inputs:
        if tensor.name not in plans and not tensor.is_optional:
            raise InvalidRequest(
                f"the request has no input {tensor.name}; model {model.name} takes {', '.join(model.input_names)}",
                reason=Reason.MISSING_FIELD,
                field="inputs",
            )
    if raw_count not in (0, in_message):
        raise InvalidRequest(
            f"the request has {raw_count} raw_input_contents and {in_message} inputs that are not in shared memory; send "
            "one for each, in the same order",
            reason=Reason.DATA_LENGTH_MISMATCH,
            field="raw_input_contents",
        )
    return plans


def length_mismatch(name: str, plan: TensorPlan, got: int, what: str = "it came with") -> InvalidRequest:
    """Return what a caller is told whose tensor has not the bytes that its shape and type make."""
    return InvalidRequest(
        f"input {name}: {what} {got} bytes; shape {list(plan.shape)} of {DATA_TYPE_NAMES[plan.data_type]} needs "
        f"{plan.byte_count}; send the elements row-major, little-endian and unpadded",
        reason=Reason.DATA_LENGTH_MISMATCH,
        field=name,
    )


def _tensor(name: str, path: str, data_type_name: str, shape: tuple[int, ...]) -> TensorPlan:
    data_type = DATA_TYPES.get(data_type_name)
    allowed: Sequence[str] = tuple(DATA_TYPES)
    if name == WEIGHT:
        allowed = _FLOATS
    elif name == MASK:
        allowed = ("BOOL",)
    if data_type is None or data_type_name not in allowed:
        is_known = data_type is not None or data_type_name in UNUSED_DATA_TYPES
        raise InvalidRequest(
            f"input {name} has datatype {data_type_name[:64]!r}; send it as {', '.join(allowed)}",
            reason=Reason.UNSUPPORTED_DATA_TYPE if is_known else Reason.UNKNOWN_DATA_TYPE,
            field=f"{path}.datatype",
        )
    if len(shape) > MAX_RANK:
        raise InvalidRequest(
            f"input {name} has {len(shape)} dimensions, at most {MAX_RANK} are taken; reshape it",
            reason=Reason.BAD_SHAPE,
            field=f"{path}.shape",
        )
    # The second bound is for empty tensors, whose other extents nothing else bounds: no arithmetic may overflow 64 bits.
    if any(extent < 0 for extent in shape) or math.prod(max(extent, 1) for extent in shape) >= 1 << 48:
        raise InvalidRequest(
            f"input {name} has shape {list(shape)}; extents must be at least 0, and not as large as that",
            reason=Reason.BAD_SHAPE,
            field=f"{path}.shape",
        )
    return TensorPlan(data_type, shape)


def _one_a_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor with one element for each row."""
    return shape[:1] + (1,) * (len(shape) - 1)


def _check_tensors(tensors: Mapping[str, TensorPlan], spec: SpecPlan) -> None:
    input, target = tensors[INPUT], tensors[TARGET]
    for name, tensor in tensors.items():
        is_beside = name in (WEIGHT, MASK)
        if tensor.shape != input.shape and not (is_beside and tensor.shape == _one_a_row(input.shape)):
            hint = f", or one element a row, {list(_one_a_row(input.shape))}" if is_beside and input.shape else ""
            raise InvalidRequest(
                f"{name} has shape {list(tensor.shape)}, INPUT {list(input.shape)}; send equal shapes{hint}",
                reason=Reason.SHAPE_MISMATCH,
                field=name,
            )
    if not (input.data_type.is_floating_point or target.data_type.is_floating_point):
        raise InvalidRequest(
            f"INPUT is {DATA_TYPE_NAMES[input.data_type]} and TARGET is {DATA_TYPE_NAMES[target.data_type]}; send at "
            f"least one of them as {', '.join(_FLOATS)}",
            reason=Reason.UNSUPPORTED_DATA_TYPE,
            field=INPUT,
        )
    if spec.include_gradient and not input.data_type.is_floating_point:
        raise InvalidRequest(
            f"INPUT is {DATA_TYPE_NAMES[input.data_type]}, which has no gradient; send it as {', '.join(_FLOATS)}",
            reason=Reason.UNSUPPORTED_DATA_TYPE,
            field=INPUT,
        )
    if spec.reduction.is_per_sample and not input.shape:
        raise InvalidRequest(
            "INPUT has shape [], which has no rows; send at least one dimension, or parameter reduction as mean, sum or "
            "none",
            reason=Reason.BAD_SHAPE,
            field=INPUT,
        )


def _outputs(model: Model, requested: Sequence[Any], job: JobPlan) -> tuple[OutputPlan, ...]:
    places: dict[str, RegionPlace | None] = {}
    for index, output in enumerate(requested):
        name = output.name
        if name not in model.output_names:
            sibling = model.with_output(name)
            hint = "" if sibling is None else f", and {sibling.name} gives {name}"
            raise InvalidRequest(
                f"model {model.name} has no output {name[:128]!r}; it gives {', '.join(model.output_names)}{hint}",
                reason=Reason.UNKNOWN_TENSOR,
                field=f"outputs[{index}].name",
            )
        if name in places:
            raise InvalidRequest(
                f"output {name} is asked for twice; ask once",
                reason=Reason.UNKNOWN_TENSOR,
                field=f"outputs[{index}].name",
            )
        parameters_of.refuse_classification(name, output.parameters)
        places[name] = _place(f"output {name}", f"outputs[{index}]", output.parameters)
    if not places:
        places = dict.fromkeys(model.output_names)
    return tuple(_output(name, place, job) for name, place in places.items())


def _output(name: str, place: RegionPlace | None, job: JobPlan) -> OutputPlan:
    role = {LOSS: Role.LOSS, GRAD: Role.INPUT_GRADIENT}.get(name)
    reduction = job.specs[0].reduction
    shape: tuple[int, ...] = (job.result_shape[0], 1) if reduction.is_per_sample else (1,)
    data_type = DataType.INT64 if name == COUNT else job.result_type
    job_output = next((index for index, output in enumerate(job.outputs) if output.role == role), None)
    if name == GRAD:
        shape, data_type = job.input.shape, job.input.data_type
    elif name == LOSS and reduction is Reduction.NONE:
        shape = job.result_shape
    tensor = TensorPlan(data_type, shape)
    if place is not None and place.byte_size < tensor.byte_count:
        raise InvalidRequest(
            f"output {name}: its place in shared memory has {place.byte_size} bytes; shape {list(shape)} of "
            f"{DATA_TYPE_NAMES[data_type]} needs {tensor.byte_count}; give it as many",
            reason=Reason.BAD_REGION,
            field=name,
        )
    return OutputPlan(name, tensor, job_output, place)


def _check_size(outputs: Sequence[OutputPlan], max_bytes: int) -> None:
    size = _RESPONSE_OVERHEAD_BYTES + sum(one.tensor.byte_count for one in outputs if one.place is None)
    if size > max_bytes:
        raise TooLarge(
            f"the answer would have {size} bytes, at most {max_bytes} fit a message; ask for fewer outputs, or send fewer "
            "rows at a time",
            reason=Reason.RESULT_TOO_LARGE,
        )


def _place(what: str, path: str, parameters: Mapping[str, Any]) -> RegionPlace | None:
    if "shared_memory_region" not in parameters:
        return None
    region = parameters["shared_memory_region"]
    if region.WhichOneof("parameter_choice") != "string_param":
        raise InvalidRequest(
            f"{what}: send parameter shared_memory_region as string_param",
            reason=Reason.BAD_REGION,
            field=f"{path}.parameters.shared_memory_region",
        )
    numbers: list[int] = []
    for name, default in (("shared_memory_offset", 0), ("shared_memory_byte_size", -1)):
        choice = parameters[name].WhichOneof("parameter_choice") if name in parameters else None
        number = default
        if choice is not None:
            number = getattr(parameters[name], choice) if choice in ("int64_param", "uint64_param") else -1
        if number < 0:
            raise InvalidRequest(
                f"{what}: parameter {name} is missing or not a number of bytes; send it as int64_param, at least 0",
                reason=Reason.BAD_REGION,
                field=f"{path}.parameters.{name}",
            )
        numbers.append(number)
    return RegionPlace(region.string_param, *numbers)
