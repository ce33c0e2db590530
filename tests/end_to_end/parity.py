"""The cases in which the service is compared with torch, and the comparison. What runs them: test_torch_parity.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

import lossgrad

DTYPES: Final = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
LOSSES: Final = ("smooth_l1", "huber", "l1", "mse")
REDUCTIONS: Final = ("none", "mean", "sum")
BETAS: Final = (0.0, 1e-50, 0.1, 1.0, 1e39, math.inf)

# What torch's own rounding in the dtype allows: elementwise losses and gradients are rounded to it several times.
_RELATIVE: Final = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-13}
# Below this, torch flushes to zero or rounds to the dtype's subnormals: losses with a beta of 1e39.
_ABSOLUTE: Final = {torch.float16: 1e-6, torch.bfloat16: 1e-33, torch.float32: 1e-33, torch.float64: 1e-300}


@dataclass(frozen=True)
class Case:
    """One request: tensors, and the losses to compute over them with the gradient."""

    name: str
    input: torch.Tensor
    target: torch.Tensor
    losses: tuple[lossgrad.Loss, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"allow_broadcast": self.input.shape != self.target.shape}


def parameters(loss: str) -> tuple[float | None, ...]:
    """Return the betas or deltas to try; huber has no 0."""
    return {"smooth_l1": BETAS, "huber": BETAS[1:]}.get(loss, (None,))


def make_losses(loss: str) -> tuple[lossgrad.Loss, ...]:
    """Return a loss with every reduction and parameter, at most 16 of them to a tuple's request (see `cases`)."""
    losses: list[lossgrad.Loss] = []
    for reduction in REDUCTIONS:
        for parameter in parameters(loss):
            common = {"reduction": reduction, "gradient": True}
            if loss == "smooth_l1":
                losses.append(lossgrad.SmoothL1(parameter, **common))  # type: ignore[arg-type]
            elif loss == "huber":
                losses.append(lossgrad.Huber(parameter, **common))  # type: ignore[arg-type]
            else:
                losses.append((lossgrad.L1 if loss == "l1" else lossgrad.MSE)(**common))  # type: ignore[arg-type]
    return tuple(losses)


def cases(loss: str, dtype: torch.dtype) -> Iterator[Case]:
    """Give every shape with every reduction and parameter."""
    losses = make_losses(loss)
    for name, input, target in tensors(dtype):
        for start in range(0, len(losses), 16):
            yield Case(name, input, target, losses[start : start + 16])


def tensors(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Give pairs of awkward shapes and layouts."""
    generator = torch.Generator().manual_seed(20)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for shape in ((), (0,), (3, 0, 2), (1,), (1, 1), (7,), (17, 3), (2, 3, 5, 7), (4099,)):
        yield f"shape {list(shape)}", random(*shape), random(*shape)
    yield "transposed", random(5, 7).T, random(7, 5)
    yield "every second", random(20)[::2], random(10)
    yield "expanded", random(1, 6).expand(4, 6), random(4, 6)
    yield (
        "kink",
        torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0], dtype=dtype),
        torch.tensor([0.0, 0.0, 0.0, 0.4, 1.0], dtype=dtype),
    )
    yield "broadcast row", random(4, 6), random(6)
    yield "broadcast both", random(4, 1), random(1, 6)
    yield "broadcast scalar", random(), random(3, 5)
    yield "broadcast empty", random(0), random(1)
    for other in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8):
        if other is not dtype:
            yield f"beside {other}", random(33), torch.arange(33).to(other)


def torch_loss(loss: lossgrad.Loss, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what torch computes, through its public functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        if isinstance(loss, lossgrad.SmoothL1):
            return F.smooth_l1_loss(input, target, reduction=loss.reduction, beta=loss.beta)
        if isinstance(loss, lossgrad.Huber):
            # torch's huber forward takes mixed dtypes, but its backward fails on them: promote as it ought to.
            common = torch.promote_types(input.dtype, target.dtype)
            return F.huber_loss(input.to(common), target.to(common), reduction=loss.reduction, delta=loss.delta)
        function = F.l1_loss if isinstance(loss, lossgrad.L1) else F.mse_loss
        return function(input, target, reduction=loss.reduction)


def check(case: Case, results: tuple[lossgrad.LossResult, ...]) -> None:
    """Compare results with torch's, loss and both gradients."""
    for loss, result in zip(case.losses, results, strict=True):
        where = f"{case.name}: {loss}"
        input = case.input.detach().clone().requires_grad_()
        target = case.target.detach().clone().requires_grad_(case.target.is_floating_point())
        expected = torch_loss(loss, input, target)
        expected.backward(torch.ones_like(expected))  # type: ignore[no-untyped-call]
        assert isinstance(result.loss, torch.Tensor), where
        assert result.loss.dtype == expected.dtype, where
        assert result.loss.shape == expected.shape, where
        _close(result.loss, expected.detach(), where)
        gradient = result.gradient
        assert gradient is not None
        assert gradient.dtype == input.dtype
        assert gradient.shape == input.shape
        assert input.grad is not None
        d = torch.broadcast_tensors(case.input.double(), case.target.double())  # type: ignore[no-untyped-call]
        at_zero = (d[0] - d[1]) == 0
        if isinstance(loss, lossgrad.SmoothL1) and 0 < loss.beta < 1e-40 and case.input.shape == case.target.shape:
            # Where beta underflows the dtype, torch's gradient at 0 is -1 or NaN; the right one is 0.
            assert (gradient[at_zero] == 0).all(), where
            _close(gradient[~at_zero], input.grad[~at_zero], where)
            continue
        is_sum = case.input.shape != case.target.shape
        _close(gradient, input.grad, where, is_sum=is_sum)
        if target.grad is not None:
            mirrored = -gradient.to(target.dtype) if result.target_gradient is None else result.target_gradient
            assert mirrored.dtype == target.dtype
            assert mirrored.shape == target.shape
            _close(mirrored, target.grad, where, is_sum=is_sum)


def _close(actual: torch.Tensor, expected: torch.Tensor, where: str, *, is_sum: bool = False) -> None:
    dtype = expected.dtype
    # A broadcast operand's gradient is a sum whose terms cancel; torch rounds each, so its error goes with their size.
    largest = float(expected.abs().max()) if is_sum and expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=_RELATIVE[dtype],
        atol=_ABSOLUTE[dtype] + _RELATIVE[dtype] * largest,
        equal_nan=True,
        msg=lambda text: f"{where}\n{text}",
    )
