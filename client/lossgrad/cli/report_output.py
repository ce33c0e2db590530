"""What `lossgrad evaluate` and `lossgrad merge` give: a table for people, JSON for programs, a plot, a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from json import dumps as _dumps
from json import loads as _loads
from pathlib import Path
from typing import Any, Final

from lossgrad.accumulation import Accumulation
from lossgrad.cli.losses import label_of
from lossgrad.cli.outcome import UsageError, cause
from lossgrad.losses import Loss
from lossgrad.report import EvaluationReport, LossSummary, format_number

_PICTURES: Final = (".png", ".svg", ".pdf", ".jpg", ".webp")
_HEADS: Final = ("mean", "sum", "elements", "min", "max", "non-finite")


def plain_report(report: EvaluationReport) -> EvaluationReport:
    """Return a report whose losses have no denominator: their means are over the weights, as of any other evaluation."""
    losses = tuple(dataclasses.replace(loss, denominator=None, reduction="mean") for loss in report.losses)
    if losses == report.losses:
        return report
    exact = report.accumulation
    accumulation = Accumulation.of_groups(
        losses, {name: exact.exact(name) for name in exact.group_names}, element_count=exact.element_count
    )
    batches = tuple(
        dataclasses.replace(batch, results=tuple(map(_plain, losses, batch.results))) for batch in report.batches
    )
    return dataclasses.replace(report, accumulation=accumulation, batches=batches)


def _plain(loss: Loss, summary: LossSummary) -> LossSummary:
    return dataclasses.replace(summary, loss=loss, mean=_quotient(summary))


def _quotient(summary: LossSummary) -> float:
    return summary.sum / summary.weight_sum if summary.weight_sum else float("nan")


def table(report: EvaluationReport) -> str:
    """Return the report as a table: a line for each loss, and for each of its groups. Sums and means have all digits."""
    groups = report.groups
    lines: list[tuple[str, ...]] = [("loss", *(("group",) if groups else ()), *_HEADS)]
    for position, total in enumerate(report.totals):
        lines.append((label_of(total.loss), *(("all",) if groups else ()), *_cells(total)))
        lines += [("", name or "(none)", *_cells(each[position])) for name, each in sorted(groups.items())]
    return _aligned(lines, left=2 if groups else 1)


def _cells(summary: LossSummary) -> tuple[str, ...]:
    extremes = (summary.min, summary.max)
    return (
        repr(summary.mean),
        repr(summary.sum),
        format_number(summary.element_count),
        *(format_number(each) if summary.element_count else "-" for each in extremes),
        format_number(summary.nonfinite_count),
    )


def _aligned(lines: Sequence[Sequence[str]], *, left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def show_report(report: EvaluationReport, *, json: bool, about: Mapping[str, Any]) -> None:
    """Print the report; as JSON with what is said `about` it in front. JSON has NaN and infinity as texts."""
    print(_dumps({**about, **_loads(report.to_json())}, indent=2) if json else table(report))


def write_report(report: EvaluationReport, *, state_out: Path | None, plot: Path | None) -> None:
    """Write the report's state and its plot, where they are asked for. Raises UsageError."""
    for flag, path, write in (("--state-out", state_out, report.accumulation.save), ("--plot", plot, report.plot)):
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise UsageError(f"{flag} {str(path)!r} cannot be written: {cause(error)}") from error


def check_plot(path: Path) -> None:
    """Raise UsageError where a plot could not be drawn, before all the work."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'lossgrad[plot]'")
    if path.suffix.lower() not in _PICTURES:
        raise UsageError(f"--plot {str(path)!r} is no picture; give a name that ends with {', '.join(_PICTURES)}")
    check_folder("--plot", path)


def check_folder(flag: str, path: Path) -> None:
    """Raise UsageError where a file cannot be written because its folder is not there."""
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {str(path)!r} cannot be written: {str(path.parent)!r} is no folder")
