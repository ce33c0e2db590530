"""Trains one small network twice: with gradients that come from the server only, and with torch's own loss."""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from sklearn.datasets import load_digits

EPOCHS: Final = 24
BATCH_SIZE: Final = 256
BETA: Final = 0.1
# The two gradients differ in their last bit at most; Adam carries such differences on from step to step.
TOLERANCE_RELATIVE: Final = 1e-4

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Training:
    """The mean training loss of each epoch, and how many steps it took to get there."""

    losses: list[float]
    steps: int


def train(criterion: Criterion, on_epoch: Callable[[], None] = lambda: None) -> Training:
    """Fit the lower halves of handwritten digits to the upper halves; everything but the criterion is fixed."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    upper, lower = pixels[:1500, :32], pixels[:1500, 32:]

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, steps = [], 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(upper))
        weighted = 0.0
        for batch in order.split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = criterion(model(upper[batch]), lower[batch])
            loss.backward()
            optimizer.step()
            weighted += loss.item() * len(batch)
            steps += 1
        losses.append(weighted / len(order))
        on_epoch()
    return Training(losses, steps)


def local_criterion() -> Criterion:
    """Return torch's own loss, for the training to compare with."""
    return torch.nn.SmoothL1Loss(beta=BETA)


def disagreements(remote: Training, local: Training) -> list[str]:
    """Return a line for each way in which the two trainings differ, or in which the loss did not fall."""
    wrong = []
    difference = largest_difference(remote, local)
    if not difference <= TOLERANCE_RELATIVE:  # also where it is NaN
        wrong.append(f"training: losses differ by {difference:.1e} relative (allowed {TOLERANCE_RELATIVE:.0e})")
    if not remote.losses[-1] < 0.5 * remote.losses[0]:
        wrong.append(f"training: the loss went from {remote.losses[0]:.4f} to {remote.losses[-1]:.4f}; it should halve")
    return wrong


def largest_difference(first: Training, second: Training) -> float:
    """Return the largest relative difference between two trainings' losses, epoch by epoch."""
    differences = [abs(a - b) / b for a, b in zip(first.losses, second.losses, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)
