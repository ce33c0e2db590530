"""What the tests of AsyncLossClient wait for: an event of another thread, and the end of every task but their own."""

from __future__ import annotations

import asyncio
from typing import Any


async def until(event: Any) -> None:
    """Wait for an event of another thread."""
    assert await asyncio.to_thread(event.wait, 10)


async def other_tasks_end() -> None:
    """Wait until no task is left but the caller's. gRPC's own end a turn of the event loop after a call."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        assert not (await asyncio.wait(others, timeout=10))[1]
    assert asyncio.all_tasks() == {asyncio.current_task()}
