"""The losses' formulas: the elementwise loss and its derivative, from d = input - target.

Everything here takes d in float64 and may overwrite it, so that no more arrays are made than needed. Parameters meet
the tensors as 0-d tensors on their own device, never as Python numbers: on CUDA, torch turns a division by a number
into a multiplication by its reciprocal, which overflows for a denormal beta and gives NaN at d = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossgrad_server.jobs import LossKind


def loss_and_derivative(kind: LossKind, parameter: float, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return each element's loss and its derivative with respect to d. `d` is float64 and is overwritten.

    `parameter` is smooth_l1's beta (at least 0) or huber's delta (above 0); both may be infinite.
    """
    match kind:
        case LossKind.SMOOTH_L1:
            # torch hands beta = 0 to l1_loss, so NaN has gradient 0 there and NaN elsewhere.
            return smooth_l1(d, parameter) if parameter > 0 else l1(d)
        case LossKind.HUBER:
            return huber(d, parameter)
        case LossKind.L1:
            return l1(d)
        case LossKind.MSE:
            return mse(d)


def smooth_l1(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the smooth L1 loss and its derivative, for beta above 0.

    0.5 d^2 / beta where |d| < beta, |d| - 0.5 beta elsewhere. Source: Girshick, Fast R-CNN, 2015, eq. 3;
    torch.nn.SmoothL1Loss. Written with the derivative g, it neither overflows nor underflows before the result does.
    """
    if math.isinf(beta):
        # The limit: loss and gradient 0. |d| < beta does not hold for an infinite d: inf - 0.5 inf, and its sign.
        g = torch.where(d.isinf(), d.sgn(), d.mul(0.0))
        return d.mul_(0.0).abs_(), g
    # g = clamp(d / beta, -1, 1)
    g = d.div(_number(beta, d)).clamp_(-1.0, 1.0)
    # loss = g (d - 0.5 beta g); the loss of d = -0.0 would be -0.0 but for abs.
    return d.sub_(g.mul(_number(0.5 * beta, d))).mul_(g).abs_(), g


def huber(d: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Return the Huber loss and its derivative, for delta above 0.

    0.5 d^2 where |d| < delta, delta (|d| - 0.5 delta) elsewhere. Source: Huber, 1964; torch.nn.HuberLoss.
    """
    # g = clamp(d, -delta, delta)
    g = d.clamp(-delta, delta)
    # loss = g (d - 0.5 g)
    return d.sub_(g.mul(0.5)).mul_(g).abs_(), g


def l1(d: Tensor) -> tuple[Tensor, Tensor]:
    """Return |d| and its derivative: the sign of d, 0 at 0 and, as in torch, at NaN. Source: torch.nn.L1Loss."""
    return d.abs(), d.sgn()


def mse(d: Tensor) -> tuple[Tensor, Tensor]:
    """Return d^2 and its derivative 2 d. Source: torch.nn.MSELoss."""
    return d.square(), d.mul_(2.0)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)
