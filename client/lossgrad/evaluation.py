"""An evaluation without its I/O: batches become slices to send, their outcomes totals by group, and those the report.

A batch counts when every slice of it is answered, and then at once: with all of them, or, where one fails, not at all. So
what is counted is always a set of whole batches, which is what a checkpoint holds. Everything here runs in the thread or
task that calls `evaluate`.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from lossgrad.accumulation import Accumulation, summary_of
from lossgrad.batch_results import gradients_of
from lossgrad.batches import BatchReader, Selector
from lossgrad.calls import Losses, as_losses
from lossgrad.checkpoint import Checkpoint, CheckpointFile, DoneBatches
from lossgrad.errors import InvalidRequest, LossgradError
from lossgrad.losses import Loss
from lossgrad.progress import OnProgress, Progress, ProgressLine
from lossgrad.report import BatchError, BatchResult, EvaluationReport, EvaluationServer, Throughput
from lossgrad.slice_window import Outcome, SliceRequest
from lossgrad.slicing import EncodedSlice, PartResult, Slicer
from lossgrad_api.accumulation import check_group_name
from lossgrad_api.loss_totals import LossTotal, StateError

OnError = Literal["raise", "collect"]

_PROGRESS_SECONDS: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What `evaluate` is told, connections apart; its docstring says what each is."""

    input: Selector | None = None
    target: Selector | None = None
    weight: Selector | None = None
    mask: Selector | None = None
    group: Selector | None = None
    allow_broadcast: bool = False
    element_count: int | None = None
    per_batch: bool = False
    on_batch: Callable[[BatchResult], None] | None = None
    on_error: OnError = "raise"
    progress: bool | OnProgress = False
    checkpoint: str | Path | Checkpoint | None = None
    slice_bytes: int = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "collect"):
            raise ValueError(f"on_error is {self.on_error!r}; it must be 'raise' or 'collect'")
        if self.slice_bytes < 1:
            raise ValueError(f"slice_bytes is {self.slice_bytes}; it must be at least 1")
        if self.element_count is not None and self.element_count < 0:
            raise ValueError(f"element_count is {self.element_count}; it must be at least 0")


@dataclass(slots=True, eq=False)
class _Entry:
    """A batch of which something is unanswered, or unsent."""

    index: int
    results: list[PartResult] = field(default_factory=list)
    unanswered: int = 0
    byte_count: int = 0
    slice_count: int = 0
    is_sent: bool = False
    has_lists: bool = False
    error: LossgradError | None = None


