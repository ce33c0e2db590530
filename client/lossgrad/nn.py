"""Drop-in modules for torch.nn's SmoothL1Loss, HuberLoss, L1Loss and MSELoss, computed by a lossgrad server.

They are subclasses of torch's, so constructor arguments, attributes, repr and checks are torch's own, the deprecated
ones too; only the computation goes to the server. Importing this imports torch.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from lossgrad import losses
from lossgrad.autograd import ServedLoss
from lossgrad.client import LossClient
from lossgrad.torch_tensors import data_type

__all__ = ["HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss", "default_client"]

_REDUCTIONS = frozenset(("none", "mean", "sum"))
_HALVES = frozenset((torch.float16, torch.bfloat16))
_default_client: LossClient | None = None
_default_client_lock = threading.Lock()


def default_client() -> LossClient:
    """Return the client of modules that are given none: one for the process, made from the LOSSGRAD_ variables."""
    global _default_client
    with _default_client_lock:
        if _default_client is None:
            _default_client = LossClient()
        return _default_client


class _ServedModule(torch.nn.modules.loss._Loss):
    """What the four have in common: a client, and the way from forward() to it."""

    _client: LossClient | None

    def _set_client(self, client: LossClient | None) -> None:
        if client is not None and not isinstance(client, LossClient):
            raise TypeError(
                f"client is a {type(client).__name__}; a module's forward cannot await, so give a lossgrad.LossClient"
            )
        self._client = client

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client out: a module that is loaded elsewhere uses the default client there."""
        return {**self.__dict__, "_client": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy all but the client, which the copy shares."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._client = self._client
        return copied

    def _served(
        self,
        input: Tensor,
        target: Tensor,
        function: type[losses.Loss],
        torch_function: Callable[..., Tensor],
        parameter: tuple[str, float] | None = None,
    ) -> Tensor:
        """Compute the loss; warn and raise as torch's own function does."""
        if target.size() != input.size():
            warnings.warn(
                f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
                "This will likely lead to incorrect results due to broadcasting. "
                "Please ensure they have the same size.",
                stacklevel=3,
            )
            # Raises where they do not fit, in torch's words.
            torch.broadcast_tensors(input, target)  # type: ignore[no-untyped-call]
        reduction = self.reduction
        value: Any = 0.0 if parameter is None else parameter[1]
        if not (
            reduction in _REDUCTIONS
            and isinstance(value, (int, float))
            and (value >= 0 if parameter and parameter[0] == "beta" else value > 0 or parameter is None)
            and _is_supported(input, target)
        ):
            # Out of the ordinary. torch's own function tells, on one element, what it thinks of it.
            options = {} if parameter is None else {parameter[0]: value}
            torch_function(
                torch.zeros(1, dtype=input.dtype, device=input.device),
                torch.zeros(1, dtype=target.dtype, device=target.device),
                reduction=reduction,
                **options,
            )
            reduction = "mean" if reduction == "elementwise_mean" else reduction
        # torch computes these losses in float32 under autocast.
        is_widened = torch.is_autocast_enabled(input.device.type) and (
            input.dtype in _HALVES or target.dtype in _HALVES
        )
        served = ServedLoss(
            self._client or default_client(),
            function,
            float(value),
            reduction,
            torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32) if is_widened else None,
        )
        return served(input, target)


class SmoothL1Loss(_ServedModule, torch.nn.SmoothL1Loss):
    """torch.nn.SmoothL1Loss, computed by a lossgrad server. `client` is `default_client()` where none is given."""

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
        *,
        client: LossClient | None = None,
    ) -> None:
        torch.nn.SmoothL1Loss.__init__(self, size_average, reduce, reduction, beta)
        self._set_client(client)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` against `target`."""
        return self._served(input, target, losses.SmoothL1, functional.smooth_l1_loss, ("beta", self.beta))


class HuberLoss(_ServedModule, torch.nn.HuberLoss):
    """torch.nn.HuberLoss, computed by a lossgrad server. `client` is `default_client()` where none is given."""

    def __init__(self, reduction: str = "mean", delta: float = 1.0, *, client: LossClient | None = None) -> None:
        torch.nn.HuberLoss.__init__(self, reduction, delta)
        self._set_client(client)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` against `target`."""
        return self._served(input, target, losses.Huber, functional.huber_loss, ("delta", self.delta))


class L1Loss(_ServedModule, torch.nn.L1Loss):
    """torch.nn.L1Loss, computed by a lossgrad server. `client` is `default_client()` where none is given."""

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        client: LossClient | None = None,
    ) -> None:
        torch.nn.L1Loss.__init__(self, size_average, reduce, reduction)
        self._set_client(client)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` against `target`."""
        return self._served(input, target, losses.L1, functional.l1_loss)


class MSELoss(_ServedModule, torch.nn.MSELoss):
    """torch.nn.MSELoss, computed by a lossgrad server. `client` is `default_client()` where none is given."""

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        client: LossClient | None = None,
    ) -> None:
        torch.nn.MSELoss.__init__(self, size_average, reduce, reduction)
        self._set_client(client)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` against `target`."""
        return self._served(input, target, losses.MSE, functional.mse_loss)


def _is_supported(input: Tensor, target: Tensor) -> bool:
    numbers = data_type(input.dtype), data_type(target.dtype)
    return None not in numbers and (input.is_floating_point() or target.is_floating_point())
