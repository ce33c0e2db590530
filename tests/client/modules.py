"""What the tests of lossgrad.nn share: modules and shapes to try, pairs of ours and torch's, tensors, closeness."""

from __future__ import annotations

from typing import Any

import torch

from lossgrad import LossClient
from lossgrad import nn as served

MODULES: list[tuple[str, dict[str, float]]] = [
    ("SmoothL1Loss", {"beta": 0.7}),
    ("SmoothL1Loss", {"beta": 0.0}),
    ("SmoothL1Loss", {"beta": 2}),
    ("SmoothL1Loss", {"beta": float("inf")}),
    ("HuberLoss", {"delta": 0.7}),
    ("L1Loss", {}),
    ("MSELoss", {}),
]
REDUCTIONS = ["none", "mean", "sum"]
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((5,), (5,)),
    ((2, 3), (2, 3)),
    ((0,), (0,)),
    ((2, 0), (2, 0)),
    ((2, 3), (3,)),
    ((3,), (2, 3)),
    ((4, 1), (1, 3)),
    ((2, 3), ()),
    ((0,), (1,)),
    ((1,), (0,)),
]
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-12}


def both(client: LossClient, name: str, *arguments: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return our module and torch's."""
    return (
        getattr(served, name)(*arguments, client=client, **options),
        getattr(torch.nn, name)(*arguments, **options),
    )


def tensors(
    shapes: tuple[tuple[int, ...], ...], *dtypes: torch.dtype, grad: bool = True, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        made.append(tensor.requires_grad_(grad and dtype.is_floating_point))
    return made


def close(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
