"""ModelStreamInfer: many requests on one stream, each answered in a message of its own, in the order in which they came.

The order is Triton's for models that give one answer to a request, and clients without ids rely on it. A request that
fails is answered with its error's text, and the stream goes on. A session belongs to one call and runs in the event
loop's thread. What a stream may have inside is bounded, unsent answers included; beyond that it is not read from.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final

from lossgrad_api.wire import Buffer
from lossgrad_server.errors import RequestError
from lossgrad_server.transport.call import Call, Send
from lossgrad_server.transport.open_inference.codec import FINAL_FLAG, stream_error, stream_response_parts
from lossgrad_server.transport.open_inference.infer import InferRequests, PendingInfer
from lossgrad_server.transport.pipeline import Answer, joined

API: Final = "open_inference_stream"


class _Turn:
    """A request's place in the order of answers; `parts` are there once it is answered."""

    __slots__ = ("byte_count", "parts", "request")

    def __init__(self) -> None:
        self.parts: Sequence[Buffer] | None = None
        self.request: PendingInfer | None = None
        self.byte_count = 0


class InferStream:
    """One ModelStreamInfer call."""

    def __init__(self, requests: InferRequests, send: Send, *, max_requests: int, max_bytes: int) -> None:
        self._requests = requests
        self._send = send
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._turns: deque[_Turn] = deque()
        self._inside_bytes = 0
        self._is_answered = asyncio.Event()  # the first turn's
        self._has_room = asyncio.Event()
        self._is_read_out = False

    async def run(self, messages: AsyncIterator[bytes], call: Call) -> None:
        """Serve the call to its end."""
        try:
            async with asyncio.TaskGroup() as tasks:  # where reading or writing fails, the other must not wait for it
                tasks.create_task(self._write())
                async for message in messages:
                    await self._take(message, call)
                    while len(self._turns) >= self._max_requests or self._inside_bytes >= self._max_bytes:
                        self._has_room.clear()
                        await self._has_room.wait()
                self._is_read_out = True
                self._is_answered.set()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for turn in self._turns:
                if turn.request is not None:
                    turn.request.abandon()

    async def _take(self, message: bytes, call: Call) -> None:
        turn = _Turn()
        self._turns.append(turn)

        def on_answer(request: PendingInfer, answer: Answer) -> None:
            turn.request = None
            self._answer(turn, request.infer_plan.model.name, request.request_id.decode(), request, answer)

        try:
            request = self._requests.open(message, call, api=API, on_answer=on_answer)
        except RequestError as error:
            self._answer(turn, "", error.request_id, None, error)
            return
        turn.request = request
        turn.byte_count = request.byte_count
        self._inside_bytes += turn.byte_count
        if await request.prepare():
            self._requests.pipeline.submit([request])

    def _answer(self, turn: _Turn, model: str, request_id: str, request: PendingInfer | None, answer: Answer) -> None:
        if isinstance(answer, RequestError):
            turn.parts = [stream_error(answer.message, model, request_id)]
        else:
            is_flagged = request is not None and request.infer_plan.wants_final_flag
            turn.parts = stream_response_parts([*answer, FINAL_FLAG] if is_flagged else answer)
        if turn is self._turns[0]:
            self._is_answered.set()

    async def _write(self) -> None:
        while not (self._is_read_out and not self._turns):
            if not self._turns or self._turns[0].parts is None:
                self._is_answered.clear()
                await self._is_answered.wait()
                continue
            turn = self._turns[0]
            await self._send(await joined(turn.parts or (), API, self._requests.pipeline.metrics))
            self._turns.popleft()
            self._inside_bytes -= turn.byte_count
            self._has_room.set()
