"""What a check of `lossgrad doctor` says: one line, and where something is wrong what to do about it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


class State(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  # works, and could be better
    FAIL = "FAIL"
    SKIP = "skip"  # cannot be told, and why


@dataclass(frozen=True, slots=True)
class Check:
    """A check. `name` is one word; `remedy` is what to do where it is not ok."""

    name: str
    state: State
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.state:<4}  {self.name:<10}  {' '.join(self.text.split())}{remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**dataclasses.asdict(self), "state": self.state.lower()}


Examine = Callable[[], Iterator[Check]]


def ok(name: str, text: str) -> Check:
    """Return a check that came out well."""
    return Check(name, State.OK, text)


def warn(name: str, text: str, remedy: str) -> Check:
    """Return a check of what works, and could be better."""
    return Check(name, State.WARN, text, remedy)


def fail(name: str, text: str, remedy: str) -> Check:
    """Return a check that failed."""
    return Check(name, State.FAIL, text, remedy)


def skip(name: str, text: str) -> Check:
    """Return a check that cannot be done."""
    return Check(name, State.SKIP, text)
