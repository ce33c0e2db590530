"""Clients that all try again at a server that takes nothing (R08)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

import lossgrad
from lossgrad.throttle import MAX_TOKENS
from tests.server.serving import HeldWorker, RunningServer, StartServer, eventually

X, Y = np.full(64, 3, np.float32), np.ones(64, np.float32)


@dataclass
class Storm:
    """Clients that call on and on, each every so many seconds, and what came of it."""

    address: str
    clients: int
    call_seconds: float
    coalesce: bool
    calls: list[float] = field(default_factory=list)  # when each began
    answered: dict[int, float] = field(default_factory=dict)  # when each client was first answered since `forget`
    wrong: list[object] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def _call(self, number: int) -> None:
        with lossgrad.LossClient(
            self.address, coalesce=self.coalesce
        ) as client:  # two retries, the default: three attempts
            self.done.wait(self.call_seconds * number / self.clients)
            while not self.done.wait(self.call_seconds):
                self.calls.append(time.monotonic())
                try:
                    value = client.l1(X, Y, timeout=5).value
                except lossgrad.Overloaded:
                    continue
                except Exception as error:
                    self.wrong.append(error)
                    continue
                self.answered.setdefault(number, time.monotonic())
                if value != 2.0:
                    self.wrong.append(value)

    def __enter__(self) -> Storm:
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join()


def attempts(running: RunningServer) -> float:
    """Return how many requests have come, in calls of their own and on streams."""
    samples = [sample for family in running.metrics.registry.collect() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "lossgrad_requests_total")


@pytest.mark.parametrize("coalesce", [False, True])
@pytest.mark.parametrize(
    ("clients", "call_seconds", "seconds"), [(15, 0.1, 2), pytest.param(50, 0.25, 10, marks=pytest.mark.faults)]
)
def test_r08_a_retry_storm_ends_by_itself_and_callers_are_served_again(
    start_server: StartServer, clients: int, call_seconds: float, seconds: float, coalesce: bool
) -> None:
    # gRPC's tokens are a channel's, ours for what shares a stream are a target's (throttle.py).
    holders = 1 if coalesce else clients
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=1)  # all but one are refused, with a push-back
    with lossgrad.LossClient(running.address) as one:
        for _ in range(30):  # it knows its pace, which the one batch that is held must not spoil
            one.l1(X, Y)
            worker.wait_for_batch()
        worker.hold()
        inside = threading.Thread(target=lambda: one.l1(X, Y))
        inside.start()
        worker.wait_for_batch()
        before = attempts(running)
        with Storm(running.address, clients, call_seconds, coalesce) as storm:
            # Three attempts each, until the tokens are used up: half of them, one by each failure.
            eventually(lambda: attempts(running) - before > holders * MAX_TOKENS / 2 * 1.2)
            first = (attempts(running) - before) / len(storm.calls)
            attempts_before, calls_before = attempts(running), len(storm.calls)
            time.sleep(seconds)
            more, calls = attempts(running) - attempts_before, len(storm.calls) - calls_before
            assert not storm.answered
            worker.release()
            released_at = time.monotonic()
            eventually(lambda: len(storm.answered) == clients)
        inside.join()
    recovery = max(storm.answered.values()) - released_at
    print(
        f"\nretry storm of {clients} clients: {first:.2f} attempts for each call at first, then {more:.0f} for {calls} in "
        f"{seconds} s, {more / calls:.2f} each; all served {recovery:.2f} s after the server took requests again"
    )
    assert not storm.wrong, storm.wrong[0]
    assert calls > 100
    assert more <= 1.5 * calls
    assert recovery <= 5
