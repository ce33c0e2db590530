"""A line of waiting jobs in which every caller has a turn: one with thousands of requests does not hold up one with one.

Jobs of one caller keep their order. Two kinds of caller are told apart: those whose requests somebody waits for, and bulk,
which goes after them, but not behind them for ever: where a bulk job has waited for AGED_SECONDS, bulk has one turn in
BULK_TURNS. So bulk gets on however much others ask for, and however much bulk waits, the others keep the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final

from lossgrad_server.batching.job import Job

AGED_SECONDS: Final = 0.5
BULK_TURNS: Final = 4

# A request costs something beside its elements; about as much as computing so many.
REQUEST_WORK: Final = 2000


def work_of(job: Job) -> int:
    """Return about how much a job is: elements times losses, and what every request costs."""
    return job.plan.work + REQUEST_WORK


class Priority(StrEnum):
    """Whose turn comes first."""

    NORMAL = "normal"  # somebody waits for the answer
    BULK = "bulk"


class FairLine:
    """Jobs in turns: of each caller one, then of each the next. Not thread-safe."""

    def __init__(self) -> None:
        self._of_caller: dict[str, deque[Job]] = {}
        self._turns: deque[deque[Job]] = deque()  # of those that have a job here, the next first
        self._count = 0
        self.work = 0

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """Give every job, caller by caller."""
        for own in self._turns:
            yield from own

    @property
    def first(self) -> Job:
        """The job whose turn it is."""
        return self._turns[0][0]

    def append(self, job: Job) -> None:
        """Let a job wait behind those of its caller."""
        caller = job.origin.caller
        own = self._of_caller.get(caller)
        if own is None:
            own = self._of_caller[caller] = deque()
            self._turns.append(own)
        own.append(job)
        self._count += 1
        self.work += work_of(job)

    def popleft(self) -> Job:
        """Take the job whose turn it is."""
        own = self._turns[0]
        job = own.popleft()
        self._count -= 1
        self.work -= work_of(job)
        if not own:
            self._turns.popleft()
            del self._of_caller[job.origin.caller]
        elif len(self._turns) > 1:
            self._turns.rotate(-1)
        return job

    def take(self, is_wanted: Callable[[Job], bool]) -> list[Job]:
        """Take the jobs that are wanted, wherever they are."""
        taken = [job for job in self if is_wanted(job)]
        if taken:
            gone = set(taken)
            for caller, own in list(self._of_caller.items()):
                left = [job for job in own if job not in gone]
                own.clear()
                own.extend(left)
                if not left:
                    del self._of_caller[caller]
            self._turns = deque(own for own in self._turns if own)
            self._count -= len(taken)
            self.work -= sum(map(work_of, taken))
        return taken


class Line:
    """What waits for the device in one line: jobs that somebody waits for, and bulk after them. Not thread-safe."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._prompt = FairLine()
        self._bulk = FairLine()
        self._clock_ns = clock_ns
        self._turns_since_bulk = BULK_TURNS

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._prompt) + len(self._bulk)

    def __iter__(self) -> Iterator[Job]:
        """Give every job."""
        yield from self._prompt
        yield from self._bulk

    def of_priority(self, priority: Priority) -> FairLine:
        """Return the jobs of one priority."""
        return self._bulk if priority is Priority.BULK else self._prompt

    @property
    def work(self) -> int:
        """How much waits: the sum of `work_of`."""
        return self._prompt.work + self._bulk.work

    def work_before(self, job: Job) -> int:
        """Return how much would be done before a job that came now."""
        if job.origin.is_bulk:
            return self.work
        before = self._prompt.work
        return before + min(self._bulk.work, before // (BULK_TURNS - 1)) if self._is_bulk_aged() else before

    @property
    def first(self) -> Job:
        """The job whose turn it is."""
        return self._next().first

    def append(self, job: Job) -> None:
        """Let a job wait."""
        (self._bulk if job.origin.is_bulk else self._prompt).append(job)

    def popleft(self) -> Job:
        """Take the job whose turn it is."""
        line = self._next()
        self._turns_since_bulk = 0 if line is self._bulk else self._turns_since_bulk + 1
        return line.popleft()

    def take(self, is_wanted: Callable[[Job], bool]) -> list[Job]:
        """Take the jobs that are wanted, wherever they are."""
        return self._prompt.take(is_wanted) + self._bulk.take(is_wanted)

    def _next(self) -> FairLine:
        if not self._bulk:
            return self._prompt
        if not self._prompt:
            return self._bulk
        is_bulks_turn = self._turns_since_bulk >= BULK_TURNS - 1 and self._is_bulk_aged()
        return self._bulk if is_bulks_turn else self._prompt

    def _is_bulk_aged(self) -> bool:
        return bool(self._bulk) and self._clock_ns() - self._bulk.first.queued_ns > AGED_SECONDS * 1e9
