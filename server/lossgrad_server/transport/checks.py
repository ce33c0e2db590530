"""Checks a ComputeLossRequest and makes its JobPlan. All that a JobPlan promises is established here, before the queue.

The device runs a batch whole, so a bad request must be refused before it joins one. Every refusal gives both values,
says what to change, and names the field. Plans are remembered: callers send the same kind of request again and again,
and one that differs from a checked one in its elements' values only needs no check at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from lossgrad_server.errors import InvalidRequest, Reason, RequestError, TooLarge
from lossgrad_server.jobs import (
    MAX_RANK,
    MAX_SPECS,
    DataType,
    JobPlan,
    LossKind,
    Reduction,
    SpecPlan,
    TensorPlan,
    broadcast_shapes,
)
from lossgrad_server.transport.shared_tensors import (
    KnownSharedRequests,
    SharedMemoryParts,
    destinations,
    is_shared,
    with_shared_operands,
)
from lossgrad_server.work import WorkItem

MAX_IDEMPOTENCY_KEY_BYTES: Final = 128

# What a response holds beside its tensors' data, at most: a kilobyte for each spec.
_RESPONSE_OVERHEAD_BYTES: Final = 1024

_KINDS: Final = {
    "smooth_l1": LossKind.SMOOTH_L1,
    "huber": LossKind.HUBER,
    "l1": LossKind.L1,
    "mse": LossKind.MSE,
}
_MASKS: Final = frozenset((DataType.BOOL,))
_OPERANDS: Final = frozenset(DataType)
_WEIGHTS: Final = frozenset(data_type for data_type in DataType if data_type.is_floating_point)


class RequestChecker:
    """Turns the bytes of a ComputeLossRequest into a plan and the views of its tensors. Used by one thread."""

    def __init__(self, max_message_bytes: int, memory: SharedMemoryParts | None = None) -> None:
        """`memory` is what the server shares with its callers, if it shares any."""
        self._max_message_bytes = max_message_bytes
        self._memory = memory
        self._known: codec.KnownRequests[JobPlan] = codec.KnownRequests()
        self._known_shared = None if memory is None else KnownSharedRequests(memory)

    def check(self, data: bytes, start: int = 0, end: int | None = None) -> tuple[JobPlan, WorkItem, str]:
        """Return the plan of `data[start:end]`, what the worker needs, and the idempotency key. Raises RequestError."""
        end = len(data) if end is None else end
        known = self._known.find(data, start, end)
        if known is not None:
            plan, operands = known
            return plan, WorkItem(plan.header, operands), ""
        if self._known_shared is not None and (found := self._known_shared.find(data, start, end)) is not None:
            return *found, ""
        try:
            view = codec.split_compute_request(data, start, end)
            request = codec.parse_request_header(data, start, end)
        except codec.CodecError as error:
            raise malformed(error) from None
        # Before all else, because errors echo the key.
        if (key_length := len(view.idempotency_key.encode())) > MAX_IDEMPOTENCY_KEY_BYTES:
            raise InvalidRequest(
                f"idempotency_key has {key_length} bytes, at most {MAX_IDEMPOTENCY_KEY_BYTES} are taken; send a shorter one",
                reason=Reason.BAD_PARAMETER,
                field="idempotency_key",
            )
        places: tuple[memoryview, ...] = ()
        shares = is_shared(request)
        try:
            if shares:
                view = with_shared_operands(request, view, self._memory)
            plan = self._plan(request, view)
            if shares:
                places = destinations(request, plan, self._memory)
        except RequestError as error:
            error.request_id = view.idempotency_key
            raise
        if all(tensor.byte_count for tensor in plan.operands):  # an empty one has no view to find
            if not shares:
                self._known.remember(data, start, end, plan)
            elif self._known_shared is not None:
                self._known_shared.remember(data, start, end, plan)
        views = [view.input, view.target]
        if plan.weight is not None:
            views.append(view.weight)
        if plan.mask is not None:
            views.append(view.mask)
        return plan, WorkItem(plan.header, tuple(views), places), view.idempotency_key

    def _plan(self, request: pb.ComputeLossRequest, view: codec.RequestView) -> JobPlan:
        specs = check_specs(request.specs)
        wants_totals = any(spec.include_total for spec in specs)
        plan = plan_of(specs, request, view, allow_broadcast=request.allow_broadcast, wants_totals=wants_totals)
        check_size(plan, self._max_message_bytes, has_place=request.HasField("outputs"))
        return plan


def plan_of(
    specs: tuple[SpecPlan, ...],
    request: pb.ComputeLossRequest | pb.Slice,
    view: codec.RequestView,
    *,
    allow_broadcast: bool,
    wants_totals: bool = False,
) -> JobPlan:
    """Return the plan of checked specs over a request's tensors, of which `view` has the data. Raises RequestError."""
    if not request.HasField("input") or not request.HasField("target"):
        name = "target" if request.HasField("input") else "input"
        raise InvalidRequest(
            f"the request has no {name}; send input and target", reason=Reason.MISSING_FIELD, field=name
        )
    input = _check_tensor("input", request.input, view.input, _OPERANDS)
    target = _check_tensor("target", request.target, view.target, _OPERANDS)
    shape = _check_shapes(input, target, allow_broadcast)
    if 0 in shape:
        _check_extents("the result", shape, "target.shape")
    if not (input.data_type.is_floating_point or target.data_type.is_floating_point):
        raise InvalidRequest(
            f"input is {_name(input.data_type)} and target is {_name(target.data_type)}; "
            "send at least one of them as float16, bfloat16, float32 or float64",
            reason=Reason.UNSUPPORTED_DATA_TYPE,
            field="input.data_type",
        )
    weight = mask = None
    if request.HasField("weight"):
        weight = _check_tensor("weight", request.weight, view.weight, _WEIGHTS)
        _check_beside("weight", weight.shape, shape, allow_broadcast)
    if request.HasField("mask"):
        mask = _check_tensor("mask", request.mask, view.mask, _MASKS)
        _check_beside("mask", mask.shape, shape, allow_broadcast)
    for index, spec in enumerate(specs):
        _check_spec_fits(index, spec, input, shape)
    return JobPlan(specs, input, target, weight, mask, wants_totals)


