"""How far an evaluation is, as a value, and as a line on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final

# A terminal's line is written anew so often; where standard error is no terminal, a line is added so often.
_TERMINAL_SECONDS: Final = 0.1
_LOG_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an evaluation is. What a checkpoint had already counts as done, but not in `element_count` and `byte_count`.

    `total_batches` is None where the batches have no length. `is_finished` is set in the last one.
    """

    batch_count: int
    total_batches: int | None
    failed_batch_count: int
    element_count: int
    byte_count: int
    seconds: float
    resumed_batch_count: int = 0
    is_finished: bool = False

    @property
    def elements_per_second(self) -> float:
        """Unmasked elements per second."""
        return self.element_count / self.seconds if self.seconds else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """How long the rest will take at the rate so far; None where nobody can tell."""
        done = self.batch_count - self.resumed_batch_count
        if self.total_batches is None or not done:
            return None
        return self.seconds * max(0, self.total_batches - self.batch_count) / done


OnProgress = Callable[[Progress], None]


class ProgressLine:
    """Writes a Progress now and then: in place at a terminal, as a line of its own elsewhere."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._is_terminal = self._file.isatty()
        self._next_at = 0.0 if self._is_terminal else time.monotonic() + _LOG_SECONDS
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        """Write it, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._next_at and not progress.is_finished:
            return
        self._next_at = now + (_TERMINAL_SECONDS if self._is_terminal else _LOG_SECONDS)
        line = text_of(progress)
        if self._is_terminal:
            end = "\n" if progress.is_finished else ""
            self._file.write(f"\r{line.ljust(self._width)}{end}")
            self._width = len(line)
        else:
            self._file.write(line + "\n")
        self._file.flush()


def text_of(progress: Progress) -> str:
    """Return a Progress as one line."""
    total, done = progress.total_batches, progress.batch_count
    parts = [f"{done:,} batches" if total is None else f"{done:,} of {total:,} batches ({done / max(1, total):.0%})"]
    if progress.failed_batch_count:
        parts.append(f"{progress.failed_batch_count:,} failed")
    parts.append(f"{progress.element_count:,} elements")
    if progress.seconds:
        parts.append(f"{progress.elements_per_second / 1e6:.3g} M/s")
        parts.append(f"{progress.byte_count / progress.seconds / 2**20:.3g} MiB/s")
    remaining = progress.remaining_seconds
    if progress.is_finished:
        parts.append(f"done in {_duration(progress.seconds)}")
    elif remaining is not None:
        parts.append(f"{_duration(remaining)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"
