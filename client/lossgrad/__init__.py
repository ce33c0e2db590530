"""lossgrad: SmoothL1, Huber, L1 and MSE losses, and their gradients, from a lossgrad server.

with lossgrad.LossClient("localhost:50051") as client:
    result = client.smooth_l1(input, target, beta=0.5, gradient=True)
    result.loss, result.gradient, result.timing

`lossgrad.nn` (drop-in modules for torch) is imported at its first use, and torch with it. So is every other name: gRPC and
NumPy take half a second to import, which `lossgrad --help` and a process that only might compute need not wait for.

`lossgrad.keep_large_blocks()`, called once at the start of a program that sends tensors of some MiB, tells the C library
(glibc) to keep large blocks of memory for the next call instead of mapping them anew: calls of 8 MiB and more take up to a
third of the time. It changes the whole process: its memory stays at its highest mark, until
`lossgrad_api.allocator.release_free_memory()`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

# Not lazily: its module has its name, and whoever imported that first would take the function's place.
from lossgrad.embedded import embedded

if TYPE_CHECKING:
    from lossgrad import nn as nn
    from lossgrad import torchmetrics as torchmetrics
    from lossgrad.accumulation import Accumulation
    from lossgrad.aio import AsyncLossClient
    from lossgrad.checkpoint import Checkpoint
    from lossgrad.client import LossClient
    from lossgrad.errors import (
        Cancelled,
        DeadlineExceeded,
        InvalidRequest,
        LossgradError,
        Overloaded,
        RequestTooLarge,
        ServerError,
        TLSError,
        Unauthenticated,
        Unavailable,
    )
    from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1
    from lossgrad.metric import LossMetric
    from lossgrad.progress import Progress
    from lossgrad.report import BatchError, BatchResult, EvaluationReport, LossSummary, Throughput
    from lossgrad.results import LossResult, ServerInfo, ServerLimits, Timing
    from lossgrad.sweep import SweepResult
    from lossgrad_api.allocator import keep_large_blocks

    __version__: str

# Where each name comes from, imported at its first use.
_MODULES: Final = {
    "Accumulation": "lossgrad.accumulation",
    "AsyncLossClient": "lossgrad.aio",
    "Checkpoint": "lossgrad.checkpoint",
    "LossClient": "lossgrad.client",
    **dict.fromkeys(
        (
            "Cancelled",
            "DeadlineExceeded",
            "InvalidRequest",
            "LossgradError",
            "Overloaded",
            "RequestTooLarge",
            "ServerError",
            "TLSError",
            "Unauthenticated",
            "Unavailable",
        ),
        "lossgrad.errors",
    ),
    **dict.fromkeys(("L1", "MSE", "Huber", "Loss", "SmoothL1"), "lossgrad.losses"),
    "LossMetric": "lossgrad.metric",
    "Progress": "lossgrad.progress",
    **dict.fromkeys(("BatchError", "BatchResult", "EvaluationReport", "LossSummary", "Throughput"), "lossgrad.report"),
    **dict.fromkeys(("LossResult", "ServerInfo", "ServerLimits", "Timing"), "lossgrad.results"),
    "SweepResult": "lossgrad.sweep",
    "keep_large_blocks": "lossgrad_api.allocator",
}

__all__ = [
    "L1",
    "MSE",
    "Accumulation",
    "AsyncLossClient",
    "BatchError",
    "BatchResult",
    "Cancelled",
    "Checkpoint",
    "DeadlineExceeded",
    "EvaluationReport",
    "Huber",
    "InvalidRequest",
    "Loss",
    "LossClient",
    "LossMetric",
    "LossResult",
    "LossSummary",
    "LossgradError",
    "Overloaded",
    "Progress",
    "RequestTooLarge",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "SmoothL1",
    "SweepResult",
    "TLSError",
    "Throughput",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "__version__",
    "embedded",
    "keep_large_blocks",
]


def __getattr__(name: str) -> Any:
    """Import the name that is used for the first time."""
    if name == "__version__":
        value = _version()
    elif name == "nn":
        return _module("nn", "torch", "lossgrad[torch]")
    elif name == "torchmetrics":
        return _module("torchmetrics", "torchmetrics", "torchmetrics")
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'lossgrad' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nn", "torchmetrics"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lossgrad")
    except PackageNotFoundError:  # the source tree, not installed
        return "0+unknown"


def _module(name: str, needed: str, distribution: str) -> Any:
    try:
        return importlib.import_module(f"lossgrad.{name}")
    except ModuleNotFoundError as error:
        if error.name != needed:
            raise
        raise ModuleNotFoundError(
            f"lossgrad.{name} needs {needed}, which is not installed: pip install '{distribution}'", name=needed
        ) from error
