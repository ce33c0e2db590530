"""Losses as values: what they take, what they refuse, what they become on the wire."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lossgrad import L1, MSE, Huber, InvalidRequest, Loss, SmoothL1
from lossgrad_api.v1 import loss_service_pb2 as pb


def parsed(loss: Loss) -> pb.LossSpec:
    return pb.LossSpec.FromString(loss.serialized)


def test_each_loss_says_its_function_and_parameter() -> None:
    assert parsed(SmoothL1(0.25)) == pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.25), reduction=pb.REDUCTION_MEAN)
    assert parsed(Huber(2)) == pb.LossSpec(huber=pb.HuberLoss(delta=2.0), reduction=pb.REDUCTION_MEAN)
    assert parsed(L1()) == pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_MEAN)
    assert parsed(MSE()) == pb.LossSpec(mse=pb.MseLoss(), reduction=pb.REDUCTION_MEAN)
    assert parsed(SmoothL1()).smooth_l1.beta == 1.0
    assert parsed(Huber()).huber.delta == 1.0


def test_options_travel_and_what_is_left_out_stays_unset() -> None:
    spec = parsed(MSE(reduction="sample_mean", gradient=True, denominator=8, gradient_scale=-0.5))
    assert spec.reduction == pb.REDUCTION_SAMPLE_MEAN
    assert spec.include_gradient
    assert spec.denominator == 8.0
    assert spec.gradient_scale == -0.5
    assert not parsed(MSE()).HasField("denominator")
    assert not parsed(MSE()).HasField("gradient_scale")


@pytest.mark.parametrize(
    ("reduction", "number"),
    [
        ("none", pb.REDUCTION_NONE),
        ("mean", pb.REDUCTION_MEAN),
        ("sum", pb.REDUCTION_SUM),
        ("sample_mean", pb.REDUCTION_SAMPLE_MEAN),
        ("sample_sum", pb.REDUCTION_SAMPLE_SUM),
    ],
)
def test_every_reduction_has_its_number(reduction: str, number: int) -> None:
    assert parsed(L1(reduction=reduction)).reduction == number


@pytest.mark.parametrize("beta", [0, -0.0, 1e-50, 1e39, math.inf, True, np.float32(0.5), torch.tensor(0.5)])
def test_every_beta_that_torch_takes_is_taken(beta: Any) -> None:
    loss = SmoothL1(beta)
    assert type(loss.beta) is float
    assert parsed(loss).smooth_l1.beta == float(beta)


@pytest.mark.parametrize(
    ("make", "field", "says"),
    [
        (lambda: SmoothL1(-0.5), "beta", "beta is -0.5; it must be at least 0"),
        (lambda: SmoothL1(math.nan), "beta", "beta is nan; it must be at least 0"),
        (lambda: SmoothL1(-math.inf), "beta", "beta is -inf"),
        (lambda: SmoothL1("0.5"), "beta", r"beta is '0.5' \(str\); it must be a number"),  # type: ignore[arg-type]
        (lambda: SmoothL1(None), "beta", r"beta is None \(NoneType\)"),  # type: ignore[arg-type]
        (lambda: SmoothL1(1j), "beta", "beta is 1j"),  # type: ignore[arg-type]
        (lambda: SmoothL1(10**400), "beta", "it must be a number"),
        (lambda: Huber(0), "delta", "delta is 0.0; it must be above 0"),
        (lambda: Huber(-1), "delta", "delta is -1.0; it must be above 0"),
        (lambda: Huber(math.nan), "delta", "delta is nan; it must be above 0"),
        (
            lambda: L1(reduction="batchmean"),
            "reduction",
            "reduction is 'batchmean'; it must be one of 'none', 'mean', 'sum'",
        ),
        (lambda: L1(reduction=None), "reduction", "reduction is None"),  # type: ignore[arg-type]
        (lambda: L1(reduction=["mean"]), "reduction", "must be one of"),  # type: ignore[arg-type]
        (lambda: L1(denominator=0), "denominator", "denominator is 0.0; it must be finite and above 0"),
        (lambda: L1(denominator=math.inf), "denominator", "denominator is inf"),
        (lambda: L1(denominator=2, reduction="sum"), "denominator", "reduction='sum', which divides by nothing"),
        (lambda: L1(gradient_scale=math.nan), "gradient_scale", "gradient_scale is nan; it must be finite"),
    ],
)
def test_what_no_server_takes_is_refused_at_once_with_the_range(
    make: Callable[[], Loss], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as raised:
        make()
    assert isinstance(raised.value, ValueError)
    assert raised.value.field == field
    assert raised.value.reason == "BAD_PARAMETER"


def test_torchs_old_name_of_the_mean_warns_in_torchs_words() -> None:
    with pytest.warns(UserWarning, match="deprecated") as ours:
        loss = L1(reduction="elementwise_mean")
    with pytest.warns(UserWarning, match="deprecated") as theirs:
        torch.nn.L1Loss(reduction="elementwise_mean")(torch.ones(1), torch.ones(1))
    assert str(ours[0].message) == str(theirs[0].message)
    assert ours[0].filename == __file__
    assert loss == L1()


def test_losses_are_frozen_values() -> None:
    assert SmoothL1(1) == SmoothL1(beta=1.0)
    assert SmoothL1(1) != SmoothL1(1, gradient=True)
    assert len({SmoothL1(1), Huber(1)}) == 2
    assert len({L1(), L1(), MSE()}) == 2
    with pytest.raises(AttributeError):
        L1().reduction = "sum"  # type: ignore[misc]
    loss = SmoothL1(0.5, gradient=True)
    assert copy.deepcopy(loss) == pickle.loads(pickle.dumps(loss)) == loss  # noqa: S301
    with pytest.raises(TypeError, match="abstract"):
        Loss()  # type: ignore[abstract]


def test_repr_names_the_parameter_and_what_is_not_the_default() -> None:
    assert repr(SmoothL1()) == "SmoothL1(beta=1.0)"
    assert repr(L1(reduction="sum", gradient=True)) == "L1(reduction='sum', gradient=True)"
