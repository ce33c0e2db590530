"""What the demo prints: calm tables that read as well in a log as on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lossgrad
from examples.demo.burst import Burst
from examples.demo.evaluate import TOLERANCE_RELATIVE as EVALUATION_TOLERANCE
from examples.demo.evaluate import TOLERANCE_ULP, Predictions, Row
from examples.demo.histograms import Histogram
from examples.demo.server_process import ServerProcess
from examples.demo.train import TOLERANCE_RELATIVE as TRAINING_TOLERANCE
from examples.demo.train import Training, largest_difference

STAGES: Final = ("decode", "queue", "pack", "compute", "unpack", "encode")

# A pipe has no width. Every table fits 80 columns.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
_section = count(1)


def server(process: ServerProcess, info: lossgrad.ServerInfo) -> None:
    """Print what computes, and where."""
    console.print(f"[bold]lossgrad {info.server_version}[/] at {process.target}, metrics at {process.metrics_url}")
    console.print(f"on {info.device} with torch {info.torch_version}; torch here: {torch.__version__}")


def heading(text: str) -> None:
    """Print what comes next."""
    console.print(f"\n[bold]{next(_section)}. {text}[/]")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar while something takes time, where there is a terminal; give the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def evaluation(data: Predictions, rows: list[Row]) -> None:
    """Print each loss over a data set, ours beside torch's."""
    console.print(f"\n{data.title}")
    table = _table("loss", "lossgrad", "torch, local", "difference", "worst batch", "")
    for row in rows:
        table.add_row(
            repr(row.spec),
            f"{row.remote:.9g}",
            f"{row.local:.9g}",
            _relative(row.relative_difference),
            f"{row.worst_batch_ulp:.0f} ulp",
            _mark(row.agrees),
        )
    console.print(table)
    console.print(
        f"[dim]{len(data.batches)} round trips. Allowed: {EVALUATION_TOLERANCE:.0e} relative over all, against torch in "
        f"float64 (lossgrad forms differences in float32); {TOLERANCE_ULP:g} ulp in a batch, against torch in float32 "
        "(which also sums in float32).[/]"
    )


def training(remote: Training, local: Training) -> None:
    """Print the loss as it falls, with a bar, beside what torch's own loss gives."""
    table = _table("epoch", "by the server", "by torch", "difference", "")
    table.columns[-1].justify = "left"
    last = len(remote.losses) - 1
    for epoch in sorted({0, 1, 3, 7, 15, last}):
        ours, theirs = remote.losses[epoch], local.losses[epoch]
        bar = "█" * max(1, round(24 * ours / remote.losses[0]))
        table.add_row(str(epoch + 1), f"{ours:.7f}", f"{theirs:.7f}", _relative(abs(ours - theirs) / theirs), bar)
    console.print(table)
    console.print(
        f"[dim]{remote.steps} steps, a round trip each. Largest difference {largest_difference(remote, local):.0e} "
        f"relative; allowed: {TRAINING_TOLERANCE:.0e}, because last bits grow from step to step.[/]"
    )


def bursts(all_bursts: list[Burst]) -> None:
    """Print each way of sending, then where the server's time went in the calmest and the busiest."""
    table = _table("", "sent", "per second", "batch mean", "p99", "server p50", "p99")
    for burst in all_bursts:
        table.add_row(
            burst.title,
            f"{len(burst.values)}",
            f"{len(burst.values) / burst.seconds:,.0f}",
            f"{burst.batch_requests.mean:.1f}",
            f"{burst.batch_requests.quantile(0.99):.0f}",
            _time(burst.request_duration.quantile(0.5)),
            _time(burst.request_duration.quantile(0.99)),
        )
    console.print(table)
    console.print(
        "[dim]batch: requests that were computed together. server: from a request's bytes being there to its answer's "
        "being ready.[/]"
    )

    calm, busy = all_bursts[0], all_bursts[-1]
    console.print(f"\nWhere that time goes: {calm.title}, and {busy.title}")
    table = _table("stage", "mean", "p50", "p99", "", "mean", "p50", "p99")
    for stage in STAGES:
        durations = [burst.observed.select("lossgrad_stage_duration_seconds", stage=stage) for burst in (calm, busy)]
        table.add_row(stage, *_percentiles(durations[0]), "", *_percentiles(durations[1]))
    table.add_row("whole request", *_percentiles(calm.request_duration), "", *_percentiles(busy.request_duration))
    console.print(table)
    console.print(
        "[dim]Percentiles are linear within a histogram's bucket, as PromQL's histogram_quantile; means are exact. pack, "
        "compute and unpack are those of a request's whole batch.[/]"
    )


def verdict(exit_code: int, wrong: list[str], seconds: float) -> None:
    """Print how it ended."""
    console.print(f"\nThe server drained and stopped on SIGTERM: exit code {exit_code}.")
    for line in wrong:
        console.print(f"[bold red]WRONG[/]  {escape(line)}")
    if not wrong:
        console.print(
            "[bold green]ok[/]  every number agrees with torch, and no answer changed with its company", end=""
        )
        console.print(f"; {seconds:.1f} s")


def _table(*columns: str) -> Table:
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return result


def _percentiles(histogram: Histogram) -> list[str]:
    return [_time(value) for value in (histogram.mean, *map(histogram.quantile, (0.5, 0.99)))]


def _relative(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.0e}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _mark(is_right: bool) -> str:
    return "[green]ok[/]" if is_right else "[bold red]WRONG[/]"
