"""What a peer that stalls may cost: time for a request that it does not finish, memory for answers that it does not read.

Everything runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import grpc.aio

from lossgrad_server.errors import DeadlinePassed, InvalidRequest, Reason, Unavailable
from lossgrad_server.transport.origin import caller_of

_LOOK_SECONDS: Final = 1.0

# Answers below this are not worth counting while they are sent: there are no more of them than calls.
COUNTED_BYTES: Final = 64 * 1024


class Receiving:
    """The unary calls whose request is being received. One look at all of them every second costs less than timers."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._since: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def message(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Return a call's one message. Raises RequestError where it does not come."""
        task: Any = asyncio.current_task()
        self._since[task] = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._look())
        try:
            message: Any = await context.read()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise DeadlinePassed(
                f"the call's message did not come within {self._timeout_seconds:g} s; send it faster, or send smaller ones"
            ) from None
        finally:
            self._since.pop(task, None)
            self._late.discard(task)
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call has no message; send one", reason=Reason.MALFORMED_MESSAGE)
        return message  # type: ignore[no-any-return]

    async def _look(self) -> None:
        while self._since:
            await asyncio.sleep(_LOOK_SECONDS)
            oldest = time.monotonic() - self._timeout_seconds
            for task in [task for task, since in self._since.items() if since < oldest]:
                del self._since[task]
                self._late.add(task)
                task.cancel()
        self._watch = None


class Unsent:
    """The bytes of answers that are computed and not sent, caller by caller.

    gRPC holds an answer until its caller has read it, however long that takes, and lets no handler end such a call. So a
    caller with too much of it gets nothing more until it reads: what callers can make the server hold is bounded, and what
    one does costs the others nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes: dict[str, int] = {}

    def hold(self, peer: str, byte_count: int) -> Callable[[], None]:
        """Count the bytes of an answer; return what to call, once, when it is sent or given up."""
        if byte_count < COUNTED_BYTES:
            return _nothing
        caller = caller_of(peer)
        self._bytes[caller] = self._bytes.get(caller, 0) + byte_count

        def let_go() -> None:
            left = self._bytes[caller] - byte_count
            if left:
                self._bytes[caller] = left
            else:
                del self._bytes[caller]

        return let_go

    def check(self, peer: Callable[[], str]) -> None:
        """Refuse a caller that has too much to read. Raises Unavailable."""
        if self._bytes and (held := self._bytes.get(caller_of(peer()), 0)) > self._limit_bytes:
            raise Unavailable(
                f"{held} bytes of answers wait for this caller to read them, at most {self._limit_bytes} may; read them, "
                "and try again",
                reason=Reason.QUEUE_BYTES_FULL,
                retry_after_seconds=1.0,
            )


def _nothing() -> None:
    pass
