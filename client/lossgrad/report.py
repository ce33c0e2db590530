"""What `evaluate` gives back: an EvaluationReport and the values it is made of. HTML: report_html.py, plots: plots.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lossgrad.errors import LossgradError
from lossgrad.losses import Loss

if TYPE_CHECKING:
    from lossgrad.accumulation import Accumulation

_SHOWN_GROUPS: Final = 10


@dataclass(frozen=True, slots=True)
class LossSummary:
    """One loss over many elements.

    `sum` is that of the unmasked elements' w * l, exact and rounded once; `mean` is it divided by `weight_sum`, or by the
    loss's `denominator` if it has one; NaN where nothing is left to average. `element_count` are the unmasked elements,
    `weight_sum` their weights (the count itself without weights). `min` and `max` are those of w * l, NaN left out; inf
    and -inf where there is none. `nonfinite_count` is how many w * l are NaN or infinite.
    """

    loss: Loss
    mean: float
    sum: float
    element_count: int
    weight_sum: float
    min: float
    max: float
    nonfinite_count: int

    @property
    def value(self) -> float:
        """The mean or the sum, whichever is the loss's reduction."""
        return self.sum if self.loss.reduction == "sum" else self.mean

    def to_dict(self) -> dict[str, Any]:
        """Return the loss's description and its numbers as plain values."""
        return {**self.loss.to_dict(), "value": self.value, **{name: getattr(self, name) for name in _NUMBERS}}


