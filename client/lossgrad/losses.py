"""The losses that can be asked for, as values: which function, its parameter, its reduction, whether with gradient."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Final

from lossgrad.errors import InvalidRequest
from lossgrad_api.v1 import loss_service_pb2 as pb

_REDUCTIONS: Final = {
    "none": pb.REDUCTION_NONE,
    "mean": pb.REDUCTION_MEAN,
    "sum": pb.REDUCTION_SUM,
    "sample_mean": pb.REDUCTION_SAMPLE_MEAN,
    "sample_sum": pb.REDUCTION_SAMPLE_SUM,
}
_MEANS: Final = frozenset(("mean", "sample_mean"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Loss(ABC):
    """What every loss has; use SmoothL1, Huber, L1 or MSE.

    `reduction` is "mean", "sum", "none", or for one number per sample (over all dimensions but the first) "sample_mean"
    or "sample_sum". `gradient` asks for the gradient too. `denominator` is what a mean divides by instead of the sum of
    the weights, so that shards add up to one full batch. Every gradient is multiplied by `gradient_scale`.
    """

    name: ClassVar[str]
    parameter: ClassVar[str] = ""  # the name of the function's own parameter, "" where it has none

    reduction: str = "mean"
    gradient: bool = False
    denominator: float | None = None
    gradient_scale: float | None = None

    def __post_init__(self) -> None:
        if self.reduction == "elementwise_mean":
            warnings.warn(  # torch's own words
                "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.", stacklevel=3
            )
            object.__setattr__(self, "reduction", "mean")
        if not isinstance(self.reduction, str) or self.reduction not in _REDUCTIONS:
            raise _bad("reduction", f"{self.reduction!r}", f"one of {', '.join(map(repr, _REDUCTIONS))}")
        object.__setattr__(self, "gradient", bool(self.gradient))
        if self.denominator is not None:
            if self.reduction not in _MEANS:
                raise InvalidRequest(
                    f"denominator is {self.denominator!r} with reduction={self.reduction!r}, which divides by nothing; "
                    "use reduction='mean' or 'sample_mean', or leave denominator out",
                    reason="BAD_PARAMETER",
                    field="denominator",
                )
            self._set_number("denominator", "finite and above 0", lambda value: 0 < value < math.inf)
        if self.gradient_scale is not None:
            self._set_number("gradient_scale", "finite", math.isfinite)
        self._check_parameter()

    def _check_parameter(self) -> None:  # noqa: B027 - nothing to check where there is no parameter
        """Check the function's own parameter."""

    @cached_property
    def serialized(self) -> bytes:
        """The loss as a serialised lossgrad_api.v1.LossSpec."""
        spec = pb.LossSpec(
            reduction=_REDUCTIONS[self.reduction],
            include_gradient=self.gradient,
            denominator=self.denominator,
            gradient_scale=self.gradient_scale,
        )
        self._write(spec)
        return spec.SerializeToString(deterministic=True)

    @abstractmethod
    def _write(self, spec: pb.LossSpec) -> None:
        """Set the function, and its parameter, in `spec`."""

    def _set_number(self, name: str, allowed: str, is_allowed: Any) -> None:
        value = getattr(self, name)
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _bad(name, f"{value!r} ({type(value).__name__})", f"a number, {allowed}") from None
        if not is_allowed(number):
            raise _bad(name, f"{number!r}", allowed)
        object.__setattr__(self, name, number)

    def to_dict(self) -> dict[str, Any]:
        """Return the loss as plain values: its name, its parameter, its reduction, and its denominator if it has one."""
        described: dict[str, Any] = {"name": self.name}
        if self.parameter:
            described[self.parameter] = getattr(self, self.parameter)
        described["reduction"] = self.reduction
        if self.denominator is not None:
            described["denominator"] = self.denominator
        return described

    def __repr__(self) -> str:
        """Name the parameter, and of the rest what differs from the default."""
        own = [f for f in fields(self) if not f.kw_only]
        rest = [f for f in fields(self) if f.kw_only and getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in own + rest)})"


@dataclass(frozen=True, repr=False)
class SmoothL1(Loss):
    """0.5 d^2 / beta where |d| < beta, |d| - 0.5 beta elsewhere; d = input - target. beta >= 0; at 0 this is L1."""

    name: ClassVar[str] = "smooth_l1"
    parameter: ClassVar[str] = "beta"
    beta: float = 1.0

    def _check_parameter(self) -> None:
        self._set_number("beta", "at least 0 (may be infinite)", lambda beta: beta >= 0)

    def _write(self, spec: pb.LossSpec) -> None:
        spec.smooth_l1.beta = self.beta


@dataclass(frozen=True, repr=False)
class Huber(Loss):
    """0.5 d^2 where |d| < delta, delta (|d| - 0.5 delta) elsewhere; d = input - target. delta > 0."""

    name: ClassVar[str] = "huber"
    parameter: ClassVar[str] = "delta"
    delta: float = 1.0

    def _check_parameter(self) -> None:
        self._set_number("delta", "above 0 (may be infinite)", lambda delta: delta > 0)

    def _write(self, spec: pb.LossSpec) -> None:
        spec.huber.delta = self.delta


@dataclass(frozen=True, repr=False)
class L1(Loss):
    """|input - target|."""

    name: ClassVar[str] = "l1"

    def _write(self, spec: pb.LossSpec) -> None:
        spec.l1.SetInParent()


@dataclass(frozen=True, repr=False)
class MSE(Loss):
    """(input - target)^2."""

    name: ClassVar[str] = "mse"

    def _write(self, spec: pb.LossSpec) -> None:
        spec.mse.SetInParent()


LOSSES: Final[dict[str, type[Loss]]] = {loss.name: loss for loss in (SmoothL1, Huber, L1, MSE)}


def loss_from_dict(described: Any) -> Loss:
    """Return the loss that `to_dict` described. Raises ValueError or TypeError for anything else."""
    options = dict(described)
    name = options.pop("name", None)
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}; it must be one of {', '.join(LOSSES)}")
    return LOSSES[name](**options)


def make_loss(
    kind: type[Loss],
    parameter: float | None,
    reduction: str,
    gradient: bool,
    denominator: float | None,
    gradient_scale: float | None,
) -> Loss:
    """Return a loss; the one made before, where the arguments are plain values and there are no factors.

    Checking and serialising a loss takes as long as all else that a call does before it is sent, and most calls of a
    program are for the same one. `parameter` is None for a loss that has none.
    """
    if (
        denominator is None
        and gradient_scale is None
        and type(gradient) is bool
        and type(reduction) is str
        and reduction != "elementwise_mean"  # warns every time
        and (parameter is None or type(parameter) is float or type(parameter) is int)
    ):
        return _known_loss(kind, parameter, reduction, gradient)
    parameters = () if parameter is None else (parameter,)
    return kind(
        *parameters, reduction=reduction, gradient=gradient, denominator=denominator, gradient_scale=gradient_scale
    )


@lru_cache(maxsize=256)
def _known_loss(kind: type[Loss], parameter: float | None, reduction: str, gradient: bool) -> Loss:
    return kind(*(() if parameter is None else (parameter,)), reduction=reduction, gradient=gradient)


def _bad(name: str, value: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}; it must be {allowed}", reason="BAD_PARAMETER", field=name)
