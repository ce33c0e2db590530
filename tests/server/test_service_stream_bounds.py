"""What a stream may hold of the server: its memory, its messages, its event loop's time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.transport.stream import StreamSession
from tests.server.calling import Caller, Connect, answers_by_tag, message, stub_on
from tests.server.requests import L1, request, zeros
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 3, 4, 8, 14
GOOD = request([1.0, 2.0], [3.0, 5.0])
NONE = pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_NONE)


def test_no_answer_message_is_larger_than_the_limit(start_server: StartServer, connect: Connect) -> None:
    """Small answers before a large one must not push their common message over what the caller takes."""
    limit = 65536
    worker = HeldWorker()
    running = start_server(worker=worker, max_message_bytes=limit)
    channel = grpc.insecure_channel(running.address, options=[("grpc.max_receive_message_length", limit)])
    with channel:
        worker.hold()
        caller = Caller()
        answers = stub_on(channel).StreamComputeLoss(iter(caller), timeout=PATIENCE_SECONDS)
        caller.send(message(request(zeros(1), zeros(1), L1)))
        worker.wait_for_batch()
        scalar = request(zeros(1), zeros(1), L1)
        large = request(zeros(7700), zeros(7700), NONE, NONE)  # the largest answer that the limit lets through
        caller.send(message(*[scalar] * 100, first_tag=1))
        caller.send(message(large, first_tag=101))
        caller.send(message(*[scalar] * 300, first_tag=102))
        eventually(lambda: running.batcher.waiting_requests == 101)  # then the stream is full
        caller.close()
        worker.release()
        messages = list(answers)
    assert sorted(answers_by_tag(messages)) == list(range(402))
    assert all(answer.WhichOneof("outcome") == "response" for one in messages for answer in one.responses)
    assert max(one.ByteSize() for one in messages) <= limit
    assert max(one.ByteSize() for one in messages) > 60_000  # the large one was at the limit


def test_a_reader_that_does_not_read_keeps_nobody_else_from_being_served(
    start_server: StartServer, connect: Connect
) -> None:
    running = start_server(max_stream_requests=4)
    stalled_stub, stub = stub_on(connect(running.address)), stub_on(connect(running.address))
    sent = 0

    def messages() -> Iterator[pb.StreamComputeLossRequest]:
        nonlocal sent
        for sent in range(200):
            yield message(request(zeros(30_000), zeros(30_000), NONE), first_tag=sent)

    stalled = stalled_stub.StreamComputeLoss(messages(), timeout=PATIENCE_SECONDS)
    eventually(lambda: sent > 8)  # more than the stream may have inside
    for _ in range(20):
        assert stub.ComputeLoss(GOOD, timeout=PATIENCE_SECONDS).results
    assert sorted(answers_by_tag(list(stalled))) == list(range(200))


class StalledCall:
    """A call whose deadline never comes, for sessions without a transport."""

    method = codec.STREAM_COMPUTE_LOSS
    metadata: dict[str, str | bytes] = {}  # noqa: RUF012
    deadline = None
    peer = "inproc"
    begun_ns = 0


@pytest.mark.parametrize(
    ("max_requests", "max_bytes", "elements", "taken"),
    [
        (8, 1 << 30, 1, 2),  # messages of four requests, eight inside
        (5, 1 << 30, 1, 2),  # a message that is there is taken whole
        (1 << 30, 40_000, 1000, 4),  # 12,000 bytes in each, answers included
        (1 << 30, 1, 1, 1),
    ],
)
def test_a_stream_is_not_read_from_while_it_is_full(
    server: RunningServer, max_requests: int, max_bytes: int, elements: int, taken: int
) -> None:
    per_message = 4 if elements == 1 else 1
    one = message(*[request(zeros(elements), zeros(elements), NONE)] * per_message).SerializeToString()
    count = 0

    async def run() -> None:
        nonlocal count
        may_send = asyncio.Event()
        full = asyncio.Event()
        answered = 0

        async def messages() -> AsyncIterator[bytes]:
            nonlocal count
            for _ in range(20):
                count += 1
                yield one

        async def send(data: bytes) -> None:
            nonlocal answered
            full.set()
            await may_send.wait()
            answered += len(pb.StreamComputeLossResponse.FromString(data).responses)

        session = StreamSession(server.server._core.pipeline, send, max_requests=max_requests, max_bytes=max_bytes)
        running = asyncio.create_task(session.run(messages(), StalledCall()))
        await full.wait()
        # All that is inside has been computed and waits to be sent; nothing else can happen but reading.
        await asyncio.get_running_loop().run_in_executor(None, eventually, lambda: not session._pending)
        for _ in range(10):
            await asyncio.sleep(0)
        assert count == taken
        may_send.set()
        await running
        assert (count, answered) == (20, 20 * per_message)
        assert (session._inside_requests, session._inside_bytes) == (0, 0)

    server.run(run())


def test_checking_a_message_lets_others_have_their_turn(server: RunningServer) -> None:
    """Requests with headers of 64 KiB take milliseconds each to refuse; a message may hold a thousand of them."""
    slow = pb.ComputeLossRequest(specs=[pb.LossSpec()] * 30_000)
    one = message(*[slow] * 6).SerializeToString()

    async def run() -> tuple[int, int]:
        turns = answered = 0

        async def messages() -> AsyncIterator[bytes]:
            yield one

        async def send(data: bytes) -> None:
            nonlocal answered
            answered += len(pb.StreamComputeLossResponse.FromString(data).responses)

        session = StreamSession(server.server._core.pipeline, send, max_requests=1024, max_bytes=1 << 30)
        running = asyncio.create_task(session.run(messages(), StalledCall()))
        while not running.done():
            turns += 1
            await asyncio.sleep(0)
        await running
        return turns, answered

    turns, answered = server.run(run())
    assert answered == 6
    assert turns > 5
