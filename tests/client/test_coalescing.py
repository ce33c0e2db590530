"""Concurrent small calls of an AsyncLossClient against the peer: they share a stream, and each keeps what is its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from lossgrad import (
    L1,
    AsyncLossClient,
    Cancelled,
    DeadlineExceeded,
    Huber,
    InvalidRequest,
    LossResult,
    Overloaded,
    Unauthenticated,
    Unavailable,
    call_window,
    coalescer,
)
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, PeerServer, Refused, status
from tests.client.waiting import other_tasks_end, until

Code = grpc.StatusCode
ZERO = np.zeros(1)


def value_of(request: pb.ComputeLossRequest) -> float:
    return float(np.frombuffer(request.input.data, np.float64)[0])


def call(client: AsyncLossClient, number: float, **options: Any) -> Awaitable[LossResult]:
    return client.l1(np.array([float(number)]), ZERO, **options)


async def test_a_thousand_calls_take_few_messages_of_one_stream(async_client: AsyncLossClient, peer: Peer) -> None:
    results = await asyncio.gather(*(call(async_client, number) for number in range(1000)))
    assert [result.value for result in results] == list(range(1000))
    assert peer.streams == 1
    assert sum(peer.messages) == 1000
    assert max(peer.messages) == 64
    assert len(peer.messages) <= 40


@pytest.mark.parametrize("seed", range(5))
async def test_every_caller_gets_its_own_answer_in_whatever_order_they_come(
    async_client: AsyncLossClient, peer: Peer, seed: int
) -> None:
    chance = random.Random(seed)

    def shuffled(answers: list[pb.TaggedResponse]) -> list[list[pb.TaggedResponse]]:
        chance.shuffle(answers)
        cut = chance.randrange(len(answers) + 1)
        return [group for group in (answers[:cut], answers[cut:]) if group]

    peer.group = shuffled
    generator = torch.Generator().manual_seed(seed)

    async def one(size: int) -> None:
        input, target = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
        await asyncio.sleep(chance.random() / 50)
        result = await async_client.smooth_l1(input, target, beta=0.5, gradient=True, reduction="sum")
        leaf = input.clone().requires_grad_()
        expected = torch.nn.functional.smooth_l1_loss(leaf, target, beta=0.5, reduction="sum")
        expected.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.gradient, leaf.grad)

    # One in twenty is beyond what is coalesced.
    sizes = [chance.randrange(1, 2000) if chance.random() < 0.95 else 100_000 for _ in range(120)]
    await asyncio.gather(*map(one, sizes))
    assert sum(peer.messages) == sum(size < 100_000 for size in sizes)


async def test_several_losses_and_options_travel_with_their_call(async_client: AsyncLossClient) -> None:
    ones = np.ones(3, np.float32)
    several, masked, named = await asyncio.gather(
        async_client.compute(ones, ones * 3, [L1(gradient=True), Huber(2.0)]),
        async_client.l1(ones, ones * 4, mask=np.array([True, False, True]), reduction="sum"),
        async_client.mse(ones, ones, idempotency_key="a name"),
    )
    assert [result.value for result in several] == [2.0, 2.0]
    np.testing.assert_array_equal(several[0].gradient, np.full(3, -1 / 3, np.float32))
    several[0].gradient[:] = 0  # its own memory, and writable
    assert (masked.value, masked.element_count) == (6.0, 2)
    assert named.idempotency_key == "a name"


async def test_large_calls_go_beside_the_stream(async_client: AsyncLossClient, peer: Peer) -> None:
    large = np.ones(coalescer.COALESCED_BYTES // 8)
    results = await asyncio.gather(
        *(call(async_client, number) for number in range(10)), async_client.l1(large, large * 3)
    )
    assert [result.value for result in results] == [*range(10), 2.0]
    assert sum(peer.messages) == 10


@pytest.mark.parametrize("how", ["argument", "environment"])
async def test_it_can_be_turned_off(target: str, peer: Peer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("LOSSGRAD_COALESCE", "0")
    async with AsyncLossClient(target, coalesce=False if how == "argument" else None) as client:
        results = await asyncio.gather(*(call(client, number) for number in range(10)))
    assert [result.value for result in results] == list(range(10))
    assert peer.streams == 0


async def test_arrays_may_be_reused_once_a_call_has_begun(async_client: AsyncLossClient) -> None:
    buffer = np.zeros(1)
    tasks = []
    for number in range(600):  # more than the window holds
        buffer[0] = number
        tasks.append(asyncio.create_task(async_client.l1(buffer, ZERO)))
        await asyncio.sleep(0)
    assert [result.value for result in await asyncio.gather(*tasks)] == list(range(600))


async def test_errors_stay_with_their_call(async_client: AsyncLossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if value_of(request) % 3 == 0:
            raise Refused(status(Code.INVALID_ARGUMENT, "three", reason="BAD_PARAMETER", field="input"))

    peer.fail = fail
    outcomes = await asyncio.gather(*(call(async_client, number) for number in range(60)), return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        if number % 3 == 0:
            assert isinstance(outcome, InvalidRequest)
            assert (outcome.field, str(outcome)) == ("input", "three")
        else:
            assert isinstance(outcome, LossResult)
            assert outcome.value == number
    assert peer.streams == 1


async def test_a_timeout_ends_its_own_call_only(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    long = asyncio.gather(*(call(async_client, number) for number in range(5)))
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
        await call(async_client, 99, timeout=0.05)
    peer.hold.set()
    assert [result.value for result in await long] == list(range(5))
    assert peer.streams == 1


async def test_a_timeout_counts_while_a_call_waits_for_the_window(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    tasks = [asyncio.ensure_future(call(async_client, number)) for number in range(call_window.MAX_REQUESTS)]
    await until(peer.arrived)
    with pytest.raises(DeadlineExceeded):
        await call(async_client, -1, timeout=0.05)
    peer.hold.set()
    await asyncio.gather(*tasks)
    assert -1.0 not in [value_of(request) for request in peer.requests]


async def test_cancelling_a_call_leaves_the_others(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    tasks = [asyncio.ensure_future(call(async_client, number)) for number in range(10)]
    await until(peer.arrived)
    for task in tasks[::2]:
        task.cancel()
    peer.hold.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    assert [outcome.value for outcome in outcomes[1::2] if isinstance(outcome, LossResult)] == [1, 3, 5, 7, 9]
    assert peer.streams == 1


async def test_the_server_is_told_when_nobody_waits_any_more(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    tasks = [asyncio.ensure_future(call(async_client, number)) for number in range(10)]
    await until(peer.arrived)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(peer.ended)
    peer.hold.set()
    assert (await call(async_client, 1)).value == 1.0
    assert peer.streams == 2


async def test_what_is_beyond_the_window_is_held_back(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    numbers = range(1000, 2000)  # the peer may still be at what the test before has cancelled
    tasks = [asyncio.ensure_future(call(async_client, number)) for number in numbers]
    await until(peer.arrived)
    await asyncio.sleep(0.05)
    connection = async_client._connection
    assert connection is not None
    assert connection.coalescer is not None
    window = connection.coalescer._window
    assert window._room.requests == call_window.MAX_REQUESTS
    assert len(window._waiting) == 1000 - call_window.MAX_REQUESTS
    peer.hold.set()
    assert [result.value for result in await asyncio.gather(*tasks)] == list(numbers)
    # First come, first served.
    assert [value for request in peer.requests if (value := value_of(request)) >= 1000] == list(numbers)
    assert window.is_idle


async def test_what_the_server_cannot_take_now_is_sent_again(target: str, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        times = sum(value_of(seen) == value_of(request) for seen in peer.requests)
        if times <= value_of(request) % 4:  # refused 0 to 3 times
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.001))

    peer.fail = fail
    async with AsyncLossClient(target, retries=2) as client:
        outcomes = await asyncio.gather(*(call(client, number) for number in range(40)), return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Overloaded if number % 4 == 3 else LossResult)


async def test_a_stream_that_breaks_is_replaced_and_nothing_is_lost(async_client: AsyncLossClient, peer: Peer) -> None:
    contexts: list[Any] = []
    peer.fail_call = lambda _number, context: contexts.append(context)

    def break_once(request: pb.ComputeLossRequest) -> None:
        if value_of(request) == 50.0 and len(contexts) == 1:
            contexts[0].abort(Code.UNAVAILABLE, "restarting")

    peer.fail = break_once
    results = await asyncio.gather(*(call(async_client, number) for number in range(200)))
    assert [result.value for result in results] == list(range(200))
    assert peer.streams == 2


async def test_streams_that_go_on_breaking_fail_the_calls_after_their_retries(target: str, peer: Peer) -> None:
    peer.fail_call = lambda _number, context: context.abort(Code.UNAVAILABLE, "gone")
    async with AsyncLossClient(target, retries=1) as client:
        outcomes = await asyncio.gather(*(call(client, number) for number in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert len(set(map(id, outcomes))) == 3
        assert peer.streams == 2
        peer.fail_call = lambda _number, _context: None
        assert (await call(client, 1)).value == 1.0


async def test_a_stream_that_ends_for_another_reason_fails_at_once(async_client: AsyncLossClient, peer: Peer) -> None:
    contexts: list[Any] = []
    peer.fail_call = lambda _number, context: contexts.append(context)
    peer.fail = lambda _: contexts[0].abort(Code.UNAUTHENTICATED, "who are you")
    outcomes = await asyncio.gather(*(call(async_client, number) for number in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unauthenticated] * 3
    assert peer.streams == 1


async def test_a_server_that_is_not_there_is_unavailable_with_a_hint() -> None:
    async with AsyncLossClient("127.0.0.1:1", retries=0) as client:
        with pytest.raises(Unavailable, match="is a server running there"):
            await call(client, 1)


async def test_a_server_that_is_restarted_is_found_again() -> None:
    server = PeerServer()
    port = server.port
    async with AsyncLossClient(server.target, retries=4) as client:
        server.peer.hold.clear()
        tasks = [asyncio.ensure_future(call(client, number)) for number in range(400)]
        await until(server.peer.arrived)
        await asyncio.to_thread(server.stop)
        server = PeerServer(f"127.0.0.1:{port}")
        results = await asyncio.gather(*tasks)
        assert [result.value for result in results] == list(range(400))
        assert len(server.peer.requests) >= 336
    await asyncio.to_thread(server.stop)


async def test_a_server_that_drains_is_left_for_another_stream(async_client: AsyncLossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if peer.streams == 1 and value_of(request) >= 5:
            raise Refused(status(Code.UNAVAILABLE, "drains", reason="DRAINING", retry_after=0.001))

    peer.fail = fail
    results = await asyncio.gather(*(call(async_client, number) for number in range(10)))
    assert [result.value for result in results] == list(range(10))
    assert peer.streams == 2


async def test_streams_do_not_get_old(
    async_client: AsyncLossClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescer, "MAX_AGE_SECONDS", 0.02)
    monkeypatch.setattr(coalescer, "MAX_IDLE_SECONDS", 0.005)  # how often the age is looked at, too
    peer.group = lambda answers: [[answer] for answer in reversed(answers)]
    rounds = 0
    async with asyncio.timeout(20):
        while peer.streams < 4:
            results = await asyncio.gather(*(call(async_client, number) for number in range(100)))
            assert [result.value for result in results] == list(range(100))
            rounds += 1
    assert len(peer.requests) == 100 * rounds  # none was sent twice


async def test_a_stream_that_is_not_used_is_ended_and_nothing_is_left_running(
    async_client: AsyncLossClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescer, "MAX_IDLE_SECONDS", 0.02)
    for streams in (1, 2):
        peer.ended.clear()
        assert (await call(async_client, 3)).value == 3.0
        await until(peer.ended)
        await other_tasks_end()
        assert peer.streams == streams


async def test_closing_ends_the_calls_without_cancelling_their_tasks(target: str, peer: Peer) -> None:
    peer.hold.clear()
    client = AsyncLossClient(target)
    tasks = [asyncio.ensure_future(call(client, number)) for number in range(1000)]
    await until(peer.arrived)
    await client.close()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Cancelled] * 1000
    assert len(set(map(id, outcomes))) == 1000
    await other_tasks_end()
    await until(peer.ended)


async def test_a_fault_of_ours_reaches_the_callers_and_the_next_calls_work(
    async_client: AsyncLossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def receive(*_: Any) -> None:
        raise LookupError("a fault")

    with monkeypatch.context() as patched:
        patched.setattr(call_window.CallWindow, "receive", receive)
        with pytest.raises(LookupError, match="a fault"):
            await asyncio.gather(*(call(async_client, number) for number in range(3)))
    assert (await call(async_client, 2)).value == 2.0


async def test_a_failure_to_open_a_stream_reaches_the_callers(
    async_client: AsyncLossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_stream() -> Any:
        raise LookupError("no stream")

    await async_client.info()
    connection = async_client._connection
    assert connection is not None
    monkeypatch.setattr(connection.coalescer, "_open_stream", open_stream)
    with pytest.raises(LookupError, match="no stream"):
        await call(async_client, 1)