class Evaluation:
    """One run of `evaluate`. `losses` are checked here: raises InvalidRequest."""

    def __init__(self, losses: Losses, options: EvaluationOptions) -> None:
        self.losses, _ = as_losses(losses)
        self._reported_losses = Accumulation(self.losses).losses
        _check_losses(self.losses, options)
        self._options = options
        self._reader = BatchReader(
            input=options.input,
            target=options.target,
            weight=options.weight,
            mask=options.mask,
            group=options.group,
        )
        self._slicer: Slicer | None = None
        self._groups: dict[str, Sequence[LossTotal]] = {}
        self._element_count = 0
        self._done = DoneBatches()
        self._is_counting = False
        self._batches: list[BatchResult] = []
        self._errors: list[BatchError] = []
        self._servers: tuple[EvaluationServer, ...] = ()
        self._resumed_batch_count = 0
        self._run = _Counts()
        self._start = time.perf_counter()
        self._keeps_results = options.per_batch or options.on_batch is not None
        on_progress = options.progress
        self._on_progress: OnProgress | None = (
            ProgressLine() if on_progress is True else on_progress if callable(on_progress) else None
        )
        self._next_progress_at = 0.0
        self._total_batches: int | None = None
        self._file = self._open_checkpoint()

    # --- before ---

    def connect(self, servers: Sequence[EvaluationServer], max_message_bytes: int) -> None:
        """Take note of the servers, and of the largest message that all of them take. To be called before `slices`."""
        self._servers = tuple(servers)
        self._slicer = Slicer(
            self.losses,
            denominator=self._options.element_count or None,
            allow_broadcast=self._options.allow_broadcast,
            slice_bytes=self._options.slice_bytes,
            max_message_bytes=max_message_bytes,
        )

    def expect(self, batch_count: int | None) -> None:
        """Take note of how many batches there will be, if anybody knows."""
        self._total_batches = batch_count

    def is_done(self, index: int) -> bool:
        """Whether a batch was done before, in the run that a checkpoint is of."""
        return index in self._done

    # --- batches in, outcomes in ---

    def slices(self, index: int, batch: Any) -> Iterator[SliceRequest]:
        """Give a batch's slices, to be sent in any order; each is made when it is asked for.

        Raises the error of a batch that cannot be sent, unless errors are collected; and what the selectors raise.
        """
        assert self._slicer is not None  # noqa: S101 - connect() comes first
        entry = _Entry(index)
        try:
            parts = self._reader.parts(batch)
            entry.has_lists = parts[0].entry is not None
            for part in parts:
                _check_group(part.group)
                result = PartResult(part._replace(input=None, target=None, weight=None, mask=None))
                entry.results.append(result)
                for each in self._slicer.slices(part):
                    entry.unanswered += 1
                    entry.byte_count += each.byte_count
                    entry.slice_count += 1
                    receive = partial(self._receive, entry, result, each)
                    yield SliceRequest(each.parts, each.byte_count, receive)
                    if entry.error is not None:
                        break
        except LossgradError as error:
            self._fail(entry, error)
        entry.is_sent = True
        self._finish_if_complete(entry)

    def _receive(self, entry: _Entry, result: PartResult, slice: EncodedSlice, outcome: Outcome) -> None:
        assert self._slicer is not None  # noqa: S101
        entry.unanswered -= 1
        if entry.error is None:
            if isinstance(outcome, LossgradError):
                self._fail(entry, outcome)
            else:
                self._slicer.take(result, slice, outcome)
        if entry.is_sent:
            self._finish_if_complete(entry)

    def _fail(self, entry: _Entry, error: LossgradError) -> None:
        if entry.error is not None:
            return
        entry.error = error
        if self._options.on_error == "raise":
            raise in_batch(error, entry.index)
        self._errors.append(BatchError(entry.index, error))

    def _finish_if_complete(self, entry: _Entry) -> None:
        if entry.unanswered:
            return
        if entry.error is None:
            self._count(entry)
        self._report_progress()
        if self._file is not None and self._file.is_due:
            self.save()

    def _count(self, entry: _Entry) -> None:
        """Count a batch in: nothing of it has been, until here."""
        results = entry.results
        if self._keeps_results:
            batch = self._batch_result(entry)
            if self._options.on_batch is not None:
                self._options.on_batch(
                    batch
                )  # what it does is done before the batch counts, and done again if it fails
        groups, run = self._groups, self._run
        self._is_counting = True
        for result in results:
            name = result.part.group
            known = groups.get(name)
            groups[name] = result.totals if known is None else list(map(LossTotal.__add__, known, result.totals))
            self._element_count += result.element_count
            run.elements += max(total.element_count for total in result.totals)
        if self._options.per_batch:
            self._batches.append(dataclasses.replace(batch, gradients=(), target_gradients=()))
        run.batches += 1
        run.slices += entry.slice_count
        run.bytes += entry.byte_count
        self._done.add(entry.index)
        self._is_counting = False

    def _batch_result(self, entry: _Entry) -> BatchResult:
        results = entry.results
        totals: list[LossTotal] = list(results[0].totals)
        for result in results[1:]:
            totals = list(map(LossTotal.__add__, totals, result.totals))
        names = {result.part.group for result in results}
        group = names.pop() if len(names) == 1 else None
        gradients, target_gradients = gradients_of(results, self.losses, has_lists=entry.has_lists)
        return BatchResult(
            entry.index,
            group or None,
            tuple(summary_of(loss, total) for loss, total in zip(self._reported_losses, totals, strict=True)),
            gradients,
            target_gradients,
        )

    # --- after ---

    def accumulation(self) -> Accumulation:
        """Return the state of all batches counted so far."""
        return Accumulation.of_groups(self.losses, self._groups, element_count=self._element_count)

    def report(self) -> EvaluationReport:
        """Return the report. Raises InvalidRequest where the batches do not hold as many elements as was said."""
        expected = self._options.element_count
        if expected is not None and not self._errors and expected != self._element_count:
            raise InvalidRequest(
                f"element_count is {expected}, but the batches hold {self._element_count} elements; the gradients of "
                "means were "
                "divided by the former: give the right count, or leave it out where no gradient is asked for",
                reason="ELEMENT_COUNT",
                field="element_count",
            )
        self._report_progress(is_finished=True)
        run = self._run
        return EvaluationReport(
            self.accumulation(),
            batches=tuple(sorted(self._batches, key=lambda batch: batch.index)),
            errors=tuple(sorted(self._errors, key=lambda error: error.index)),
            throughput=Throughput(self._seconds(), run.batches, run.slices, run.elements, run.bytes),
            resumed_batch_count=self._resumed_batch_count,
            servers=self._servers,
        )

    def take_errors(self) -> list[BatchError]:
        """Return the errors collected so far, as not collected."""
        errors, self._errors = self._errors, []
        return errors

    def save(self) -> None:
        """Write the checkpoint, if there is one and anything was done since it was read."""
        # Interrupted while it counts, the state is half one: the file then stays as it was written last.
        if self._file is not None and self._run.batches and not self._is_counting:
            self._file.write(self.accumulation(), self._done, self._batches)

    def _open_checkpoint(self) -> CheckpointFile | None:
        checkpoint = self._options.checkpoint
        if checkpoint is None:
            return None
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        file = CheckpointFile(checkpoint, self.losses, per_batch=self._options.per_batch)
        saved = file.read()
        if saved is not None:
            self._groups = {name: saved.accumulation.exact(name) for name in saved.accumulation.group_names}
            self._element_count = saved.accumulation.element_count
            self._done = saved.done
            self._batches = saved.batches or []
            self._resumed_batch_count = len(saved.done)
        return file

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _report_progress(self, *, is_finished: bool = False) -> None:
        if self._on_progress is None:
            return
        now = time.perf_counter()
        if now < self._next_progress_at and not is_finished:
            return
        self._next_progress_at = now + _PROGRESS_SECONDS
        run = self._run
        self._on_progress(
            Progress(
                batch_count=len(self._done),
                total_batches=self._total_batches,
                failed_batch_count=len(self._errors),
                element_count=run.elements,
                byte_count=run.bytes,
                seconds=self._seconds(),
                resumed_batch_count=self._resumed_batch_count,
                is_finished=is_finished,
            )
        )


