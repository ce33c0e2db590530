"""A request's parameters: what they make of the loss, and how long the caller waits.

Clients differ in what types they can send, so a number may come as a double, an integer or a string. Parameters that we
do not know are ignored, as the protocol wants it: clients add their own to every request. Those of a loss are never
ignored, because a loss computed with another beta than was sent would be wrong in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError
from lossgrad_server.jobs import Reduction, SpecPlan
from lossgrad_server.transport.open_inference.models import BULK_PRIORITY, LOSS_PARAMETERS, Model

_REDUCTIONS: Final = {reduction.name.lower(): reduction for reduction in Reduction}
_OURS: Final = frozenset((*LOSS_PARAMETERS.values(), "reduction", "denominator", "gradient_scale"))
_INTEGERS: Final = ("int64_param", "uint64_param")


def loss_spec(model: Model, parameters: Mapping[str, Any]) -> SpecPlan:
    """Return the loss that a request asks for. Its default is one mean for each row. Raises RequestError."""
    for name in parameters:
        # Nobody else's parameter is called so, and ignoring it would compute another loss than was meant.
        if name not in _OURS and (known := name.strip().lower()) in _OURS:
            raise _bad(name[:64], f"there is no parameter {name[:64]!r}; send it as {known}")
    for name in LOSS_PARAMETERS.values():
        if name in parameters and name != model.loss_parameter:
            takes = "no such parameter" if model.loss_parameter is None else f"{model.loss_parameter} instead"
            raise _bad(name, f"parameter {name} does not go with model {model.name}, which has {takes}; leave it out")
    end = 0.0
    if model.loss_parameter is not None:
        end = _number(parameters, model.loss_parameter, 1.0)
        if model.loss_parameter == "beta" and not end >= 0:  # also refuses NaN
            _refuse("beta", end, "at least 0")
        if model.loss_parameter == "delta" and not end > 0:
            _refuse("delta", end, "above 0")
    reduction = _reduction(parameters)
    denominator = _number(parameters, "denominator", None)
    if denominator is not None:
        if not reduction.is_mean:
            raise _bad(
                "denominator",
                f"parameter denominator is {denominator!r}, but reduction {reduction.name.lower()} divides by nothing; "
                "leave it out, or ask for mean or sample_mean",
            )
        if not (denominator > 0 and math.isfinite(denominator)):
            _refuse("denominator", denominator, "finite and above 0")
    scale = _number(parameters, "gradient_scale", 1.0)
    if not math.isfinite(scale):
        _refuse("gradient_scale", scale, "finite")
    return SpecPlan(model.kind, end, reduction, model.has_gradient, denominator, scale)


def timeout_seconds(parameters: Mapping[str, Any]) -> float | None:
    """Return how long the caller waits, from `timeout` in microseconds; None where it does not say. Raises RequestError."""
    microseconds = _integer(parameters, "timeout")
    if microseconds < 0:
        raise InvalidRequest(
            f"parameter timeout is {microseconds}; send 0 for none, or how long you will wait in microseconds",
            reason=Reason.BAD_TIMEOUT,
            field="parameters.timeout",
        )
    return float(microseconds * 1e-6) if microseconds else None


def is_bulk(parameters: Mapping[str, Any]) -> bool:
    """Return whether `priority` lets all others go first. Raises RequestError.

    Of the two priorities 1 is the higher one and the default, which is what any other number means.
    """
    return _integer(parameters, "priority") == BULK_PRIORITY


def refuse_classification(output: str, parameters: Mapping[str, Any]) -> None:
    """Refuse an output's parameter that would change what the output means. Raises RequestError, UNIMPLEMENTED."""
    if "classification" in parameters:
        raise RequestError(
            f"output {output} asks for a classification, which a loss has not; leave the parameter out",
            code=Code.UNIMPLEMENTED,
            reason=Reason.UNIMPLEMENTED,
            field="outputs.parameters.classification",
        )


def wants_final_flag(parameters: Mapping[str, Any]) -> bool:
    """Return whether a stream's answer is to say that it is its request's last."""
    return bool(_value(parameters, "triton_enable_empty_final_response", False))


def _integer(parameters: Mapping[str, Any], name: str) -> int:
    """Return a parameter that is a whole number; 0 where it is not there."""
    choice = _choice(parameters, name)
    if choice is not None and choice not in _INTEGERS:
        raise _bad(name, f"parameter {name} came as {choice}; send it as int64_param or uint64_param")
    return int(_value(parameters, name, 0))


def _reduction(parameters: Mapping[str, Any]) -> Reduction:
    choice = _choice(parameters, "reduction")
    if choice is None:
        return Reduction.SAMPLE_MEAN
    value = _value(parameters, "reduction", "")
    if choice != "string_param" or value not in _REDUCTIONS:
        raise InvalidRequest(
            f"parameter reduction is {str(value)[:64]!r}; send one of {', '.join(_REDUCTIONS)} as string_param",
            reason=Reason.UNKNOWN_REDUCTION,
            field="parameters.reduction",
        )
    return _REDUCTIONS[value]


def _number(parameters: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a number that came as a double, an integer or a string."""
    choice = _choice(parameters, name)
    if choice is None:
        return default
    value = _value(parameters, name, default)
    if choice == "bool_param":
        _refuse(name, value, "a number, sent as double_param, int64_param, uint64_param or string_param")
    if choice == "string_param":
        try:
            if "_" in value:  # Python's float takes "1_0"
                raise ValueError
            return float(value)
        except ValueError:
            _refuse(name, value[:64], "a number")
    return float(value)


def _choice(parameters: Mapping[str, Any], name: str) -> str | None:
    """Return which field of an InferParameter is set; None where the parameter is not there, or is empty."""
    # Not `parameters[name]`, which would add it: this is a protobuf map.
    choice: str | None = parameters[name].WhichOneof("parameter_choice") if name in parameters else None
    return choice


def _value(parameters: Mapping[str, Any], name: str, default: Any) -> Any:
    choice = _choice(parameters, name)
    return default if choice is None else getattr(parameters[name], choice)


def _bad(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.BAD_PARAMETER, field=f"parameters.{name}")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise _bad(name, f"parameter {name} is {value!r}; it must be {allowed}")
