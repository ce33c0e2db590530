"""What is totalled, and the total of one loss: the values that accumulation.py holds by group.

On the wire: lossgrad_api.v1.LossSpec (its function alone) and LossState. What cannot be one is refused with a StateError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

from lossgrad_api.exact_sums import MAX_PARTIALS, ZERO, ExactSum
from lossgrad_api.v1 import loss_service_pb2 as pb

# Of a state. Far from overflowing an int64, so that nobody who adds to one need look.
MAX_COUNT: Final = 1 << 62


class StateError(ValueError):
    """A state that cannot be one, or states that do not go together. `field` is the path of what is wrong with it."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class LossFunction(NamedTuple):
    """What a total is a total of. `name` is smooth_l1, huber, l1 or mse; `parameter` the beta or delta, 0 without one."""

    name: str
    parameter: float = 0.0

    def __str__(self) -> str:
        """Return it as people write it: "smooth_l1(beta=0.5)"."""
        parameter = _PARAMETERS.get(self.name)
        return f"{self.name}({parameter}={self.parameter!r})" if parameter else self.name

    @classmethod
    def from_message(cls, spec: pb.LossSpec, path: str = "spec") -> LossFunction:
        """Return the function that a LossSpec names, its defaults filled in. Raises StateError."""
        name = spec.WhichOneof("function")
        if name is None:
            raise StateError(f"{path} names no loss; set one of smooth_l1, huber, l1, mse", f"{path}.function")
        parameter = 0.0
        if name == "smooth_l1":
            parameter = spec.smooth_l1.beta if spec.smooth_l1.HasField("beta") else 1.0
            if not parameter >= 0:  # also refuses NaN
                raise StateError(f"{path}.smooth_l1.beta is {parameter!r}; it must be at least 0", path)
        elif name == "huber":
            parameter = spec.huber.delta if spec.huber.HasField("delta") else 1.0
            if not parameter > 0:
                raise StateError(f"{path}.huber.delta is {parameter!r}; it must be above 0", path)
        return cls(name, parameter + 0.0)

    def to_message(self) -> pb.LossSpec:
        """Return a LossSpec that names this function and says nothing else."""
        if self.name == "smooth_l1":
            return pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=self.parameter))
        if self.name == "huber":
            return pb.LossSpec(huber=pb.HuberLoss(delta=self.parameter))
        return pb.LossSpec(l1=pb.L1Loss()) if self.name == "l1" else pb.LossSpec(mse=pb.MseLoss())


_PARAMETERS: Final = {"smooth_l1": "beta", "huber": "delta"}


@dataclass(frozen=True, slots=True)
class LossTotal:
    """The total of one loss: what lossgrad_api.v1.LossState holds.

    `exact_sum` is that of w * l, `exact_weight_sum` that of w (1 where no weights were sent), both over the elements that
    are not masked, of which there are `element_count`. `min` and `max` are of the w * l, NaN left out: inf and -inf
    where there is none. `nonfinite_count` says how many w * l are NaN or infinite.
    """

    exact_sum: ExactSum = ZERO
    exact_weight_sum: ExactSum = ZERO
    element_count: int = 0
    nonfinite_count: int = 0
    min: float = math.inf
    max: float = -math.inf

    def __add__(self, other: LossTotal) -> LossTotal:
        """Return the total of both."""
        return LossTotal(
            self.exact_sum + other.exact_sum,
            self.exact_weight_sum + other.exact_weight_sum,
            self.element_count + other.element_count,
            self.nonfinite_count + other.nonfinite_count,
            # 0.0 and -0.0 are equal, so which one min gives depends on the order; adding 0.0 makes both 0.0.
            min(self.min, other.min) + 0.0,
            max(self.max, other.max) + 0.0,
        )

    @property
    def sum(self) -> float:
        """The sum of w * l: to the bit the answer of the reduction sum."""
        return self.exact_sum.quotient(1.0)

    @property
    def weight_sum(self) -> float:
        """The sum of w, rounded once."""
        return self.exact_weight_sum.rounded

    @property
    def mean(self) -> float:
        """The sum of w * l over the sum of w: to the bit the answer of the reduction mean. NaN where nothing took part."""
        return self.exact_sum.quotient(self.weight_sum)

    def mean_over(self, denominator: float) -> float:
        """Return the sum of w * l over a denominator: the answer of the reduction mean with that denominator."""
        return self.exact_sum.quotient(denominator)

    @classmethod
    def from_message(cls, state: pb.LossState, path: str = "state") -> LossTotal:
        """Return a LossState as a value. Raises StateError where it cannot be one."""
        total = cls(
            _read_sum(state.partial_sums, f"{path}.partial_sums"),
            _read_sum(state.weight_partial_sums, f"{path}.weight_partial_sums"),
            state.element_count,
            state.nonfinite_count,
            state.min + 0.0,
            state.max + 0.0,
        )
        if not 0 <= total.element_count <= MAX_COUNT:
            refuse(f"{path}.element_count", total.element_count, f"0 to {MAX_COUNT}")
        if not 0 <= total.nonfinite_count <= total.element_count:
            allowed = f"0 to element_count, which is {total.element_count}"
            refuse(f"{path}.nonfinite_count", total.nonfinite_count, allowed)
        is_empty = (total.min, total.max) == (math.inf, -math.inf)
        if not (total.min <= total.max or is_empty):  # also refuses NaN
            refuse(f"{path}.min", total.min, f"at most max, which is {total.max!r}; or inf, and max -inf")
        if total.element_count == 0 and total != cls():
            refuse(f"{path}.element_count", 0, "above 0 where there are sums; without elements min is inf, max -inf")
        if not _is_same(state.weight_sum, total.weight_sum):
            refuse(f"{path}.weight_sum", state.weight_sum, f"the sum of weight_partial_sums, {total.weight_sum!r}")
        return total

    def to_message(self) -> pb.LossState:
        """Return it as a LossState. Equal totals give equal bytes."""
        return pb.LossState(
            partial_sums=self.exact_sum.partials,
            element_count=self.element_count,
            weight_sum=self.weight_sum,
            min=self.min,
            max=self.max,
            nonfinite_count=self.nonfinite_count,
            weight_partial_sums=self.exact_weight_sum.partials,
        )


def _read_sum(partials: Sequence[float], path: str) -> ExactSum:
    if len(partials) > MAX_PARTIALS:
        raise StateError(f"{path} has {len(partials)} numbers; no sum needs more than {MAX_PARTIALS}", path)
    if len(partials) > 1 and not all(map(math.isfinite, partials)):
        raise StateError(f"{path} holds NaN or an infinity among other numbers; it must stand alone", path)
    return ExactSum(partials)


def _is_same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def refuse(path: str, value: object, allowed: str) -> NoReturn:
    """Raise StateError for a value out of its range."""
    raise StateError(f"{path} is {value!r}; it must be {allowed}", path)
