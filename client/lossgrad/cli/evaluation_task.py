"""What an evaluation from the command line is, as a value that another process can be given; and how a part of it is run."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lossgrad.checkpoint import Checkpoint
from lossgrad.cli.connecting import connected
from lossgrad.cli.gradient_files import GradientFiles
from lossgrad.cli.outcome import UsageError
from lossgrad.client import LossClient
from lossgrad.errors import LossgradError
from lossgrad.files import Dataset, DatasetFiles, NanPolicy
from lossgrad.losses import Loss
from lossgrad.progress import OnProgress
from lossgrad.report import BatchResult, EvaluationReport

# How much each process has under way: what it holds of the files, and its messages, are about twice this.
_IN_FLIGHT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class EvaluationTask:
    """What is to be evaluated, how, and by whom. `options` are the command line's."""

    files: DatasetFiles
    nan_policy: NanPolicy
    losses: tuple[Loss, ...]
    gradient_out: str | None
    gradient_of: str
    per_batch: bool
    sync_gradients: bool
    slice_elements: int
    options: argparse.Namespace

    def open_data(self) -> Dataset:
        """Open the files. Raises FileError."""
        return Dataset(
            self.files,
            nan_policy=self.nan_policy,
            slice_elements=self.slice_elements,
            keep_orders=self.gradient_out is not None,
        )

    def gradient_files(self, data: Dataset) -> GradientFiles | None:
        """Return the files to write gradients to, not open yet; None where none are asked for."""
        return None if self.gradient_out is None else GradientFiles(self.gradient_out, self.losses, data)

    def with_gradients(self, data: Dataset) -> EvaluationTask:
        """Return the task with what gradients need, if they are asked for: what the mean over all elements divides by."""
        if self.gradient_out is None:
            return self
        if self.gradient_of == "sum":
            losses = [dataclasses.replace(loss, reduction="sum", gradient=True) for loss in self.losses]
            return dataclasses.replace(self, losses=tuple(losses))
        denominator = data.weight_sum()
        if not denominator > 0:
            raise UsageError(
                f"--gradient-out: the weights of all elements that take part add up to {denominator:g}, which the gradient "
                "of a mean cannot be divided by; give other weights, or --gradient-of sum"
            )
        losses = [dataclasses.replace(loss, gradient=True, denominator=denominator) for loss in self.losses]
        return dataclasses.replace(self, losses=tuple(losses))


class Part(Sequence[Any]):
    """Some consecutive slices of a data set."""

    def __init__(self, data: Dataset, indices: range) -> None:
        self._data = data
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._data[self._indices[index]]


def connect(task: EvaluationTask) -> Any:
    """Return a context that gives the client to evaluate with: of the first server, or of one in this process."""
    options = task.options
    return connected(options, options.target[0] if options.target else None)


def evaluate_part(
    client: LossClient,
    task: EvaluationTask,
    data: Dataset,
    indices: range,
    gradients: GradientFiles | None,
    *,
    patience: float | None,
    progress: bool | OnProgress = False,
    checkpoint: Checkpoint | None = None,
) -> EvaluationReport:
    """Evaluate some slices; `patience` is LossClient.evaluate's. Raises LossgradError, FileError, NanFound, UsageError."""
    on_batch: Callable[[BatchResult], None] | None = None
    if gradients is not None:
        files = gradients

        def write(batch: BatchResult) -> None:
            files.put(indices[batch.index], batch.gradients)
            if task.sync_gradients:  # before the checkpoint says that they are there
                files.flush()

        on_batch = write
    options = task.options
    try:
        return client.evaluate(
            Part(data, indices),
            task.losses,
            per_batch=task.per_batch,
            on_batch=on_batch,
            on_error="collect" if options.keep_going else "raise",
            progress=progress,
            checkpoint=checkpoint,
            endpoints=options.target if options.target and len(options.target) > 1 else None,
            in_flight_bytes=_IN_FLIGHT_BYTES,
            patience=patience,
        )
    except LossgradError as error:
        batch = re.match(r"batch (\d+): ", error.message)  # what nobody but the SDK counts
        if batch is not None:
            error.message = f"{place_of(data, indices[int(batch[1])])}: {error.message[batch.end() :]}"
            error.args = (error.message,)
        raise


def place_of(data: Dataset, index: int) -> str:
    """Return what errors call a slice."""
    piece = data.piece(index)
    return f"{data.shards[piece.shard].predictions.name}, elements {piece.start} to {piece.stop}"
