"""Load for `lossgrad bench`: requests at a rate, whatever becomes of them, or a number of them always in flight.

At a rate (open loop), each request has a moment at which it is meant to be sent, drawn beforehand, and its latency counts
from that moment. So a server that stalls is charged for all who would have called in that time, and not only for the one
that waited: what is known as coordinated omission does not happen. How late this process itself sent is kept apart.

Everything runs in one event loop. Its selector is select(): epoll would round every wait up to a millisecond.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from lossgrad.cli.latencies import Latencies
from lossgrad.errors import LossgradError
from lossgrad.results import LossResult, Timing

# Beyond this many unanswered requests none is sent, which counts as an error: the server fell behind long ago.
MAX_OUTSTANDING: Final = 20_000
NOT_SENT: Final = "NOT_SENT"

Send = Callable[[], Awaitable[LossResult | tuple[LossResult, ...]]]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Load:
    """Either `rate` requests a second, at random moments (a Poisson process) or evenly, or `in_flight` at a time."""

    rate: float | None = None
    in_flight: int | None = None
    evenly: bool = False

    def __str__(self) -> str:
        return f"{self.in_flight} in flight" if self.rate is None else f"{self.rate:g}/s"

    def gaps(self, rng: random.Random) -> Iterator[float]:
        """Give the seconds from each request to the next."""
        rate = self.rate or 1.0
        while True:
            yield 1 / rate if self.evenly else rng.expovariate(rate)


@dataclass(slots=True)
class Run:
    """What came of a load."""

    load: Load
    seconds: float = 0.0
    busy_share: float = 0.0  # of one core, by this process
    latencies: Latencies = field(default_factory=Latencies)  # of what was answered, from when it was meant to be sent
    lateness: Latencies = field(default_factory=Latencies)  # of sending, at a rate
    errors: Counter[str] = field(default_factory=Counter)
    server_seconds: Counter[str] = field(default_factory=Counter)  # summed, by stage
    batch_requests: int = 0

    @property
    def request_count(self) -> int:
        """All that were meant to be sent."""
        return len(self.latencies) + sum(self.errors.values())

    @property
    def answered_per_second(self) -> float:
        """The rate of good answers."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def count(self, timing: Timing) -> None:
        """Take note of where the server's time went."""
        for stage in ("queue", "pack", "compute", "unpack"):
            self.server_seconds[stage] += getattr(timing, f"{stage}_seconds")
        self.batch_requests += timing.batch_request_count

    def mean_stages(self) -> dict[str, float]:
        """Return the mean seconds of each stage; `transport` is what is left: the wire, gRPC, encoding, the client."""
        answered = max(1, len(self.latencies))
        stages = {stage: seconds / answered for stage, seconds in self.server_seconds.items()}
        return {"transport": max(0.0, self.latencies.mean - sum(stages.values())), **stages} if stages else {}


def run_loop(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in an event loop whose waits are exact to some microseconds."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)


async def apply_load(load: Load, send: Send, *, warm_up: float, seconds: float, seed: int) -> Run:
    """Send for `warm_up` and then for `seconds`; return what came of the latter, all answers waited for."""
    run = Run(load)
    begin = time.perf_counter() + warm_up
    if load.rate is None:
        await _keep_in_flight(run, load.in_flight or 1, send, begin, begin + seconds)
    else:
        await _keep_rate(run, send, begin, begin + seconds, warm_up, seed)
    return run


async def _keep_rate(run: Run, send: Send, begin: float, end: float, warm_up: float, seed: int) -> None:
    gaps = run.load.gaps(random.Random(seed))  # noqa: S311 - not for secrets
    outstanding: set[asyncio.Task[None]] = set()
    meant_at = begin - warm_up + next(gaps)
    processor = time.process_time()
    measured = False
    while meant_at < end:
        delay = meant_at - time.perf_counter()
        await asyncio.sleep(max(0.0, delay))
        if meant_at >= begin and not measured:
            measured, processor = True, time.process_time()
        if len(outstanding) >= MAX_OUTSTANDING:
            run.errors[NOT_SENT] += meant_at >= begin
        else:
            task = asyncio.create_task(_one(run, send, meant_at, begin))
            outstanding.add(task)
            task.add_done_callback(outstanding.discard)
        meant_at += next(gaps)
    await asyncio.sleep(max(0.0, end - time.perf_counter()))
    run.busy_share = (time.process_time() - processor) / max(1e-9, time.perf_counter() - begin)
    run.seconds = end - begin
    if outstanding:
        await asyncio.wait(outstanding)


async def _keep_in_flight(run: Run, in_flight: int, send: Send, begin: float, end: float) -> None:
    async def caller() -> None:
        while (now := time.perf_counter()) < end:
            await _one(run, send, now, begin)

    callers = [asyncio.create_task(caller()) for _ in range(in_flight)]
    await asyncio.sleep(max(0.0, begin - time.perf_counter()))
    processor = time.process_time()
    await asyncio.wait(callers)
    run.seconds = time.perf_counter() - begin
    run.busy_share = (time.process_time() - processor) / run.seconds
    for task in callers:
        task.result()


async def _one(run: Run, send: Send, meant_at: float, begin: float) -> None:
    """Send a request; note what becomes of it, if it was meant for the measured time."""
    sent_at = time.perf_counter()
    try:
        answer = await send()
    except LossgradError as error:
        if meant_at >= begin:
            run.errors[error.reason or error.code.name] += 1
        return
    if meant_at >= begin:
        run.latencies.add(time.perf_counter() - meant_at)
        run.lateness.add(sent_at - meant_at)
        run.count((answer[0] if isinstance(answer, tuple) else answer).timing)
