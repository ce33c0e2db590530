"""What an evaluation has done so far, in a file: which batches, their exact totals, and their own results where kept."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lossgrad.accumulation import Accumulation
from lossgrad.losses import Loss
from lossgrad.report import BatchResult, LossSummary
from lossgrad.state_file import bad_file, read_state, write_state
from lossgrad_api.loss_totals import StateError

_KIND: Final = "lossgrad.checkpoint"
# Writing never takes more than this share of the time.
_MOST_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where an evaluation keeps what it has done, and how often it writes that.

    `key` is any text that must be the same when the file is read again, such as the data set's name and size.
    """

    path: str | Path
    every_seconds: float = 5.0
    key: str = ""


class DoneBatches:
    """A set of batch numbers, held as ranges: batches are done nearly in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []  # ascending, apart from each other by at least one
        self._stops: list[int] = []
        for start, stop in ranges:
            if not (isinstance(start, int) and isinstance(stop, int) and start < stop and start >= 0):
                raise ValueError(f"[{start}, {stop}] is no range of batches")
            if self._stops and start <= self._stops[-1]:
                raise ValueError("its ranges of batches are not in order")
            self._starts.append(start)
            self._stops.append(stop)

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._starts, index) - 1
        return place >= 0 and index < self._stops[place]

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def add(self, index: int) -> None:
        """Add a number that is not in it."""
        place = bisect_right(self._starts, index)
        joins_left = place > 0 and self._stops[place - 1] == index
        joins_right = place < len(self._starts) and self._starts[place] == index + 1
        if joins_left and joins_right:
            self._stops[place - 1] = self._stops[place]
            del self._starts[place], self._stops[place]
        elif joins_left:
            self._stops[place - 1] = index + 1
        elif joins_right:
            self._starts[place] = index
        else:
            self._starts.insert(place, index)
            self._stops.insert(place, index + 1)

    def ranges(self) -> list[tuple[int, int]]:
        """Return the numbers as (first, behind the last)."""
        return list(zip(self._starts, self._stops, strict=True))


@dataclass(slots=True)
class SavedState:
    """What a checkpoint file holds. `batches` is None where they were not kept."""

    accumulation: Accumulation
    done: DoneBatches
    batches: list[BatchResult] | None


class CheckpointFile:
    """The file of one evaluation."""

    def __init__(self, checkpoint: Checkpoint, losses: Sequence[Loss], *, per_batch: bool) -> None:
        self._checkpoint = checkpoint
        self._path = Path(checkpoint.path)
        self._losses = Accumulation(losses).losses
        self._per_batch = per_batch
        self._next_at = time.monotonic() + checkpoint.every_seconds

    def read(self) -> SavedState | None:
        """Return what is in it; None where there is none yet. Raises InvalidRequest where it is another evaluation's."""
        try:
            content = read_state(self._path, _KIND)
        except FileNotFoundError:
            return None
        try:
            saved = self._saved(content)
        except (StateError, KeyError, TypeError, ValueError) as error:
            raise bad_file(self._path, f"cannot be used: {error}") from error
        if saved.accumulation.losses != self._losses:
            raise bad_file(
                self._path,
                f"is of an evaluation of {list(saved.accumulation.losses)}, this one is of {list(self._losses)}; "
                "give the same "
                "losses, or another file",
            )
        if content["key"] != self._checkpoint.key:
            raise bad_file(
                self._path,
                f"has the key {content['key']!r}, this evaluation {self._checkpoint.key!r}: it is of other data; "
                "give another "
                "file",
            )
        if self._per_batch and saved.batches is None:
            raise bad_file(self._path, "was written without per_batch; leave per_batch out, or give another file")
        return saved

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next_at

    def write(self, accumulation: Accumulation, done: DoneBatches, batches: Sequence[BatchResult]) -> None:
        """Write what is done."""
        start = time.monotonic()
        write_state(
            self._path,
            _KIND,
            {
                "key": self._checkpoint.key,
                **accumulation.to_content(),
                "done": done.ranges(),
                "batches": [_plain(batch) for batch in batches] if self._per_batch else None,
            },
        )
        now = time.monotonic()
        self._next_at = now + max(self._checkpoint.every_seconds, (now - start) / _MOST_SHARE)

    def _saved(self, content: Mapping[str, Any]) -> SavedState:
        accumulation = Accumulation.from_content(content)
        batches = content["batches"]
        return SavedState(
            accumulation,
            DoneBatches((start, stop) for start, stop in content["done"]),
            None if batches is None else [_batch(each, accumulation.losses) for each in batches],
        )


_FIELDS: Final = ("mean", "sum", "element_count", "weight_sum", "min", "max", "nonfinite_count")


def _plain(batch: BatchResult) -> list[Any]:
    return [batch.index, batch.group, [[getattr(each, name) for name in _FIELDS] for each in batch.results]]


def _batch(plain: list[Any], losses: Sequence[Loss]) -> BatchResult:
    index, group, results = plain
    return BatchResult(
        index, group, tuple(LossSummary(loss, *each) for loss, each in zip(losses, results, strict=True))
    )
