"""Losses from the server inside torch's autograd graph. For nn.py only; imports torch.

The forward pass asks the server for the loss and for u, the slope of each element's loss at d = input - target, free of
factors; the backward pass multiplies u by grad_output and the factors, here, without a round trip. Where the backward
pass is itself to be differentiated, the same product is built of operations that torch can differentiate: u depends on
d through `_Slope`, which knows its derivative. So derivatives of any order are right, those with respect to grad_output
among them, and no gradient is ever cut from its graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from lossgrad.client import LossClient
from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1

_Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class ServedLoss:
    """One loss function with its parameter and reduction, and the client that computes it."""

    client: LossClient
    function: type[Loss]
    parameter: float
    reduction: str
    # What the loss is given back in, where that is not the type that input and target promote to: under autocast.
    loss_dtype: torch.dtype | None = None

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss. One round trip; the slopes come along where the graph will need them."""
        if self.loss_dtype is not None and self.reduction == "none":
            # A float32 loss for every element has to be computed as one; a sum is float64 anyway.
            input, target = _widened(input, self.loss_dtype), _widened(target, self.loss_dtype)
        if not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
            return self._ask(input, target, None)[0]
        if not input.is_floating_point():
            input, target = target, input  # the losses are symmetric, and the server gives the input's gradient
        if self.reduction == "none":
            # grad_output may differ from element to element, so each element's own slope is needed.
            input, target = torch.broadcast_tensors(input, target)  # type: ignore[no-untyped-call]
        loss: Tensor = _Served.apply(input, target, self)[0]  # type: ignore[no-untyped-call]
        return loss

    def ask_with_slopes(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and u times `headroom` for input and for target; empty for target where it is the negative."""
        if _result_count(input, target) == 0:
            return self._ask(input, target, None)[0], torch.zeros_like(input), torch.zeros_like(target)
        scale = headroom(input, target) / self.factor(input, target)
        loss, slopes, target_slopes = self._ask(input, target, scale)
        assert slopes is not None  # noqa: S101 - they were asked for
        return loss, slopes, input.new_empty(0) if target_slopes is None else target_slopes

    def factor(self, input: Tensor, target: Tensor) -> float:
        """Return what u is multiplied by in the gradient, grad_output apart: the mean's 1 / N, the squared error's 2.

        It is left out of what the server sends, so that half precision does not underflow before grad_output is in.
        """
        factor = 2.0 if self.function is MSE else 1.0
        return factor / max(1, _result_count(input, target)) if self.reduction == "mean" else factor

    def slope(self, difference: Tensor) -> Tensor:
        """Return u, computed here."""
        if self.function is MSE:
            return difference.clone()
        if self.function is L1 or self.parameter == 0:
            return difference.sign()
        if self.function is Huber:
            return difference.clamp(-self.parameter, self.parameter)
        # beta may vanish in the data type; 0 / 0 is no slope.
        return torch.where(difference == 0, 0.0, (difference / self.parameter).clamp(-1, 1))

    def slope_derivative(self, difference: Tensor) -> Tensor:
        """Return du/dd; 0 at the kinks, as in torch."""
        if self.function is MSE:
            return torch.ones_like(difference)
        if self.function is L1 or self.parameter == 0:
            return torch.zeros_like(difference)
        inside = difference.abs() < self.parameter
        # Where beta vanishes in the data type nothing is inside, and 1 / beta would not fit it.
        value = 1.0 if self.function is Huber else min(1.0 / self.parameter, torch.finfo(difference.dtype).max)
        return torch.zeros_like(difference).masked_fill(inside, value)

    def _ask(
        self, input: Tensor, target: Tensor, gradient_scale: float | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        options: dict[str, Any] = {}
        if self.function in (SmoothL1, Huber):
            options["beta" if self.function is SmoothL1 else "delta"] = self.parameter
        spec = self.function(
            reduction=self.reduction, gradient=gradient_scale is not None, gradient_scale=gradient_scale, **options
        )
        result = self.client.compute(input, target, spec, allow_broadcast=input.shape != target.shape)
        loss: Tensor = result.loss
        if self.loss_dtype is not None and result.value is not None:
            loss = torch.tensor(result.value, dtype=torch.float64).to(self.loss_dtype).to(input.device)
        return loss, result.gradient, result.target_gradient


class _Served(Function):
    """(input, target, ServedLoss) -> loss, and beside it the server's slopes, which only `backward` looks at."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, served: ServedLoss) -> tuple[Tensor, Tensor, Tensor]:
        return served.ask_with_slopes(input, target)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, ServedLoss], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        input, target, ctx.served = inputs
        _, slopes, target_slopes = output
        ctx.mark_non_differentiable(slopes, target_slopes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, slopes, target_slopes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_outputs[0] is None:
            return None, None, None
        # Halves are multiplied in float32 and rounded once.
        grad_output = grad_outputs[0].to(torch.promote_types(grad_outputs[0].dtype, torch.float32))
        # create_graph=True, and only that, enables grad mode here.
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        grad_input, grad_target = gradients(ctx.served, ctx.needs_input_grad, grad_output, *ctx.saved_tensors)
        return grad_input, grad_target, None


def _gradients(
    served: ServedLoss,
    needs: tuple[bool, ...],
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    slopes: Tensor,
    target_slopes: Tensor,
) -> _Gradients:
    factor = grad_output * (served.factor(input, target) / headroom(input, target))
    is_mirrored = not target_slopes.numel() and bool(target.numel())
    product = slopes.to(factor.dtype) * factor if needs[0] or is_mirrored else None
    grad_input = grad_target = None
    if needs[0] and product is not None:
        grad_input = product.to(input.dtype)
    if needs[1]:
        grad_target = -product if product is not None and is_mirrored else target_slopes.to(factor.dtype) * factor
        grad_target = grad_target.to(target.dtype)
    return grad_input, grad_target


def _differentiable_gradients(
    served: ServedLoss,
    needs: tuple[bool, ...],
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    slopes: Tensor,
    target_slopes: Tensor,
) -> _Gradients:
    difference = input.to(grad_output.dtype) - target.to(grad_output.dtype)
    if input.shape == target.shape and input.dtype == torch.promote_types(input.dtype, target.dtype):
        slope = slopes.to(grad_output.dtype)  # the server's, so that the values are those of the plain backward pass
    else:
        slope = served.slope(difference.detach())  # the server's are summed over what was broadcast, or rounded
    slope = _Slope.apply(difference, slope, served)  # type: ignore[no-untyped-call]
    product = slope * (grad_output * served.factor(input, target))
    grad_input = product.sum_to_size(input.shape).to(input.dtype) if needs[0] else None
    grad_target = (-product).sum_to_size(target.shape).to(target.dtype) if needs[1] else None
    return grad_input, grad_target


class _Slope(Function):
    """(d, u(d), ServedLoss) -> u(d), differentiable with respect to d."""

    @staticmethod
    def forward(_difference: Tensor, slope: Tensor, _served: ServedLoss) -> Tensor:
        return slope.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ServedLoss], _output: Tensor) -> None:
        difference, _, ctx.served = inputs
        ctx.save_for_backward(difference)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        # Constant between the kinks, so no graph is needed through it; one is through grad_output.
        return grad_outputs[0] * ctx.served.slope_derivative(difference.detach()), None, None


def headroom(input: Tensor, target: Tensor) -> float:
    """Return the power of 2 that keeps slopes in range which the server sums over what was broadcast; else 1."""
    summed = _result_count(input, target) / max(1, min(input.numel(), target.numel()))
    return 2.0 ** -math.ceil(math.log2(summed)) if summed > 1 else 1.0


def _result_count(input: Tensor, target: Tensor) -> int:
    if input.shape == target.shape:
        return input.numel()
    return math.prod(torch.broadcast_shapes(input.shape, target.shape))  # type: ignore[no-untyped-call]


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, dtype)) if tensor.is_floating_point() else tensor
