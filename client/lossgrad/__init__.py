"""lossgrad: SmoothL1, Huber, L1 and MSE losses, and their gradients, from a lossgrad server.

with lossgrad.LossClient("localhost:50051") as client:
    result = client.smooth_l1(input, target, beta=0.5, gradient=True)
    result.loss, result.gradient, result.timing

`lossgrad.nn` (drop-in modules for torch) is imported at its first use, and torch with it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from lossgrad.aio import AsyncLossClient
from lossgrad.client import LossClient
from lossgrad.embedded import embedded
from lossgrad.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LossgradError,
    Overloaded,
    RequestTooLarge,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1
from lossgrad.results import LossResult, ServerInfo, ServerLimits, Timing

if TYPE_CHECKING:
    from lossgrad import nn as nn

try:
    __version__ = version("lossgrad")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

__all__ = [
    "L1",
    "MSE",
    "AsyncLossClient",
    "Cancelled",
    "DeadlineExceeded",
    "Huber",
    "InvalidRequest",
    "Loss",
    "LossClient",
    "LossResult",
    "LossgradError",
    "Overloaded",
    "RequestTooLarge",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "SmoothL1",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "__version__",
    "embedded",
]


def __getattr__(name: str) -> ModuleType:
    if name == "nn":
        try:
            return importlib.import_module("lossgrad.nn")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                "lossgrad.nn needs torch, which is not installed: pip install 'lossgrad[torch]'", name="torch"
            ) from error
    raise AttributeError(f"module 'lossgrad' has no attribute {name!r}")
