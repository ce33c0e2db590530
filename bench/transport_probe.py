"""How long an event loop is blocked, seen from inside: on SIGUSR1 the probe prints what it saw as a line of JSON."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from bench.measuring import percentile

_PERIOD_SECONDS: Final = 0.002
# Beyond this the loop was blocked. asyncio itself wakes up to a millisecond late, because epoll counts in milliseconds.
_BLOCKED_SECONDS: Final = 0.002


class LoopProbe:
    """Sees how late the running event loop wakes: what blocks it, or holds the GIL, delays everything else as long."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._waited = core_wait_seconds()

    async def watch(self) -> None:
        """Watch until cancelled, and report on SIGUSR1."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._report)
        while True:
            due = loop.time() + _PERIOD_SECONDS
            await asyncio.sleep(_PERIOD_SECONDS)
            self._lags.append(loop.time() - due)

    def _report(self) -> None:
        lags, self._lags = self._lags, []
        blocked = [lag for lag in lags if lag > _BLOCKED_SECONDS]
        before, self._waited = self._waited, core_wait_seconds()
        report = {
            "max_seconds": max(lags, default=0.0),
            "p50_seconds": percentile(lags, 50) if lags else 0.0,
            "p99_seconds": percentile(lags, 99) if lags else 0.0,
            "blocked_count": len(blocked),
            "blocked_seconds": sum(blocked),
            "core_wait_seconds": self._waited - before,
        }
        print(json.dumps(report), flush=True)


def core_wait_seconds() -> float:
    """Return how long this thread has waited for a core although it could have run; 0 where the system does not say."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(path.read_text().split()[1]) * 1e-9 if path.exists() else 0.0


async def with_probe(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` beside a probe, to its end."""
    watching = asyncio.create_task(LoopProbe().watch())
    try:
        await work
    finally:
        watching.cancel()
