"""The warnings and errors of lossgrad.nn, which are torch's own, word for word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lossgrad import LossClient
from lossgrad import nn as served
from tests.client.modules import both, tensors


def recorded(call: Callable[[], Any]) -> tuple[list[tuple[type, str]], tuple[type, str] | None]:
    """Return the warnings of a call, and the error that it raised."""
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as raised:
            error = (type(raised), str(raised))
    return [(warning.category, str(warning.message)) for warning in caught], error


X, Y = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "inputs"),
    [
        # Deprecated arguments: any of them overrides reduction, None counts as True.
        *[("SmoothL1Loss", pair, {}, (X, Y)) for pair in ((True, None), (None, False), (False, True), (False, False))],
        ("L1Loss", (), {"reduce": False, "reduction": "nonsense"}, (X, Y)),
        ("MSELoss", (), {"size_average": False, "reduction": "none"}, (X, Y)),
        ("MSELoss", (None, None, "sum"), {}, (X, Y)),
        # Reductions.
        ("SmoothL1Loss", (), {"reduction": "elementwise_mean"}, (X, Y)),
        ("HuberLoss", (), {"reduction": "elementwise_mean"}, (X, Y)),
        *[("L1Loss", (), {"reduction": reduction}, (X, Y)) for reduction in ("batchmean", "", None, "Mean", 1)],
        # beta and delta.
        *[
            ("SmoothL1Loss", (), {"beta": beta}, (X, Y))
            for beta in (
                -1.0,
                -float("inf"),
                float("nan"),
                "1",
                None,
                1j,
                True,
                False,
                torch.tensor(0.5),
                np.float64(0.5),
                0,
            )
        ],
        *[
            ("HuberLoss", (), {"delta": delta}, (X, Y))
            for delta in (0, -1.0, float("nan"), float("-inf"), "1", None, 1j, torch.tensor(1.0), True, np.float64(0.5))
        ],
        ("HuberLoss", ("sum", 0.5), {}, (X, Y)),
        # Shapes.
        ("SmoothL1Loss", (), {}, (X, Y[:1])),
        ("HuberLoss", (), {}, (X, Y[0])),
        ("L1Loss", (), {}, (X, torch.zeros(4))),
        ("MSELoss", (), {"reduction": "nonsense"}, (X, torch.zeros(4))),
        ("MSELoss", (), {"reduction": "nonsense"}, (X, Y[0])),
        # Types.
        *[
            (name, (), {}, (X.to(dtype), Y.to(dtype)))
            for name in ("SmoothL1Loss", "HuberLoss", "MSELoss")
            for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint16)
        ],
        # What is no tensor.
        ("SmoothL1Loss", (), {}, (X, np.zeros((2, 3)))),
        ("SmoothL1Loss", (), {}, (X, 1.0)),
        ("L1Loss", (), {}, (np.zeros((2, 3)), X)),
        ("MSELoss", (), {}, (X,)),
    ],
)
def test_warnings_and_errors_are_torchs(
    client: LossClient, name: str, arguments: tuple[Any, ...], options: dict[str, Any], inputs: tuple[Any, ...]
) -> None:
    ours = recorded(lambda: getattr(served, name)(*arguments, client=client, **options)(*inputs))
    theirs = recorded(lambda: getattr(torch.nn, name)(*arguments, **options)(*inputs))
    if theirs[1] is not None and "forward()" in theirs[1][1]:
        assert ours[1] is not None
        assert ours[1] == theirs[1]
        return
    assert ours == theirs


def test_legacy_arguments_and_odd_betas_compute_what_torch_computes(client: LossClient) -> None:
    x, y = tensors(((4,), (4,)), torch.float32, torch.float32)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("SmoothL1Loss", {"size_average": False}),
        ("L1Loss", {"reduce": False}),
        ("MSELoss", {"reduction": "elementwise_mean"}),
        ("SmoothL1Loss", {"beta": torch.tensor(0.25)}),
        ("SmoothL1Loss", {"beta": False}),
        ("HuberLoss", {"delta": True}),
    ]
    for name, options in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = both(client, name, **options)
            torch.testing.assert_close(ours(x, y), theirs(x, y))
