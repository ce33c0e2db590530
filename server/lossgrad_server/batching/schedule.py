"""When a job would be done: how fast the device works, from the batches that it did, and what it has begun.

A small job goes between the pieces of large ones and does not wait for them, so the two kinds are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# What a batch counts for beside the one after it. Over some ten batches the pace follows the kind of requests that come.
_DECAY: Final = 0.9

# The pace of the first batches, which find cold caches, is no basis for refusing anybody.
_LEAST_BATCHES: Final = 10


class Pace:
    """The seconds that a unit of work takes. Not thread-safe."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._work = 0.0
        self._batches = 0

    def note(self, work: int, seconds: float) -> None:
        """Learn from a batch."""
        self._seconds = self._seconds * _DECAY + seconds
        self._work = self._work * _DECAY + work
        self._batches += 1

    def seconds(self, work: int) -> float:
        """Return how long work will take; 0 as long as too little is known."""
        return work * self._seconds / self._work if self._batches >= _LEAST_BATCHES and self._work else 0.0


class Schedule:
    """What the device has begun, and until when that is expected to keep it busy. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.small = Pace()
        self.large = Pace()
        self._clock = clock
        self._small_until = self._large_until = 0.0

    def begin(self, work: int, *, is_large: bool) -> None:
        """Note that the device has been given work."""
        now = self._clock()
        if is_large:
            self._large_until = max(self._large_until, now) + self.large.seconds(work)
        else:
            self._small_until = max(self._small_until, now) + self.small.seconds(work)

    def done(self, work: int, seconds: float, *, is_large: bool) -> None:
        """Note that work is done, and how long it took."""
        (self.large if is_large else self.small).note(work, seconds)

    def seconds_until_done(self, small_work: int, large_work: int) -> float:
        """Return in how many seconds so much would be done, all that the device has begun included.

        Without large work, large jobs are not waited for.
        """
        until = max(self._small_until, self._large_until) if large_work else self._small_until
        begun = max(until - self._clock(), 0.0)
        return begun + self.small.seconds(small_work) + self.large.seconds(large_work)
