"""One pair of tensors under many betas (or deltas): up to 16 go with one upload. `sweep`, as a method of both clients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from lossgrad.calls import MAX_SPECS
from lossgrad.errors import InvalidRequest
from lossgrad.losses import Loss, SmoothL1
from lossgrad.results import LossResult

_EXAMPLE: Final = "such as [0.1, 0.5, 1.0]"


class SweepPoint(NamedTuple):
    """One beta (or delta), and its loss."""

    beta: float
    loss: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SweepResult:
    """The losses of one pair of tensors under many betas, in the order of the betas. Huber's delta is a beta here too."""

    results: tuple[LossResult, ...]

    @property
    def parameter(self) -> str:
        """What was varied: "beta" or "delta"."""
        return self.results[0].spec.parameter

    @property
    def betas(self) -> tuple[float, ...]:
        """The betas or deltas."""
        return tuple(getattr(result.spec, self.parameter) for result in self.results)

    @property
    def losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Each one's mean or sum, in float64."""
        return np.array([result.value for result in self.results], np.float64)

    @property
    def best(self) -> SweepPoint:
        """The beta with the least loss, the first of them; NaN is never the least, unless all are."""
        points = [SweepPoint(*each) for each in zip(self.betas, self.losses.tolist(), strict=True)]
        return min(points, key=lambda point: (math.isnan(point.loss), point.loss))

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with the columns beta (or delta) and loss. Needs pandas."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas() needs pandas, which is not installed: pip install pandas", name=error.name
            ) from error
        return pd.DataFrame({self.parameter: self.betas, "loss": self.losses})

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        name = type(self.results[0].spec).__name__
        lines = [f"SweepResult of {name}, {len(self)} points, best {self.parameter}={self.best.beta!r}:"]
        lines += [
            f"  {self.parameter}={beta!r}: {loss!r}"
            for beta, loss in zip(self.betas, self.losses.tolist(), strict=True)
        ]
        return "\n".join(lines)


class SweepMethods:
    """What LossClient has for sweeps."""

    @abstractmethod
    def compute(self, input: Any, target: Any, losses: Any, **options: Any) -> Any:
        """Compute losses."""

    def sweep(
        self,
        input: Any,
        target: Any,
        betas: Iterable[float],
        *,
        loss: type[Loss] = SmoothL1,
        reduction: str = "mean",
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
    ) -> SweepResult:
        """Compute one loss under many betas: `loss` is SmoothL1, or Huber, whose deltas they are then.

        The tensors travel once for each 16 betas. The other options are those of `smooth_l1`; the reduction is "mean" or
        "sum". Raises LossgradError.
        """
        options = _options(weight, mask, allow_broadcast, timeout)
        results: list[LossResult] = []
        for losses in _losses(betas, loss, reduction, denominator):
            results += self.compute(input, target, losses, **options)
        return SweepResult(tuple(results))


class AsyncSweepMethods:
    """What AsyncLossClient has for sweeps."""

    @abstractmethod
    async def compute(self, input: Any, target: Any, losses: Any, **options: Any) -> Any:
        """Compute losses."""

    async def sweep(
        self,
        input: Any,
        target: Any,
        betas: Iterable[float],
        *,
        loss: type[Loss] = SmoothL1,
        reduction: str = "mean",
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - each message's
    ) -> SweepResult:
        """Compute one loss under many betas, as LossClient.sweep."""
        options = _options(weight, mask, allow_broadcast, timeout)
        results: list[LossResult] = []
        for losses in _losses(betas, loss, reduction, denominator):
            results += await self.compute(input, target, losses, **options)
        return SweepResult(tuple(results))


def _options(weight: Any, mask: Any, allow_broadcast: bool, timeout: float | None) -> dict[str, Any]:
    return {"weight": weight, "mask": mask, "allow_broadcast": allow_broadcast, "timeout": timeout}


def _losses(
    betas: Iterable[float], kind: type[Loss], reduction: str, denominator: float | None
) -> Iterator[Sequence[Loss]]:
    """Give the losses, as many at a time as one message takes."""
    if not (isinstance(kind, type) and issubclass(kind, Loss) and kind.parameter):
        raise InvalidRequest(
            f"loss is {kind!r}; a sweep needs one with a parameter: lossgrad.SmoothL1 or lossgrad.Huber",
            reason="BAD_PARAMETER",
            field="loss",
        )
    if reduction not in ("mean", "sum"):
        raise InvalidRequest(
            f"reduction is {reduction!r}; a sweep compares one number for each beta: 'mean' or 'sum'",
            reason="BAD_PARAMETER",
            field="reduction",
        )
    losses = [kind(**{kind.parameter: beta}, reduction=reduction, denominator=denominator) for beta in betas]
    if not losses:
        raise InvalidRequest(f"betas is empty; give at least one, {_EXAMPLE}", reason="SPEC_COUNT", field="betas")
    for start in range(0, len(losses), MAX_SPECS):
        yield losses[start : start + MAX_SPECS]
