"""An EvaluationReport as a picture: each loss by group, and over the batches that were kept. Needs matplotlib."""

from __future__ import annotations

import io
import math
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lossgrad.report import EvaluationReport, LossSummary

_MOST_GROUPS: Final = 16
_BAR: Final = "#4878a8"
_FAINT: Final = "#b9cbdf"
_STRONG: Final = "#1f4e79"
_REFERENCE: Final = "#b3541e"
_TEXT: Final = "#333333"


def draw_report(report: EvaluationReport) -> Figure:
    """Return a figure with a row of plots for each loss. Raises ModuleNotFoundError, which says what to install."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot() needs matplotlib, which is not installed: pip install matplotlib", name=error.name
        ) from error
    columns = max(1, bool(report.groups) + bool(report.batches))
    shown_groups = min(len(report.groups), _MOST_GROUPS) if report.groups else 1
    row_height = max(2.4, 1.2 + 0.26 * shown_groups)
    figure = Figure(figsize=(5.2 * columns, row_height * len(report)), layout="constrained")
    grid: Any = figure.subplots(len(report), columns, squeeze=False)
    for position, total in enumerate(report):
        axes = list(grid[position])
        if report.groups:
            _draw_groups(axes.pop(0), report, position, total)
        if report.batches:
            _draw_batches(axes.pop(0), report, position, total)
        if axes:  # nothing but totals
            _draw_total(axes[0], total)
    # What a notebook shows. Without pyplot, which this does not need, nobody else tells it how.
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _draw_groups(axes: Axes, report: EvaluationReport, position: int, total: LossSummary) -> None:
    """Draw a bar for each group, the largest above; beyond _MOST_GROUPS only the largest."""
    values = sorted(((name, each[position].value) for name, each in report.groups.items()), key=_size, reverse=True)
    shown = values[:_MOST_GROUPS][::-1]
    names = [_short(name) for name, _ in shown]
    heights = [value if math.isfinite(value) else 0.0 for _, value in shown]
    bars = axes.barh(range(len(shown)), heights, color=_BAR, height=0.72)
    clear = {"facecolor": "white", "linewidth": 0, "pad": 0.8}  # of the reference line
    labels = [f"{value:.4g}" for _, value in shown]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=8, color=_TEXT, bbox=clear)
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.margins(x=0.18, y=0.02)
    if total.loss.reduction != "sum" and math.isfinite(total.value):
        axes.axvline(total.value, color=_REFERENCE, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(
            total.value,
            1.0,
            f" all {total.value:.4g}",
            transform=axes.get_xaxis_transform(),
            color=_REFERENCE,
            fontsize=8,
            va="bottom",
            ha="center",
        )
    left_out = len(values) - len(shown)
    _finish(axes, total, f"by group{f', the {len(shown)} largest of {len(values)}' if left_out else ''}")


def _draw_batches(axes: Axes, report: EvaluationReport, position: int, total: LossSummary) -> None:
    """Draw each batch's value, and the mean or sum of all up to it."""
    indices = [batch.index for batch in report.batches]
    each = [batch.results[position] for batch in report.batches]
    sums = list(accumulate(summary.sum for summary in each))
    weights = list(accumulate(summary.weight_sum for summary in each))
    is_sum = total.loss.reduction == "sum"
    axes.plot(indices, [summary.value for summary in each], color=_FAINT, linewidth=0.9, marker=".", markersize=3)
    if not is_sum and total.loss.denominator is None:
        running = [value / weight if weight else math.nan for value, weight in zip(sums, weights, strict=True)]
        axes.plot(indices, running, color=_STRONG, linewidth=1.8)
        axes.annotate(
            "so far",
            (indices[-1], running[-1]),
            xytext=(3, 0),
            textcoords="offset points",
            color=_STRONG,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
    axes.set_xlabel("batch", fontsize=9, color=_TEXT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    _finish(axes, total, "over batches")


def _draw_total(axes: Axes, total: LossSummary) -> None:
    value = total.value
    bars = axes.barh([0], [value if math.isfinite(value) else 0.0], color=_BAR, height=0.4)
    axes.bar_label(bars, labels=[f"{value:.6g}"], padding=3, fontsize=9, color=_TEXT)
    axes.set_yticks([])
    axes.set_ylim(-1, 1)
    axes.margins(x=0.2)
    _finish(axes, total, "all")


def _finish(axes: Axes, total: LossSummary, what: str) -> None:
    reduction = "sum" if total.loss.reduction == "sum" else "mean"
    axes.set_title(f"{_name(total)}, {reduction} {what}", loc="left", fontsize=10, color=_TEXT, pad=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT, labelsize=9)


def _name(total: LossSummary) -> str:
    loss = total.loss
    return f"{loss.name}({loss.parameter}={getattr(loss, loss.parameter):g})" if loss.parameter else loss.name


def _size(named: tuple[str, float]) -> float:
    return -math.inf if math.isnan(named[1]) else named[1]


def _short(name: str) -> str:
    name = name or "(none)"
    return name if len(name) <= 24 else name[:23] + "…"
