"""lossgrad: SmoothL1, Huber, L1 and MSE losses, and their gradients, from a lossgrad server.

with lossgrad.LossClient("localhost:50051") as client:
    result = client.smooth_l1(input, target, beta=0.5, gradient=True)
    result.loss, result.gradient, result.timing

`lossgrad.nn` (drop-in modules for torch) is imported at its first use, and torch with it.

`lossgrad.keep_large_blocks()`, called once at the start of a program that sends tensors of some MiB, tells the C library
(glibc) to keep large blocks of memory for the next call instead of mapping them anew: calls of 8 MiB and more take up to a
third of the time. It changes the whole process: its memory stays at its highest mark, until
`lossgrad_api.allocator.release_free_memory()`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lossgrad.accumulation import Accumulation
from lossgrad.aio import AsyncLossClient
from lossgrad.checkpoint import Checkpoint
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
from lossgrad.metric import LossMetric
from lossgrad.progress import Progress
from lossgrad.report import BatchError, BatchResult, EvaluationReport, LossSummary, Throughput
from lossgrad.results import LossResult, ServerInfo, ServerLimits, Timing
from lossgrad.sweep import SweepResult

if TYPE_CHECKING:
    from lossgrad import nn as nn
    from lossgrad_api.allocator import keep_large_blocks as keep_large_blocks

try:
    __version__ = version("lossgrad")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

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
    "Throughput",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "__version__",
    "embedded",
    "keep_large_blocks",
]


def __getattr__(name: str) -> Any:
    if name == "keep_large_blocks":
        from lossgrad_api.allocator import keep_large_blocks

        return keep_large_blocks
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
