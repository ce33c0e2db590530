"""Evaluates real predictions remotely: several losses in one round trip for each batch, beside torch's local values."""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split

import lossgrad

BATCH_SIZE: Final = 32
# Both sides round to float32 once at the end, and torch also rounds on the way: it sums a batch in float32.
TOLERANCE_ULP: Final = 4.0
# Over a whole data set: lossgrad forms the differences in float32 (half an ulp each, 6e-8), torch here all in float64.
TOLERANCE_RELATIVE: Final = 2e-7


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for data that it has not seen, and what was true; both float32, of one shape."""

    title: str
    prediction: torch.Tensor
    target: torch.Tensor
    specs: list[lossgrad.Loss]

    @property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The predictions and targets in pieces of BATCH_SIZE samples."""
        return list(zip(self.prediction.split(BATCH_SIZE), self.target.split(BATCH_SIZE), strict=True))


@dataclass(frozen=True)
class Row:
    """One loss over a whole data set: the server's value, torch's, and how far they are apart."""

    spec: lossgrad.Loss
    remote: float
    local: float
    worst_batch_ulp: float

    @property
    def relative_difference(self) -> float:
        """The difference over the data set, relative to torch's float64 value."""
        return abs(self.remote - self.local) / abs(self.local)

    @property
    def agrees(self) -> bool:
        """Whether both differences are within their tolerances."""
        return self.worst_batch_ulp <= TOLERANCE_ULP and self.relative_difference <= TOLERANCE_RELATIVE


def diabetes() -> Predictions:
    """Predict how far diabetes has progressed after a year, with gradient boosting: one number for each patient."""
    train_x, test_x, train_y, test_y = train_test_split(*load_diabetes(return_X_y=True), test_size=0.3, random_state=0)
    model = HistGradientBoostingRegressor(max_iter=60, random_state=0).fit(train_x, train_y)
    return Predictions(
        f"diabetes: disease progression of {len(test_y)} patients, gradient boosting",
        torch.tensor(model.predict(test_x), dtype=torch.float32),
        torch.tensor(test_y, dtype=torch.float32),
        _specs(betas=(1.0, 10.0, 100.0), delta=50.0),
    )


def digits() -> Predictions:
    """Predict the lower half of handwritten digits from the upper half, with ridge regression: 32 pixels each."""
    pixels = load_digits().data
    train, test = train_test_split(pixels, test_size=0.5, random_state=0)
    model = Ridge().fit(train[:, :32], train[:, 32:])
    return Predictions(
        f"digits: lower half of {len(test)} handwritten digits from the upper, ridge regression",
        torch.tensor(model.predict(test[:, :32]), dtype=torch.float32),
        torch.tensor(test[:, 32:], dtype=torch.float32),
        _specs(betas=(0.1, 1.0, 5.0), delta=2.0),
    )


def _specs(betas: tuple[float, ...], delta: float) -> list[lossgrad.Loss]:
    return [
        *(lossgrad.SmoothL1(beta=beta) for beta in betas),
        lossgrad.Huber(delta=delta),
        lossgrad.L1(),
        lossgrad.MSE(),
    ]


def evaluate(client: lossgrad.LossClient, data: Predictions) -> list[Row]:
    """Send the batches, one request each with all losses, and hold every answer against torch."""
    totals: list[list[float]] = [[] for _ in data.specs]
    worst = [0.0] * len(data.specs)
    for prediction, target in data.batches:
        for index, result in enumerate(client.compute(prediction, target, data.specs)):
            expected = torch_loss(data.specs[index], prediction, target)
            assert result.value is not None
            difference = ulps(result.loss, expected)
            worst[index] = math.nan if math.isnan(difference) else max(worst[index], difference)
            totals[index].append(result.value * result.element_count)
    return [
        Row(
            spec=spec,
            remote=math.fsum(totals[index]) / data.target.numel(),
            local=torch_loss(spec, data.prediction.double(), data.target.double()).item(),
            worst_batch_ulp=worst[index],
        )
        for index, spec in enumerate(data.specs)
    ]


def disagreements(data: Predictions, rows: list[Row]) -> list[str]:
    """Return a line for each loss that is not torch's within the tolerances."""
    return [
        f"{data.title}: {row.spec} is {row.remote!r}, torch computes {row.local!r}; at worst {row.worst_batch_ulp:.1f} ulp "
        f"in a batch (allowed {TOLERANCE_ULP:g}), {row.relative_difference:.1e} over all (allowed {TOLERANCE_RELATIVE:.0e})"
        for row in rows
        if not row.agrees
    ]


def torch_loss(spec: lossgrad.Loss, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what torch computes here for the same loss."""
    match spec:
        case lossgrad.SmoothL1():
            return F.smooth_l1_loss(prediction, target, beta=spec.beta)
        case lossgrad.Huber():
            return F.huber_loss(prediction, target, delta=spec.delta)
        case lossgrad.L1():
            return F.l1_loss(prediction, target)
        case lossgrad.MSE():
            return F.mse_loss(prediction, target)
    raise TypeError(f"no torch counterpart of {spec}")


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how many representable numbers of their type lie between two scalars, one of which may be the other."""
    spacing = torch.nextafter(expected.abs(), torch.full_like(expected, math.inf)) - expected.abs()
    return ((actual - expected).abs() / spacing).item()
