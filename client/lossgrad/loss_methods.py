"""The four losses as methods, for every client: `client.smooth_l1(input, target, beta=0.5)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1, make_loss

R = TypeVar("R")


class LossMethods(ABC, Generic[R]):
    """One method for each loss. `R` is what a call gives: a LossResult, or an awaitable of one.

    Every method takes `input` and `target` (NumPy arrays, torch tensors, lists, numbers, anything with `__array__` or
    `__dlpack__`), and by keyword: `reduction` ("mean", "sum", "none", "sample_mean", "sample_sum"), `gradient` (whether
    to send the gradient back), `weight` (of each element), `mask` (bool; where false, an element takes no part),
    `denominator` (what a mean divides by, instead of the sum of the weights), `gradient_scale` (multiplies every
    gradient), `allow_broadcast` (whether unequal shapes are broadcast), `timeout` in seconds (the client's by default,
    `math.inf` for none), `idempotency_key` (the caller's name for the request, for logs and traces) and `gradient_out` (an
    array or CPU tensor like input, a memory-mapped one perhaps, to write the gradient to).

    Tensors of any size will do: what does not fit a message is cut, sent slice by slice, and put together with the same
    bits; `timeout` is then how long to wait without an answer to any slice.
    """

    @abstractmethod
    def _compute_one(self, input: Any, target: Any, loss: Loss, options: dict[str, Any]) -> R:
        """Compute one loss. `options` are those of `compute`."""

    def smooth_l1(
        self,
        input: Any,
        target: Any,
        *,
        beta: float = 1.0,
        reduction: str = "mean",
        gradient: bool = False,
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        gradient_scale: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> R:
        """Compute the smooth L1 loss, as torch.nn.SmoothL1Loss. `beta` is at least 0; at 0 this is L1."""
        return self._compute_one(
            input,
            target,
            make_loss(SmoothL1, beta, reduction, gradient, denominator, gradient_scale),
            _options(weight, mask, allow_broadcast, timeout, idempotency_key, gradient_out),
        )

    def huber(
        self,
        input: Any,
        target: Any,
        *,
        delta: float = 1.0,
        reduction: str = "mean",
        gradient: bool = False,
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        gradient_scale: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> R:
        """Compute the Huber loss, as torch.nn.HuberLoss. `delta` is above 0."""
        return self._compute_one(
            input,
            target,
            make_loss(Huber, delta, reduction, gradient, denominator, gradient_scale),
            _options(weight, mask, allow_broadcast, timeout, idempotency_key, gradient_out),
        )

    def l1(
        self,
        input: Any,
        target: Any,
        *,
        reduction: str = "mean",
        gradient: bool = False,
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        gradient_scale: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> R:
        """Compute the mean absolute error, as torch.nn.L1Loss."""
        return self._compute_one(
            input,
            target,
            make_loss(L1, None, reduction, gradient, denominator, gradient_scale),
            _options(weight, mask, allow_broadcast, timeout, idempotency_key, gradient_out),
        )

    def mse(
        self,
        input: Any,
        target: Any,
        *,
        reduction: str = "mean",
        gradient: bool = False,
        weight: Any = None,
        mask: Any = None,
        denominator: float | None = None,
        gradient_scale: float | None = None,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        idempotency_key: str = "",
        gradient_out: Any = None,
    ) -> R:
        """Compute the mean squared error, as torch.nn.MSELoss."""
        return self._compute_one(
            input,
            target,
            make_loss(MSE, None, reduction, gradient, denominator, gradient_scale),
            _options(weight, mask, allow_broadcast, timeout, idempotency_key, gradient_out),
        )


def _options(
    weight: Any, mask: Any, allow_broadcast: bool, timeout: float | None, idempotency_key: str, gradient_out: Any
) -> dict[str, Any]:
    """Return the options of `compute`; none where all are as they are by default, for which there are shorter ways."""
    if (
        weight is None
        and mask is None
        and not allow_broadcast
        and timeout is None
        and not idempotency_key
        and gradient_out is None
    ):
        return {}
    return {
        "weight": weight,
        "mask": mask,
        "allow_broadcast": allow_broadcast,
        "timeout": timeout,
        "idempotency_key": idempotency_key,
        "gradient_out": gradient_out,
    }
