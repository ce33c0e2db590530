"""What an evaluation has done so far, in a file: which batches, and their exact totals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where an evaluation keeps what it has done, and how often it writes that.

    `key` is any text that must be the same when the file is read again, such as the data set's name and size.
    """

    path: str | Path
    every_seconds: float = 5.0
    key: str = ""
