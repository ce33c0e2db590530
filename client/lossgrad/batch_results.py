"""The gradients of a batch, put together from its parts: lists where it has lists, rows back in their places."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lossgrad.losses import Loss
from lossgrad.slicing import PartResult

Gradients = tuple[Any, ...]


def gradients_of(
    results: Sequence[PartResult], losses: Sequence[Loss], *, has_lists: bool
) -> tuple[Gradients, Gradients]:
    """Return the gradients with respect to input and to target, one for each loss; both empty where none is asked for."""
    if not any(loss.gradient for loss in losses):
        return (), ()
    by_loss = [[result.gradient(index) for result in results] for index in range(len(losses))]
    by_loss_target = [[result.target_gradient(index) for result in results] for index in range(len(losses))]
    rows = [result.part.rows for result in results]
    return (
        tuple(_together(each, rows, has_lists=has_lists) for each in by_loss),
        tuple(_together(each, rows, has_lists=has_lists) for each in by_loss_target),
    )


def _together(gradients: list[Any], rows: Sequence[Any], *, has_lists: bool) -> Any:
    if all(each is None for each in gradients):
        return None
    if has_lists:
        return gradients
    if rows[0] is None:
        return gradients[0]
    shape = (sum(len(each) for each in rows), *gradients[0].shape[1:])
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(gradients[0], torch.Tensor):
        whole = gradients[0].new_empty(shape)
        for gradient, places in zip(gradients, rows, strict=True):
            whole[torch.as_tensor(places, device=whole.device)] = gradient
        return whole
    whole = np.empty(shape, gradients[0].dtype)
    for gradient, places in zip(gradients, rows, strict=True):
        whole[places] = gradient
    return whole
