"""Draws the picture of a report and its plot that the README and docs/evaluation.md show: docs/pictures/report.png.

`python examples/report_picture.py [FILE.png]`, without a server. Needs `lossgrad[server,plot]`, torch and scikit-learn.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if __name__ == "__main__":  # as a script, the folder above is not where Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lossgrad
from examples.evaluate_model import evaluate, trained_model

PATH = Path(__file__).resolve().parents[1] / "docs/pictures/report.png"
DOTS_PER_INCH = 110
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def pixels_of(figure: Figure) -> Pixels:
    """Return a figure as [height, width, 3] pixels."""
    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def table_of(report: lossgrad.EvaluationReport, width_inches: float) -> Pixels:
    """Return the report as a notebook shows it: what was evaluated, and the table."""
    heads, rows, _ = report.table()
    row_inches = 0.235
    figure = Figure(figsize=(width_inches, (len(rows) + 3.2) * row_inches))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(rows) + 2.7, -0.5))
    edges = [0.025, 0.25, 0.40, 0.53, 0.645, 0.775, 0.88, 0.98]  # where texts begin, and where numbers end
    text: dict[str, Any] = {"fontsize": 9, "family": "DejaVu Sans", "va": "center", "color": "#222222"}
    title = 'client.evaluate(loader, [SmoothL1(beta=0.1), MSE()], group="digit", ...)'
    axes.text(edges[0], 0.25, title, **{**text, "family": "DejaVu Sans Mono", "color": "#1f4e79"})
    for line, cells in enumerate([heads, *rows]):
        is_total = line == 0 or bool(cells[0])
        for column, cell in enumerate(cells):
            side = "left" if column < 2 else "right"
            axes.text(edges[column], line + 1.6, cell, ha=side, weight="bold" if is_total else "normal", **text)
        if is_total:
            axes.plot([0.02, 0.985], [line + 1.6 + (0.5 if line == 0 else -0.5)] * 2, color="#bbbbbb", linewidth=0.8)
    return pixels_of(figure)


def picture_of(report: lossgrad.EvaluationReport) -> Pixels:
    """Return the table above the plot."""
    plot = pixels_of(report.plot())
    table = table_of(report, plot.shape[1] / DOTS_PER_INCH)
    width = max(plot.shape[1], table.shape[1])
    both = [np.pad(each, ((0, 0), (0, width - each.shape[1]), (0, 0)), constant_values=255) for each in (table, plot)]
    return np.pad(np.concatenate(both), ((8, 12), (14, 14), (0, 0)), constant_values=255)


def main(path: Path = PATH) -> None:
    """Evaluate a model in this process, and draw the report."""
    with lossgrad.embedded() as client:
        report = evaluate(client, trained_model())
    # 48 colours are all that it has, but for the edges of letters, and make it a fifth as large.
    Image.fromarray(picture_of(report)).quantize(48).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
