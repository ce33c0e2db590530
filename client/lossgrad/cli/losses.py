"""Losses as the command line writes and shows them: `smooth_l1:beta=0.5`, `smooth_l1(beta=0.5)`."""

from __future__ import annotations

import math
from typing import Any, Final

from lossgrad.cli.arguments import LOSS_EXAMPLE
from lossgrad.cli.outcome import UsageError
from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1

_LOSSES: Final[dict[str, type[Loss]]] = {loss.name: loss for loss in (SmoothL1, Huber, L1, MSE)}
_PARAMETERS: Final = {"smooth_l1": "beta", "huber": "delta"}


def read_loss(text: str, *, reduction: str = "mean", gradient: bool = False) -> Loss:
    """Return the loss that `name` or `name:parameter=value` stands for. Raises UsageError or InvalidRequest."""
    name, separator, setting = text.partition(":")
    function = _LOSSES.get(name)
    if function is None:
        raise UsageError(f"--loss {text!r} names no loss; give one {LOSS_EXAMPLE}")
    keywords: dict[str, Any] = {"reduction": reduction, "gradient": gradient}
    if separator:
        parameter, _, value = setting.partition("=")
        if parameter != _PARAMETERS.get(name):
            takes = f"takes only {_PARAMETERS[name]}=" if name in _PARAMETERS else "takes no parameter"
            raise UsageError(f"--loss {text!r}: {name} {takes}; give one {LOSS_EXAMPLE}")
        try:
            keywords[parameter] = float(value)
        except ValueError:
            raise UsageError(f"--loss {text!r}: {value!r} is not a number; give one {LOSS_EXAMPLE}") from None
    return function(**keywords)


def label_of(loss: Loss) -> str:
    """Return a loss as output names it: `smooth_l1(beta=0.5)`."""
    name = _PARAMETERS.get(loss.name)
    return loss.name if name is None else f"{loss.name}({name}={getattr(loss, name):g})"


def parameter_of(loss: Loss) -> dict[str, float | str]:
    """Return a loss' own parameter, as JSON has it."""
    name = _PARAMETERS.get(loss.name)
    return {} if name is None else {name: json_number(getattr(loss, name))}


def json_number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
