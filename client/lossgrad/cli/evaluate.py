"""`lossgrad evaluate`: the losses of a data set in files, exact, by group, resumable, over one server or several."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from lossgrad.checkpoint import Checkpoint, CheckpointFile, SavedState
from lossgrad.cli.evaluation_task import EvaluationTask, connect, evaluate_part, place_of
from lossgrad.cli.losses import label_of, read_loss
from lossgrad.cli.outcome import CheckFailed, ExitCode, Terminated, UsageError, cause, say
from lossgrad.cli.progress_bar import shown_progress
from lossgrad.cli.report_output import check_folder, check_plot, plain_report, show_report, write_report
from lossgrad.cli.workers import evaluate_with_workers
from lossgrad.files import SLICE_ELEMENTS, Dataset, DatasetFiles, FileError, NanFound, NanPolicy
from lossgrad.report import EvaluationReport

_MAX_LOSSES: Final = 16


def run(options: argparse.Namespace) -> ExitCode:
    """Evaluate, print, and write what is to be written."""
    task = _task(options)
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_interrupt())
        try:
            data = stack.enter_context(task.open_data())
            _show(plain_report(_evaluate(task, data)), task, data)
        except NanFound as error:
            raise CheckFailed(str(error)) from error
        except FileError as error:
            raise UsageError(str(error)) from error
    return ExitCode.DONE


def _task(options: argparse.Namespace) -> EvaluationTask:
    """Return what the command line asks for. Raises UsageError."""
    if len(options.files) != 2:
        hint = "; put a pattern in quotes, so that the shell leaves it alone" if len(options.files) > 2 else ""
        raise UsageError(
            f"give two files or folders or patterns, PREDICTIONS and TARGETS; got {len(options.files)}{hint}"
        )
    losses = tuple(read_loss(text) for text in options.loss or ["smooth_l1"])
    if len(set(losses)) < len(losses):
        raise UsageError(f"--loss gives {', '.join(map(label_of, losses))}; give each loss once")
    if len(losses) > _MAX_LOSSES:
        raise UsageError(f"--loss is given {len(losses)} times; at most {_MAX_LOSSES} go together")
    if options.embedded and options.target:
        raise UsageError("--embedded computes in this process, --target names a server; give one of them")
    if options.embedded and options.workers > 1:
        raise UsageError("--embedded computes with all cores in this process; leave out --workers")
    if options.target and len(set(options.target)) < len(options.target):
        raise UsageError(f"--target names a server twice: {', '.join(options.target)}; name each once")
    if options.keep_going and options.gradient_out:
        raise UsageError("--keep-going leaves slices out, and --gradient-out needs them all; give one of them")
    if options.group_by is not None and options.group_by_file:
        raise UsageError("--group-by and --group-by-file both say what the groups are; give one of them")
    for flag, value, least in (
        ("--workers", options.workers, 1),
        ("--patience", options.patience, 0),
        ("--checkpoint-every", options.checkpoint_every, 0),
    ):
        if value is not None and not value >= least:
            raise UsageError(f"{flag} is {value:g}; it must be at least {least}")
    if options.plot is not None:
        check_plot(options.plot)
    if options.state_out is not None:
        check_folder("--state-out", options.state_out)
    predictions, targets = options.files
    return EvaluationTask(
        files=DatasetFiles(
            predictions,
            targets,
            weight=options.weight,
            mask=options.mask,
            group=options.group_by,
            group_by_file=options.group_by_file,
        ),
        nan_policy=NanPolicy(options.nan_policy),
        losses=losses,
        gradient_out=options.gradient_out,
        gradient_of=options.gradient_of,
        per_batch=options.plot is not None,
        sync_gradients=options.checkpoint is not None,
        slice_elements=SLICE_ELEMENTS,
        options=options,
    )


def _evaluate(task: EvaluationTask, data: Dataset) -> EvaluationReport:
    """Evaluate what the checkpoint has not; the gradients are in their files in the end."""
    options = task.options
    task = task.with_gradients(data)
    checkpoint, saved = _checkpoint(task, data)
    gradients = task.gradient_files(data)
    with ExitStack() as stack:
        if gradients is not None:
            is_all_done = saved is not None and len(saved.done) == len(data)
            if not (is_all_done and gradients.are_finished()):
                stack.callback(gradients.close if checkpoint is not None else gradients.discard)
                gradients.create() if saved is None else gradients.reopen()
        try:
            with shown_progress(quiet=options.quiet) as on_progress:
                if options.workers > 1:
                    file = (
                        None
                        if checkpoint is None
                        else CheckpointFile(checkpoint, task.losses, per_batch=task.per_batch)
                    )
                    report = evaluate_with_workers(
                        task, options.workers, len(data), saved=saved, file=file, on_progress=on_progress
                    )
                else:
                    client = stack.enter_context(connect(task))
                    everything = range(len(data))
                    report = evaluate_part(
                        client,
                        task,
                        data,
                        everything,
                        gradients,
                        patience=options.patience,
                        progress=on_progress or False,
                        checkpoint=checkpoint,
                    )
        except (KeyboardInterrupt, Terminated) as interrupt:
            raise type(interrupt)(_how_to_go_on(options)) from None
        if gradients is not None:
            gradients.finish()
    return report


def _checkpoint(task: EvaluationTask, data: Dataset) -> tuple[Checkpoint | None, SavedState | None]:
    """Return the checkpoint, if there is to be one, and what it has of an earlier run. Raises UsageError, InvalidRequest."""
    options = task.options
    path: Path | None = options.checkpoint
    if path is None:
        return None, None
    check_folder("--checkpoint", path)
    gradient = "" if task.gradient_out is None else f", gradient of the {task.gradient_of}"
    key = f"{len(data.shards)} files, {data.element_count} elements, content {data.fingerprint()}{gradient}"
    checkpoint = Checkpoint(path, every_seconds=options.checkpoint_every, key=key)
    try:
        saved = CheckpointFile(checkpoint, task.losses, per_batch=False).read()
    except OSError as error:
        raise UsageError(f"--checkpoint {str(path)!r} cannot be read: {cause(error)}") from error
    if saved is not None and task.per_batch and saved.batches is None:
        raise UsageError(
            f"--checkpoint {str(path)!r} was written without --plot, which needs every slice; leave out --plot"
        )
    return checkpoint, saved


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.checkpoint is None:
        return "interrupted; nothing is kept. With --checkpoint FILE the same command goes on from where it stopped"
    return f"interrupted; the same command goes on from {str(options.checkpoint)!r}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end an evaluation as ctrl-C does: with its checkpoint written. Schedulers send it before they kill."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(report: EvaluationReport, task: EvaluationTask, data: Dataset) -> None:
    options = task.options
    about: dict[str, Any] = {
        "predictions": task.files.predictions,
        "targets": task.files.targets,
        "element_count": data.element_count,
        "nan_policy": task.nan_policy.value,
    }
    show_report(report, json=options.json, about=about)
    write_report(report, state_out=options.state_out, plot=options.plot)
    nonfinite = max(total.nonfinite_count for total in report.totals)
    if nonfinite:
        omit = "" if task.nan_policy is NanPolicy.OMIT else "; --nan-policy omit leaves out what is NaN"
        say(f"warning: {nonfinite:,} losses are NaN or infinite, and so may be the results{omit}")
    if report.errors:
        first = report.errors[0]
        raise CheckFailed(
            f"{len(report.errors)} of {len(data)} slices could not be evaluated and are left out; the first is "
            f"{place_of(data, first.index)}: {first.error.message}"
        )
