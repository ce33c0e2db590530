"""Which of a file's arrays is meant: archives, safetensors and tables hold several, each with a name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lossgrad.files.array_file import FileError

_MOST_SHOWN = 8


def choose(path: Path, member: str | None, names: Sequence[str], kind: str) -> str:
    """Return the name that is meant. `kind` is what the file calls its arrays: array, tensor, column."""
    if member is not None:
        if member in names:
            return member
        raise FileError(f"{str(path)!r} has no {kind} {member!r}; it has {_listed(names)}")
    if len(names) == 1:
        return names[0]
    if not names:
        raise FileError(f"{str(path)!r} holds no {kind}")
    raise FileError(
        f"{str(path)!r} holds {len(names)} {kind}s: {_listed(names)}; say which, such as '{path}:{names[0]}'"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_SHOWN])
    return f"{shown} and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else shown or "none"