@dataclass(slots=True)
class _Counts:
    """What this run has done."""

    batches: int = 0
    slices: int = 0
    elements: int = 0
    bytes: int = 0


def in_batch(error: LossgradError, index: int) -> LossgradError:
    """Return an error that says in which batch it was."""
    told = copy.copy(error)
    told.message = f"batch {index}: {error.message}"
    told.args = (told.message,)
    told.__cause__ = error.__cause__
    return told


def _check_losses(losses: Sequence[Loss], options: EvaluationOptions) -> None:
    for loss in losses:
        if loss.reduction not in ("mean", "sum"):
            raise InvalidRequest(
                f"{loss!r} has reduction {loss.reduction!r}; a data set is evaluated with 'mean' or 'sum' "
                "(client.stream gives "
                "every result by itself)",
                reason="BAD_PARAMETER",
                field="reduction",
            )
        if not loss.gradient:
            continue
        if options.on_batch is None:
            raise InvalidRequest(
                f"{loss!r} asks for gradients, which nobody takes; give on_batch, a function of a BatchResult, or "
                "leave "
                "gradient=True out",
                reason="BAD_PARAMETER",
                field="gradient",
            )
        if loss.reduction == "mean" and loss.denominator is None and options.element_count is None:
            raise InvalidRequest(
                f"{loss!r}: the gradient of a mean needs to know what the whole mean divides by; give element_count, "
                "or the "
                "loss's denominator, or use reduction='sum'",
                reason="BAD_PARAMETER",
                field="element_count",
            )


def _check_group(name: str) -> None:
    try:
        check_group_name(name)
    except StateError as error:
        raise InvalidRequest(f"{error}; shorten it", reason="BAD_PARAMETER", field="group") from None