def check_size(plan: JobPlan, max_message_bytes: int, *, has_place: bool = False) -> None:
    """Check that result and answer fit a message. `has_place`: the answer's tensors go elsewhere. Raises TooLarge."""
    # A broadcast can ask for far more than was sent: two vectors of a million make 10^12 elements. What is in shared memory
    # may be larger than a message, and then its result may be as large.
    result_bytes = plan.element_count * plan.result_type.itemsize
    answer_bytes = _RESPONSE_OVERHEAD_BYTES * len(plan.specs) + (0 if has_place else plan.output_byte_count)
    if result_bytes > max(max_message_bytes, *(tensor.byte_count for tensor in plan.operands)):
        raise TooLarge(
            f"the tensors broadcast to {list(plan.result_shape)}, {result_bytes} bytes; at most "
            f"{max_message_bytes} are taken; send fewer rows at a time",
            reason=Reason.RESULT_TOO_LARGE,
        )
    if answer_bytes > max_message_bytes:
        raise TooLarge(
            f"the answer would have {answer_bytes} bytes, at most {max_message_bytes} fit a message; ask for "
            "fewer gradients or unreduced losses in one request, or send fewer rows at a time",
            reason=Reason.RESULT_TOO_LARGE,
        )


def malformed(error: codec.CodecError) -> InvalidRequest:
    """Return what a caller is told whose bytes are not the message that they should be."""
    if isinstance(error, codec.HeaderTooLarge):
        return InvalidRequest(str(error), reason=Reason.HEADER_TOO_LARGE)
    if isinstance(error, codec.TooManyRequests):
        return InvalidRequest(str(error), reason=Reason.TOO_MANY_REQUESTS_IN_MESSAGE, field="requests")
    return InvalidRequest(
        f"the message cannot be read: {error}; send what the .proto of lossgrad_api.v1 describes",
        reason=Reason.MALFORMED_MESSAGE,
    )


