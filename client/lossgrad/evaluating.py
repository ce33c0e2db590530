"""`evaluate` and `sweep` as methods, for both clients: their arguments and documentation. What they do: evaluation.py."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from lossgrad.calls import Losses
from lossgrad.checkpoint import Checkpoint
from lossgrad.losses import SmoothL1
from lossgrad.progress import OnProgress
from lossgrad.report import BatchResult, EvaluationReport

# Where something is in a batch: a key, an index, or a function of the batch.
Selector = str | int | Callable[[Any], Any]

_SMOOTH_L1: Final = SmoothL1()
DEFAULT_IN_FLIGHT_BYTES: Final = 64 * 1024 * 1024
DEFAULT_SLICE_BYTES: Final = 4 * 1024 * 1024
DEFAULT_PATIENCE_SECONDS: Final = 60.0


class EvaluateMethods:
    """What LossClient has for whole data sets."""

    def evaluate(
        self,
        batches: Iterable[Any],
        losses: Losses = _SMOOTH_L1,
        *,
        input: Selector | None = None,
        target: Selector | None = None,
        weight: Selector | None = None,
        mask: Selector | None = None,
        group: Selector | None = None,
        allow_broadcast: bool = False,
        element_count: int | None = None,
        per_batch: bool = False,
        on_batch: Callable[[BatchResult], None] | None = None,
        on_error: Literal["raise", "collect"] = "raise",
        progress: bool | OnProgress = False,
        checkpoint: str | Path | Checkpoint | None = None,
        endpoints: Sequence[str] | None = None,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        timeout: float | None = None,
        patience: float = DEFAULT_PATIENCE_SECONDS,
    ) -> EvaluationReport:
        """Compute losses over a whole data set, exactly, and return the report. docs/evaluation.md has the long version.

        A batch is (input, target), (input, target, {"weight": ..., "mask": ..., "group": ...}), or a mapping with these
        names as keys; `input`, `target`, `weight`, `mask` and `group` say where else they are, each as a key, an index
        or a function of the batch. A group is a text or number for the batch, or one for each of its rows. Losses have
        reduction "mean" or "sum"; those with gradient=True give each batch's gradient to `on_batch`, for which a mean
        needs `element_count` or its own denominator.

        `batches` is read in the caller's thread, about `in_flight_bytes` ahead; batches above `slice_bytes` are cut.
        `endpoints` are gRPC targets to share the work among, in the place of the client's own. A connection from which
        nothing comes for `timeout` seconds (the client's timeout) counts as broken; what is unanswered is sent again,
        until nothing has worked for `patience` seconds. With on_error="collect" a batch that cannot be evaluated is left
        out and listed in the report. `checkpoint` is a file to write now and then, and to go on from.
        Raises LossgradError; what the callables raise passes through.
        """
        raise NotImplementedError


class AsyncEvaluateMethods:
    """What AsyncLossClient has for whole data sets."""

    async def evaluate(
        self,
        batches: Iterable[Any] | AsyncIterable[Any],
        losses: Losses = _SMOOTH_L1,
        *,
        input: Selector | None = None,
        target: Selector | None = None,
        weight: Selector | None = None,
        mask: Selector | None = None,
        group: Selector | None = None,
        allow_broadcast: bool = False,
        element_count: int | None = None,
        per_batch: bool = False,
        on_batch: Callable[[BatchResult], None] | None = None,
        on_error: Literal["raise", "collect"] = "raise",
        progress: bool | OnProgress = False,
        checkpoint: str | Path | Checkpoint | None = None,
        endpoints: Sequence[str] | None = None,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        timeout: float | None = None,
        patience: float = DEFAULT_PATIENCE_SECONDS,
    ) -> EvaluationReport:
        """Compute losses over a whole data set, as LossClient.evaluate. `batches` may be an async iterable."""
        raise NotImplementedError
