"""Measuring side by side: interleaved rounds, medians, paired ratios, bars, tables, JSON. Knows nothing of what is measured.

A shared machine's speed changes by a third from one second to the next. So the things to compare take turns within a round,
a ratio is taken within a round, and the median over the rounds is what counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

KIB: Final = 1024
MIB: Final = 1024 * 1024


def interleave(cases: Mapping[K, Callable[[], T]], rounds: int, *, until: float = float("inf")) -> dict[K, list[T]]:
    """Run every case once a round; return what each gave, round by round. The order rotates, so that none is always first.

    No round is started after `until` (on time.monotonic's clock), but one there always is.
    """
    names = list(cases)
    results: dict[K, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            results[name].append(cases[name]())
        if time.monotonic() >= until:
            break
    return results


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed; NaN where there is none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that has to be reached: `value` is what was measured, `bar` the least (or the most) that it may be."""

    name: str
    value: float
    bar: float
    is_least: bool = True
    unit: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it was reached. What was not measured (NaN) was not."""
        return self.value >= self.bar if self.is_least else self.value <= self.bar


def bars_table(bars: Iterable[Bar]) -> str:
    """Return the bars, what was measured, and pass or miss."""
    rows = [
        (
            bar.name,
            f"{number(bar.value)}{bar.unit}",
            f"{'at least' if bar.is_least else 'at most'} {number(bar.bar)}{bar.unit}",
            "pass" if bar.is_met else "MISS",
            bar.note,
        )
        for bar in bars
    ]
    return table(("what it must show", "measured", "bar", "", ""), rows, left=(0, 3, 4))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a table in plain text. The columns in `left` are set left, the others right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]

    def text(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join(map(text, [lines[0], rule, *lines[1:]]))


def number(value: float) -> str:
    """Return a figure with about three digits that mean something."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.005:
        return f"{value:.2g}"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"


def size_name(byte_count: int) -> str:
    """Return a size as it is written in tables: 64 KiB."""
    if byte_count >= MIB and byte_count % MIB == 0:
        return f"{byte_count // MIB} MiB"
    return f"{byte_count // KIB} KiB" if byte_count % KIB == 0 else f"{byte_count} B"


def parse_size(text: str) -> int:
    """Return the bytes of "64KiB", "1MiB" or "512". Raises ValueError."""
    for suffix, factor in (("KiB", KIB), ("MiB", MIB), ("B", 1)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) * factor
    return int(text)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "cpu": model or platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def to_json(report: Any) -> str:
    """Return a report of dataclasses, mappings and sequences as JSON. NaN, which JSON has not, becomes null."""
    return json.dumps(_plain(report), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Bar):
        return _plain(dataclasses.asdict(value)) | {"is_met": value.is_met}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def progress(text: str) -> None:
    """Tell a person at a terminal what is going on; standard output is the report's."""
    print(text, file=sys.stderr, flush=True)