def check_specs(specs: Sequence[pb.LossSpec]) -> tuple[SpecPlan, ...]:
    """Return a request's specs as plans. Raises RequestError."""
    if not 1 <= len(specs) <= MAX_SPECS:
        raise InvalidRequest(
            f"the request has {len(specs)} specs; send 1 to {MAX_SPECS}",
            reason=Reason.SPEC_COUNT,
            field="specs",
        )
    return tuple(_check_spec(f"specs[{index}]", spec) for index, spec in enumerate(specs))


def _check_spec(path: str, spec: pb.LossSpec) -> SpecPlan:
    function = spec.WhichOneof("function")
    if function is None:
        raise InvalidRequest(
            f"{path} names no loss; set one of smooth_l1, huber, l1, mse",
            reason=Reason.UNKNOWN_LOSS,
            field=f"{path}.function",
        )
    parameter = 0.0
    if function == "smooth_l1":
        parameter = spec.smooth_l1.beta if spec.smooth_l1.HasField("beta") else 1.0
        if not parameter >= 0:  # also refuses NaN
            raise _bad_parameter(f"{path}.smooth_l1.beta", parameter, "at least 0")
    elif function == "huber":
        parameter = spec.huber.delta if spec.huber.HasField("delta") else 1.0
        if not parameter > 0:
            raise _bad_parameter(f"{path}.huber.delta", parameter, "above 0")
    reduction = _check_reduction(f"{path}.reduction", spec.reduction)
    denominator = spec.denominator if spec.HasField("denominator") else None
    if denominator is not None:
        if not reduction.is_mean:
            raise InvalidRequest(
                f"{path}.denominator is {denominator!r}, but its reduction is {reduction.name.lower()}, which divides "
                "by nothing; leave it out, or ask for mean or sample_mean",
                reason=Reason.BAD_PARAMETER,
                field=f"{path}.denominator",
            )
        if not (denominator > 0 and math.isfinite(denominator)):
            raise _bad_parameter(f"{path}.denominator", denominator, "finite and above 0")
    gradient_scale = spec.gradient_scale if spec.HasField("gradient_scale") else 1.0
    if not math.isfinite(gradient_scale):
        raise _bad_parameter(f"{path}.gradient_scale", gradient_scale, "finite")
    if spec.include_total and reduction.is_per_sample:
        raise InvalidRequest(
            f"{path}.include_total is set, but its reduction is {reduction.name.lower()}, which has no total; leave it "
            "out, or ask for none, mean or sum",
            reason=Reason.BAD_PARAMETER,
            field=f"{path}.include_total",
        )
    return SpecPlan(
        _KINDS[function],
        parameter,
        reduction,
        spec.include_gradient,
        denominator,
        gradient_scale,
        spec.include_total,
    )


def _check_reduction(path: str, number: int) -> Reduction:
    if number == pb.REDUCTION_UNSPECIFIED:
        return Reduction.MEAN
    try:
        return Reduction(number)
    except ValueError:
        known = ", ".join(f"{reduction.value} ({reduction.name.lower()})" for reduction in Reduction)
        raise InvalidRequest(
            f"{path} is {number}; send one of {known}", reason=Reason.UNKNOWN_REDUCTION, field=path
        ) from None


