"""Evaluate a torch model over a DataLoader, end to end: one call, exact totals by group, and a table to look at.

Run it beside a server: `lossgrad-server &`, then `python examples/evaluate_model.py`. Needs torch and scikit-learn.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lossgrad

TRAINED = 1200  # of 1797 pictures; the rest are for evaluation


class Halves(Dataset[dict[str, Any]]):
    """Pictures of handwritten digits, 8 x 8: the upper half is given, the lower is asked for."""

    def __init__(self, rows: slice) -> None:
        digits = load_digits()
        self.pixels = torch.tensor(digits.data[rows], dtype=torch.float32) / 16
        self.digits = digits.target[rows].tolist()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[index]
        return {"upper": pixels[:32], "lower": pixels[32:], "digit": self.digits[index]}


def trained_model() -> nn.Module:
    """Return a small network that completes digits, trained for a second or two."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # it is far too small for more
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data = Halves(slice(0, TRAINED))
    upper, lower = data.pixels[:, :32], data.pixels[:, 32:]
    for _ in range(15):
        for rows in torch.randperm(TRAINED).split(64):
            optimizer.zero_grad()
            nn.functional.smooth_l1_loss(model(upper[rows]), lower[rows], beta=0.1).backward()
            optimizer.step()
    return model.eval()


def evaluate(client: lossgrad.LossClient, model: nn.Module) -> lossgrad.EvaluationReport:
    """Return the losses over the pictures that the model has not seen, by digit and batch by batch."""
    loader = DataLoader(Halves(slice(TRAINED, None)), batch_size=64)
    with torch.inference_mode():
        return client.evaluate(
            loader,
            [lossgrad.SmoothL1(beta=0.1), lossgrad.MSE()],
            input=lambda batch: model(batch["upper"]),  # runs while the server is at the batches before
            target="lower",
            group="digit",  # one for each row
            per_batch=True,
        )


def main() -> None:
    """Train, evaluate, print the report and what is worst."""
    with lossgrad.LossClient() as client:
        report = evaluate(client, trained_model())
    print(report)
    worst = max(report.groups, key=lambda digit: report.groups[digit][0].mean)
    print(f"hardest digit: {worst}")


if __name__ == "__main__":
    main()
