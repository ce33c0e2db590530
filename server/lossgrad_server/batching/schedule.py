"""When a job would be done: how fast the device works, from the batches that it did, and what it has begun.

A small job goes between the pieces of large ones and does not wait for them, so the two kinds are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# What a batch counts for beside the one after it. Over some ten batches the pace follows the kind of requests that come.
_DECAY: Final = 0.9

# The pace of the first batches, which find cold caches, is no basis for refusing anybody: not before this many, or before
# fewer that took this long, because to wait for ten batches of a second each would cost ten seconds of late answers.
_MANY_BATCHES: Final = 10
_SOME_BATCHES: Final = 2
_ENOUGH_SECONDS: Final = 0.1

# A batch counts for at most this many times what it was expected to take. A process that was stopped for a minute, or a
# machine that slept, says nothing of the batches to come.
_MOST_TIMES_EXPECTED: Final = 3.0

# A pace that no batch has confirmed for this long may be wrong, and must not keep the batches away that would show it.
_STALE_SECONDS: Final = 1.0

# No prediction is exact, and an answer has its way to go: what a device is expected to take, and a little more.
_MARGIN: Final = 1.1
_MARGIN_SECONDS: Final = 0.001

# The part of the time left to a job that may be spent waiting, if it is to be taken. The rest is for the batch that it will
# be in: were there nothing left, every batch would have to be as small as its most urgent job demands.
ADMITTED_PART: Final = 0.8


class Pace:
    """The seconds that a unit of work takes. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._work = 0.0
        self._batches = 0
        self._noted_at = clock()

    @property
    def _is_known(self) -> bool:
        is_long = self._batches >= _SOME_BATCHES and self._seconds >= _ENOUGH_SECONDS
        return (is_long or self._batches >= _MANY_BATCHES) and self._work > 0

    @property
    def is_stale(self) -> bool:
        """Whether it is long since a batch was done."""
        return self._clock() - self._noted_at > _STALE_SECONDS

    def note(self, work: int, seconds: float) -> None:
        """Learn from a batch."""
        if self._is_known:
            seconds = min(seconds, _MOST_TIMES_EXPECTED * self.seconds(work))
        self._seconds = self._seconds * _DECAY + seconds
        self._work = self._work * _DECAY + work
        self._batches += 1
        self._noted_at = self._clock()

    def seconds(self, work: int) -> float:
        """Return how long work will take; 0 as long as too little is known."""
        return work * self._seconds / self._work if self._is_known else 0.0


def is_too_long(seconds: float, left: float) -> bool:
    """Whether what is expected to take so long may not be done in the time left. Never where nothing is expected."""
    return seconds > 0 and seconds * _MARGIN + _MARGIN_SECONDS > left


class _Begun:
    """What the device has been given of one kind of work, and since when it has been at it."""

    def __init__(self) -> None:
        self.work = 0
        self.since = 0.0


class Schedule:
    """What the device has begun, and how long that is expected to keep it busy. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.small = Pace(clock)
        self.large = Pace(clock)
        self._clock = clock
        self._begun = {False: _Begun(), True: _Begun()}

    def begin(self, work: int, *, is_large: bool) -> None:
        """Note that the device has been given work."""
        begun = self._begun[is_large]
        if not begun.work:
            begun.since = self._clock()
        begun.work += work

    def end(self, work: int, *, is_large: bool) -> None:
        """Note that the device is done with work that it was given, whatever became of it."""
        begun = self._begun[is_large]
        begun.work -= work
        begun.since = self._clock()

    def note(self, work: int, seconds: float, *, is_large: bool) -> None:
        """Learn how long work took."""
        (self.large if is_large else self.small).note(work, seconds)

    def seconds_until_done(self, small_work: int, large_work: int) -> float:
        """Return in how many seconds so much would be done, all that the device has begun included.

        Without large work, large jobs are not waited for.
        """
        begun = self._left(is_large=False)
        if large_work:
            begun = max(begun, self._left(is_large=True))
        return begun + self.small.seconds(small_work) + self.large.seconds(large_work)

    def _left(self, *, is_large: bool) -> float:
        begun = self._begun[is_large]
        expected = (self.large if is_large else self.small).seconds(begun.work)
        return max(0.0, expected - (self._clock() - begun.since))
