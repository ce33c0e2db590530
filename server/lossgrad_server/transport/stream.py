"""StreamComputeLoss: many independent requests on one stream, answered as they are ready, packed into few messages.

A session belongs to one call and runs in the event loop's thread: the reading side opens and queues requests, answers
fill the outbox as they come, the writing task empties it. What a stream may have inside is bounded, unsent answers
included; beyond that it is not read from, so that backpressure reaches the caller through HTTP/2's flow control.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from google.rpc import status_pb2

from lossgrad_api import codec
from lossgrad_api.raw_bytes import join_without_gil
from lossgrad_server.errors import InvalidRequest, Reason, RequestError
from lossgrad_server.transport.call import Call, Send
from lossgrad_server.transport.checks import malformed
from lossgrad_server.transport.origin import CallOrigin
from lossgrad_server.transport.pipeline import JOIN_IN_THREAD_BYTES, Answer, PendingComputeLoss, RequestPipeline
from lossgrad_server.transport.status import to_status

API: Final = "stream"

# An answer message is closed at this size; larger ones gain nothing and hold up the first answers in them.
MESSAGE_BYTES: Final = 4 * 1024 * 1024

# How long the requests of one message are checked before everybody else has a turn. Remembered ones take microseconds; a
# thousand with headers of 64 KiB would hold up the event loop for half a minute.
TURN_SECONDS: Final = 0.005

# Tag, answer, bytes that the request holds, and what to call once the answer is sent or given up.
_Entry = tuple[int, Sequence[codec.Buffer] | status_pb2.Status, int, Callable[[], None]]


class StreamSession:
    """One StreamComputeLoss call."""

    def __init__(self, pipeline: RequestPipeline, send: Send, *, max_requests: int, max_bytes: int) -> None:
        self._pipeline = pipeline
        self._send = send
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._message_bytes = min(MESSAGE_BYTES, max_bytes)
        self._pending: set[PendingComputeLoss] = set()
        self._outbox: deque[_Entry] = deque()
        self._inside_requests = 0  # pending and unsent
        self._inside_bytes = 0
        self._peer = ""
        self._is_over = False
        self._has_answers = asyncio.Event()
        self._has_room = asyncio.Event()
        self._is_read_out = False
        self._origin: CallOrigin

    async def run(self, messages: AsyncIterator[bytes], call: Call) -> None:
        """Serve the call to its end."""
        self._origin = CallOrigin(call)
        self._peer = call.peer
        self._pipeline.unsent.check(lambda: self._peer)
        try:
            async with asyncio.TaskGroup() as tasks:  # where reading or writing fails, the other must not wait for it
                tasks.create_task(self._write())
                reading = tasks.create_task(self._read(messages, call))
                self._pipeline.end_reading.add(reading.cancel)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for request in self._pending:
                request.abandon()
            self._pipeline.end_reading.discard(reading.cancel)
            self._is_over = True
            for *_, let_go in self._outbox:
                let_go()

    async def _read(self, messages: AsyncIterator[bytes], call: Call) -> None:
        """Take what comes. Cancelled when the server drains: what is taken is answered, and then the stream ends."""
        try:
            async for message in messages:
                await self._take(message, call.deadline)
                while self._is_full():
                    self._has_room.clear()
                    await self._has_room.wait()
        finally:
            self._is_read_out = True
            self._has_answers.set()

    def _is_full(self) -> bool:
        return self._inside_requests >= self._max_requests or self._inside_bytes >= self._max_bytes

    async def _take(self, message: bytes, stream_deadline: float | None) -> None:
        metrics = self._pipeline.metrics
        metrics.request_bytes.labels(API).observe(len(message))
        try:
            tagged_requests = codec.split_stream_request(message, self._max_requests)
        except codec.CodecError as error:
            raise malformed(error) from None
        now = turn_started = time.monotonic()
        started_ns = time.perf_counter_ns()
        opened: list[PendingComputeLoss] = []
        open_request, on_answer = self._pipeline.open, self._on_answer
        tracer = self._pipeline.tracer
        for tag, timeout_ns, data, start, end, trace in tagged_requests:
            self._inside_requests += 1
            try:
                deadline = _deadline(now, timeout_ns, stream_deadline) if timeout_ns else stream_deadline
                request = open_request(
                    data, start, end, api=API, deadline=deadline, on_answer=on_answer, tag=tag, started_ns=started_ns
                )
            except RequestError as error:
                self._put(tag, to_status(error, error.request_id), 0)
                if tracer is not None:
                    tracer.refused(error, self._origin.call, trace, started_ns)
            else:
                request.origin = self._origin if trace is None else self._origin.traced(trace)
                self._inside_bytes += request.byte_count
                opened.append(request)
            if time.monotonic() - turn_started > TURN_SECONDS:
                self._submit(opened)
                opened = []
                await asyncio.sleep(0)
                turn_started = time.monotonic()
                started_ns = time.perf_counter_ns()
        self._submit(opened)

    def _submit(self, opened: list[PendingComputeLoss]) -> None:
        self._pending.update(opened)
        self._pipeline.submit(opened)

    def _on_answer(self, request: PendingComputeLoss, answer: Answer) -> None:
        self._pending.remove(request)
        if isinstance(answer, RequestError):
            self._put(request.tag, to_status(answer, answer.request_id), request.byte_count)
        else:
            on_sent = None if self._pipeline.tracer is None else request.sent
            self._put(request.tag, answer, request.byte_count, on_sent)

    def _put(
        self,
        tag: int,
        outcome: Sequence[codec.Buffer] | status_pb2.Status,
        byte_count: int,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        if self._is_over:
            return
        let_go = self._pipeline.unsent.hold(self._peer, byte_count)
        if on_sent is not None:
            let_go = _both(let_go, on_sent)
        self._outbox.append((tag, outcome, byte_count, let_go))
        self._has_answers.set()

    async def _write(self) -> None:
        while True:
            if not self._outbox:
                if self._is_read_out and not self._pending:
                    return
                self._has_answers.clear()
                await self._has_answers.wait()
                continue
            await self._send_some()

    async def _send_some(self) -> None:
        entries: list[tuple[int, Sequence[codec.Buffer] | status_pb2.Status]] = []
        sent: list[Callable[[], None]] = []
        size = held_bytes = 0
        while self._outbox:
            tag, outcome, byte_count, let_go = self._outbox[0]
            size += _size(outcome)
            if entries and size > self._message_bytes:  # one by itself fits the limit: checks.py sees to it
                break
            self._outbox.popleft()
            entries.append((tag, outcome))
            held_bytes += byte_count
            sent.append(let_go)
        if size <= JOIN_IN_THREAD_BYTES:
            message = codec.encode_stream_response(entries)
        else:
            parts = codec.stream_response_parts(entries)
            message = await asyncio.get_running_loop().run_in_executor(None, join_without_gil, parts)
        self._pipeline.metrics.response_bytes.labels(API).observe(len(message))
        try:
            await self._send(message)
        finally:
            for let_go in sent:
                let_go()
        self._inside_requests -= len(entries)
        self._inside_bytes -= held_bytes
        self._has_room.set()


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _size(outcome: Sequence[codec.Buffer] | status_pb2.Status) -> int:
    """Return the bytes that an answer takes in a message; 32 are more than its tag and lengths take."""
    if isinstance(outcome, status_pb2.Status):
        return 32 + outcome.ByteSize()
    return 32 + (len(outcome[0]) if len(outcome) == 1 else sum(map(len, outcome)))


def _deadline(now: float, timeout_ns: int, stream_deadline: float | None) -> float | None:
    if timeout_ns < 0:
        raise InvalidRequest(
            f"timeout_ns is {timeout_ns}; send 0 for none, or how long you will wait in nanoseconds",
            reason=Reason.BAD_TIMEOUT,
            field="timeout_ns",
        )
    deadline = now + timeout_ns * 1e-9
    return deadline if stream_deadline is None else min(deadline, stream_deadline)