_NUMBERS: Final = ("mean", "sum", "element_count", "weight_sum", "min", "max", "nonfinite_count")


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """One batch of an evaluation, the `index`-th. `group` is None where it has none, or one for each row.

    `results` are in the order of the losses. `gradients` (with respect to input) and `target_gradients` too, each None
    where it is not asked for, or as in LossResult; in a report they are left out. A batch of lists has lists of them.
    """

    index: int
    group: str | None
    results: tuple[LossSummary, ...]
    gradients: tuple[Any, ...] = field(default=(), repr=False)
    target_gradients: tuple[Any, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return index, group and results as plain values."""
        return {"index": self.index, "group": self.group, "losses": [result.to_dict() for result in self.results]}


@dataclass(frozen=True, slots=True, eq=False)
class BatchError:
    """A batch that was left out of an evaluation with on_error="collect", and why."""

    index: int
    error: LossgradError

    def to_dict(self) -> dict[str, Any]:
        """Return what went wrong as plain values."""
        error = self.error
        return {
            "index": self.index,
            "error": type(error).__name__,
            "reason": error.reason,
            "field": error.field,
            "message": error.message,
        }


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was evaluated in this run, and in what time; without what a checkpoint had already."""

    seconds: float
    batch_count: int
    slice_count: int  # requests: batches are cut, and lists and rows' groups taken apart
    element_count: int
    byte_count: int  # sent, whatever was sent again left out

    @property
    def elements_per_second(self) -> float:
        """Unmasked elements per second."""
        return self.element_count / self.seconds if self.seconds else math.nan

    @property
    def bytes_per_second(self) -> float:
        """Bytes sent per second."""
        return self.byte_count / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values."""
        names = ("seconds", "batch_count", "slice_count", "element_count", "byte_count")
        rates = ("elements_per_second", "bytes_per_second")
        return {name: getattr(self, name) for name in (*names, *rates)}


@dataclass(frozen=True, slots=True)
class EvaluationServer:
    """A server that took part. Those of equal `determinism` give equal bits."""

    target: str
    device: str
    determinism: str


@dataclass(frozen=True, eq=False, repr=False)
class EvaluationReport:
    """The losses of a data set, in all and by group. `report[0]` is the first loss's LossSummary.

    `accumulation` is the exact state behind it: save it, load it, merge it with others'. `batches` are those kept with
    `per_batch`, `errors` those left out with on_error="collect", both by index. `resumed_batch_count` is how many of the
    batches came from the checkpoint.
    """

    accumulation: Accumulation
    batches: tuple[BatchResult, ...] = ()
    errors: tuple[BatchError, ...] = ()
    throughput: Throughput | None = None
    resumed_batch_count: int = 0
    servers: tuple[EvaluationServer, ...] = ()

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The losses, in the order in which they were asked for."""
        return self.accumulation.losses

    @cached_property
    def totals(self) -> tuple[LossSummary, ...]:
        """Each loss over all groups together."""
        return self.accumulation.totals()

    @cached_property
    def groups(self) -> Mapping[str, tuple[LossSummary, ...]]:
        """Each loss by group; empty where there are no groups. What had no group beside others that had is under ""."""
        names = self.accumulation.group_names
        return {} if set(names) <= {""} else {name: self.accumulation.totals(name) for name in names}

    def __getitem__(self, index: int) -> LossSummary:
        return self.totals[index]

    def __len__(self) -> int:
        return len(self.totals)

    def __iter__(self) -> Iterator[LossSummary]:
        return iter(self.totals)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values. Numbers stay as they are, NaN and infinity included."""
        return {
            "losses": [summary.to_dict() for summary in self.totals],
            "groups": {name: [summary.to_dict() for summary in each] for name, each in self.groups.items()},
            "batches": [batch.to_dict() for batch in self.batches],
            "errors": [error.to_dict() for error in self.errors],
            "throughput": None if self.throughput is None else self.throughput.to_dict(),
            "resumed_batch_count": self.resumed_batch_count,
            "servers": [
                {"target": server.target, "device": server.device, "determinism": server.determinism}
                for server in self.servers
            ],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON, which has no NaN and infinity: they become "NaN", "Infinity" and "-Infinity"."""
        return json.dumps(_jsonable(self.to_dict()), indent=indent, allow_nan=False)

    def to_pandas(self, what: str = "groups") -> Any:
        """Return a pandas.DataFrame with one row for each loss of each group, the total's group being missing.

        `what="batches"` gives one row for each loss of each batch that was kept. Needs pandas.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas() needs pandas, which is not installed: pip install pandas", name=error.name
            ) from error
        rows: list[dict[str, Any]]
        if what == "batches":
            rows = [
                {"batch": batch.index, "group": batch.group, **summary.to_dict()}
                for batch in self.batches
                for summary in batch.results
            ]
        elif what == "groups":
            named: list[tuple[str | None, Sequence[LossSummary]]] = [(None, self.totals), *self.groups.items()]
            rows = [{"group": name, **summary.to_dict()} for name, each in named for summary in each]
        else:
            raise ValueError(f"what is {what!r}; it must be 'groups' or 'batches'")
        return pd.DataFrame(rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw each loss by group, and over the batches that were kept; return the matplotlib Figure.

        `path` is where to save it too, in the format that its suffix names. Needs matplotlib.
        """
        from lossgrad.plots import draw_report

        figure = draw_report(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def table(self, *, most_groups: int | None = _SHOWN_GROUPS) -> tuple[tuple[str, ...], list[tuple[str, ...]], int]:
        """Return heads, rows of text, and how many groups were left out, for those who print or draw a table."""
        heads = ("loss", *(("group",) if self.groups else ()), "mean", "sum", "elements", "min", "max", "non-finite")
        shown = list(self.groups.items())[:most_groups]
        rows = []
        for position, total in enumerate(self.totals):
            named = [("all", total), *((name, each[position]) for name, each in shown)]
            for name, summary in named:
                rows.append(
                    (
                        repr(summary.loss) if summary is total else "",
                        *((name if summary is total else name or "(none)",) if self.groups else ()),
                        *(format_number(getattr(summary, each)) for each in ("mean", "sum", "element_count")),
                        *(format_number(each) if summary.element_count else "-" for each in (summary.min, summary.max)),
                        format_number(summary.nonfinite_count),
                    )
                )
        return heads, rows, len(self.groups) - len(shown)

    def headline(self) -> str:
        """Return one line about how much was evaluated."""
        return ", ".join(_headline(self))

    def __repr__(self) -> str:
        heads, rows, left_out = self.table()
        lines = [heads, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        texts = 2 if self.groups else 1  # these columns are set left
        shown = [
            "  ".join(
                cell.ljust(width) if column < texts else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        more = [f"and {left_out:,} more groups: report.groups, report.to_pandas()"] if left_out else []
        headline = self.headline()
        return "\n".join([f"EvaluationReport: {headline}" if headline else "EvaluationReport", *shown, *more])

    def _repr_html_(self) -> str:
        from lossgrad.report_html import report_html

        return report_html(self)


def format_number(value: float) -> str:
    """Return a number for people: counts in full with separators, others with six digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}"


def _headline(report: EvaluationReport) -> Iterator[str]:
    if report.groups:
        yield f"{len(report.groups):,} groups"
    throughput = report.throughput
    if throughput is None:
        return
    yield f"{throughput.batch_count + report.resumed_batch_count:,} batches"
    if report.resumed_batch_count:
        yield f"{report.resumed_batch_count:,} of them from the checkpoint"
    if report.errors:
        yield f"{len(report.errors):,} failed and left out"
    if throughput.batch_count:
        yield f"{throughput.element_count:,} elements in {throughput.seconds:.3g} s"
        yield f"{throughput.elements_per_second / 1e6:.3g} M elements/s"
        yield f"{throughput.bytes_per_second / 2**20:.3g} MiB/s"


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_jsonable(each) for each in value]
    return value
