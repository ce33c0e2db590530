"""Starts generator.py and reads what it reports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable

from tests.faults.generator import Call, Load
from tests.server.program import ROOT


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcomes of a load's calls, each exactly once."""

    load: Load
    calls: list[Call]

    def codes(self) -> Counter[str]:
        return Counter(call.code for call in self.calls)

    def seconds(self, wanted: Callable[[Call], bool]) -> list[float]:
        """Return how long the wanted calls took, sorted."""
        return sorted(call.seconds for call in self.calls if wanted(call))

    @property
    def goodput(self) -> float:
        """Right answers a second."""
        return sum(call.code == "OK" for call in self.calls) / self.load.seconds

    def check(self) -> None:
        """Every call has one outcome, and no answer is wrong."""
        assert len(self.calls) == round(self.load.rate * self.load.seconds)
        assert all(call.is_right for call in self.calls)


class Generator:
    """A generator at work."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.generator", json.dumps(dataclasses.asdict(load))],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def report(self) -> Report:
        """Wait for its end; return what it saw."""
        output, _ = self._process.communicate(timeout=self._load.seconds + self._load.deadline_seconds + 30)
        assert self._process.returncode == 0
        report = Report(self._load, [Call(*call) for call in json.loads(output)])
        report.check()
        return report


def percentile(sorted_values: Iterable[float], percent: float) -> float:
    """Return a percentile of sorted values; 0 of none."""
    values = list(sorted_values)
    return values[min(len(values) - 1, round(len(values) * percent / 100))] if values else 0.0
