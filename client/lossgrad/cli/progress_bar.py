"""How far `lossgrad evaluate` is: a bar at a terminal where rich is installed, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from lossgrad.progress import OnProgress, Progress, ProgressLine, text_of


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[OnProgress | None]:
    """Give what is to be called with each Progress; None where nothing is to be shown. All goes to standard error."""
    if quiet:
        yield None
        return
    if sys.stderr.isatty() and find_spec("rich") is not None:
        with _bar() as show:
            yield show
    else:
        yield ProgressLine()


@contextmanager
def _bar() -> Iterator[OnProgress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("evaluate"),
        progress.BarColumn(bar_width=None),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[elements]}  {task.fields[rate]}"),
        progress.TextColumn("{task.fields[failed]}", style="red"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5) as bar:
        task = bar.add_task("", total=None, elements="", rate="", failed="")
        last: Progress | None = None

        def show(now: Progress) -> None:
            nonlocal last
            last = now
            bar.update(
                task,
                completed=now.batch_count,
                total=now.total_batches,
                elements=f"{now.element_count:,} elements",
                rate=f"{now.elements_per_second / 1e6:.3g} M/s",
                failed=f"{now.failed_batch_count} failed" if now.failed_batch_count else "",
            )

        yield show
    if last is not None and last.is_finished:  # the bar is gone; what it came to stays
        print(text_of(last), file=sys.stderr)