def _check_tensor(name: str, tensor: tensor_pb2.Tensor, data: memoryview, accepted: frozenset[DataType]) -> TensorPlan:
    try:
        data_type = DataType(tensor.data_type)
    except ValueError:
        raise InvalidRequest(
            f"{name}.data_type is {tensor.data_type}; send one of {_names(accepted)}",
            reason=Reason.UNKNOWN_DATA_TYPE,
            field=f"{name}.data_type",
        ) from None
    if data_type not in accepted:
        raise InvalidRequest(
            f"{name} is {_name(data_type)}; send it as {_names(accepted)}",
            reason=Reason.UNSUPPORTED_DATA_TYPE,
            field=f"{name}.data_type",
        )
    shape = tuple(tensor.shape)
    if len(shape) > MAX_RANK:
        raise InvalidRequest(
            f"{name} has {len(shape)} dimensions, at most {MAX_RANK} are taken; reshape it",
            reason=Reason.BAD_SHAPE,
            field=f"{name}.shape",
        )
    plan = TensorPlan(data_type, shape)
    if plan.byte_count != len(data):
        raise InvalidRequest(
            f"{name}.data has {len(data)} bytes; shape {list(shape)} of {_name(data_type)} needs {plan.byte_count}; "
            "send the elements row-major, little-endian and unpadded",
            reason=Reason.DATA_LENGTH_MISMATCH,
            field=f"{name}.data",
        )
    _check_extents(name, shape, f"{name}.shape")
    return plan


def _check_extents(name: str, shape: tuple[int, ...], field: str) -> None:
    """Check that no arithmetic over a shape overflows 64 bits. Only an empty tensor gets here with such extents."""
    if math.prod(max(extent, 1) for extent in shape) >= 1 << 48:
        raise InvalidRequest(
            f"{name} is empty but has shape {list(shape)}, whose other dimensions are too large; send a smaller shape",
            reason=Reason.BAD_SHAPE,
            field=field,
        )


def _check_shapes(input: TensorPlan, target: TensorPlan, allow_broadcast: bool) -> tuple[int, ...]:
    if input.shape == target.shape:
        return input.shape
    if not allow_broadcast:
        raise InvalidRequest(
            f"target has shape {list(target.shape)}, input {list(input.shape)}; send equal shapes, or set "
            "allow_broadcast if broadcasting is meant",
            reason=Reason.SHAPE_MISMATCH,
            field="target.shape",
        )
    try:
        return broadcast_shapes(input.shape, target.shape)
    except ValueError:
        raise InvalidRequest(
            f"target has shape {list(target.shape)}, input {list(input.shape)}, which do not broadcast; dimensions, "
            "counted from the last, must be equal or 1",
            reason=Reason.SHAPE_MISMATCH,
            field="target.shape",
        ) from None


def _check_beside(name: str, shape: tuple[int, ...], result: tuple[int, ...], allow_broadcast: bool) -> None:
    """Check the shape of a weight or mask against the result's."""
    if shape == result:
        return
    fits = False
    if allow_broadcast:
        try:
            fits = broadcast_shapes(shape, result) == result
        except ValueError:
            fits = False
    if not fits:
        hint = "one that broadcasts to it" if allow_broadcast else "set allow_broadcast if broadcasting is meant"
        raise InvalidRequest(
            f"{name} has shape {list(shape)}, the result {list(result)}; send the result's shape, or {hint}",
            reason=Reason.SHAPE_MISMATCH,
            field=f"{name}.shape",
        )


def _check_spec_fits(index: int, spec: SpecPlan, input: TensorPlan, shape: tuple[int, ...]) -> None:
    if spec.include_gradient and not input.data_type.is_floating_point:
        raise InvalidRequest(
            f"specs[{index}] includes the gradient, but input is {_name(input.data_type)}, which has none; send input "
            "as a floating-point tensor",
            reason=Reason.UNSUPPORTED_DATA_TYPE,
            field="input.data_type",
        )
    if spec.reduction.is_per_sample and not shape:
        raise InvalidRequest(
            f"specs[{index}].reduction is {spec.reduction.name.lower()}, but the result has shape []; send at least "
            "one dimension, the first counts the samples",
            reason=Reason.BAD_SHAPE,
            field=f"specs[{index}].reduction",
        )


def _bad_parameter(path: str, value: float, allowed: str) -> RequestError:
    return InvalidRequest(f"{path} is {value!r}; it must be {allowed}", reason=Reason.BAD_PARAMETER, field=path)


def _name(data_type: DataType) -> str:
    return data_type.name.lower()


def _names(data_types: frozenset[DataType]) -> str:
    return ", ".join(_name(data_type) for data_type in sorted(data_types))
