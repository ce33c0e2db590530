"""AsyncLossClient against the peer: the same answers as LossClient, cancellation, event loops, streams."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from lossgrad import (
    L1,
    MSE,
    AsyncLossClient,
    Cancelled,
    DeadlineExceeded,
    Huber,
    InvalidRequest,
    LossClient,
    RequestTooLarge,
    SmoothL1,
    Unavailable,
)
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, PeerServer, Refused, status
from tests.client.waiting import other_tasks_end, until

Code = grpc.StatusCode
INPUT = np.array([[0.1, -2.0, 3.0], [0.5, 0.25, -0.75]], np.float32)
TARGET = np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]], np.float32)
ZERO = np.zeros(1)


def pairs(count: int) -> Iterator[tuple[Any, Any]]:
    for number in range(count):
        yield np.array([float(number)]), ZERO


async def async_pairs(count: int) -> AsyncIterator[tuple[Any, Any]]:
    for pair in pairs(count):
        await asyncio.sleep(0)
        yield pair


async def test_every_method_gives_what_the_blocking_client_gives(
    async_client: AsyncLossClient, client: LossClient
) -> None:
    options: dict[str, Any] = {
        "gradient": True,
        "reduction": "sample_mean",
        "weight": np.ones((2, 3)),
        "denominator": 2.0,
    }
    for ours, theirs in (
        (
            await async_client.smooth_l1(INPUT, TARGET, beta=0.5, **options),
            client.smooth_l1(INPUT, TARGET, beta=0.5, **options),
        ),
        (
            await async_client.huber(INPUT, TARGET, delta=0.5, **options),
            client.huber(INPUT, TARGET, delta=0.5, **options),
        ),
        (await async_client.l1(INPUT, TARGET, **options), client.l1(INPUT, TARGET, **options)),
        (await async_client.mse(INPUT, TARGET, **options), client.mse(INPUT, TARGET, **options)),
    ):
        np.testing.assert_array_equal(ours.loss, theirs.loss)
        np.testing.assert_array_equal(ours.gradient, theirs.gradient)
    several = await async_client.compute(torch.ones(2), torch.zeros(2), [SmoothL1(), Huber(2.0)])
    assert [result.value for result in several] == [0.5, 0.5]
    assert isinstance(several[0].loss, torch.Tensor)
    assert (await async_client.info()).server_version == "1.2.3"
    assert 0 < await async_client.ping() < 10


async def test_concurrent_calls_each_get_their_own_answer(async_client: AsyncLossClient) -> None:
    results = await asyncio.gather(*(async_client.l1([float(number)], [0.0]) for number in range(100)))
    assert [result.value for result in results] == list(range(100))


async def test_errors_are_typed_and_found_before_sending_where_they_can_be(target: str, peer: Peer) -> None:
    async with AsyncLossClient(target, max_message_bytes=1000) as client:
        with pytest.raises(InvalidRequest, match="send equal shapes"):
            await client.l1(INPUT, TARGET[:1])
        with pytest.raises(RequestTooLarge, match="the limit is 1000"):
            await client.l1(np.zeros(1000), np.zeros(1000))
        with pytest.raises(InvalidRequest, match="timeout is -1 seconds"):
            await client.l1(INPUT, TARGET, timeout=-1)
    assert len(peer.requests) == 1


async def test_a_timeout_ends_the_call(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    with pytest.raises(DeadlineExceeded):
        await async_client.l1(INPUT, TARGET, timeout=0.05)
    await until(peer.ended)


async def test_cancelling_the_task_cancels_the_call(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    task = asyncio.create_task(async_client.l1(INPUT, TARGET))
    await until(peer.arrived)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(peer.ended)
    assert (await async_client.l1(INPUT, TARGET)).element_count == 6


async def test_closing_ends_the_calls_under_way_without_cancelling_their_tasks(target: str, peer: Peer) -> None:
    peer.hold.clear()
    client = AsyncLossClient(target)
    task = asyncio.create_task(client.l1(INPUT, TARGET))
    await until(peer.arrived)
    await client.close()
    await client.close()
    with pytest.raises(Cancelled, match="closed during the call"):
        await task
    with pytest.raises(RuntimeError, match="this client is closed"):
        await client.l1(INPUT, TARGET)


async def test_unavailable_is_tried_again(target: str, peer: Peer) -> None:
    def fail(_: pb.ComputeLossRequest) -> None:
        if len(peer.requests) < 3:
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL"))

    peer.pushback_ms, peer.fail = 1, fail
    async with AsyncLossClient(target, token="secret") as client:  # noqa: S106
        await client.l1(INPUT, TARGET)
    assert len(peer.requests) == 3
    assert peer.metadata[-1]["authorization"] == "Bearer secret"


async def test_a_server_that_is_not_there_is_unavailable_with_a_hint() -> None:
    async with AsyncLossClient("127.0.0.1:1", retries=0) as client:
        with pytest.raises(Unavailable, match="is a server running there"):
            await client.ping()


async def test_a_server_that_does_not_serve_fails_the_ping(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.health = b"\x08\x02"
    with pytest.raises(Unavailable, match="does not serve now"):
        await async_client.ping()


def test_another_event_loop_is_refused_in_plain_words(target: str, peer: Peer) -> None:
    client = AsyncLossClient(target)  # outside of any loop: it belongs to the first in which it is used
    loops = [asyncio.new_event_loop() for _ in range(2)]
    assert loops[0].run_until_complete(client.l1([2.0], [0.0])).value == 2.0
    for coroutine in (client.l1([2.0], [0.0]), client.info(), client.ping(), client.close()):
        with pytest.raises(RuntimeError, match=r"belongs to another event loop.*in each asyncio\.run"):
            loops[1].run_until_complete(coroutine)
    stream = client.stream([(INPUT, TARGET)], L1())

    async def first() -> Any:
        return await anext(stream)

    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        loops[1].run_until_complete(first())
    loops[0].run_until_complete(client.close())
    for loop in loops:
        loop.close()


async def test_a_client_is_not_pickled(async_client: AsyncLossClient) -> None:
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(async_client)
    with pytest.raises(TypeError, match="make one in each process"):
        copy.deepcopy(async_client)


@pytest.mark.parametrize("source", [pairs, async_pairs])
async def test_a_stream_gives_results_in_order_from_either_kind_of_iterable(
    async_client: AsyncLossClient, peer: Peer, source: Any
) -> None:
    peer.group = lambda answers: [[answer] for answer in reversed(answers)]
    values = [result.value async for result in async_client.stream(source(300), L1(), in_flight=32)]
    assert values == list(range(300))
    assert peer.streams == 1


async def test_small_requests_travel_packed(async_client: AsyncLossClient, peer: Peer) -> None:
    results = await async_client.compute_many(pairs(1000), [L1(), MSE()])
    assert [(one.value, other.value) for one, other in results] == [(n, n * n) for n in range(1000)]
    assert max(peer.messages) == 64
    assert len(peer.messages) <= 40


async def test_large_requests_are_streamed_too(async_client: AsyncLossClient, peer: Peer) -> None:
    array = np.ones(500_000, np.float32)
    source = [(array * number, array) for number in range(6)]
    results = await async_client.compute_many(source, L1(gradient=True), in_flight_bytes=1 << 30)
    assert [result.value for result in results] == [abs(number - 1.0) for number in range(6)]
    assert peer.messages == [1] * 6


async def test_errors_raise_at_their_turn_or_stand_in_place(async_client: AsyncLossClient) -> None:
    source = [*pairs(2), (np.ones(2), ZERO), (None, ZERO), *pairs(1)]
    stream = async_client.stream(source, L1())
    assert [(await anext(stream)).value for _ in range(2)] == [0.0, 1.0]
    with pytest.raises(InvalidRequest, match="send equal shapes"):
        await anext(stream)
    outcomes = await async_client.compute_many(source, L1(), on_error="return")
    assert [isinstance(outcome, InvalidRequest) for outcome in outcomes] == [False, False, True, True, False]


async def test_a_stream_that_breaks_goes_on_where_it_was(async_client: AsyncLossClient, peer: Peer) -> None:
    def break_second(number: int, context: Any) -> None:
        if number == 1:
            context.abort(Code.UNAVAILABLE, "restarting")

    peer.fail_call = break_second
    values = [result.value async for result in async_client.stream(pairs(50), L1(), in_flight=8)]
    assert values == list(range(50))
    assert peer.streams == 2


async def test_a_stream_that_cannot_be_opened_again_raises(target: str, peer: Peer) -> None:
    peer.fail_call = lambda _number, context: context.abort(Code.UNAVAILABLE, "gone")
    async with AsyncLossClient(target, retries=1) as client:
        # Where the call ends while it sends, grpc.aio does not say what it ended with.
        with pytest.raises(Unavailable, match=r"gone|the connection broke"):
            await client.compute_many(pairs(3), L1())
    assert peer.streams == 2


async def test_a_server_that_is_restarted_is_found_again() -> None:
    server = PeerServer()
    port = server.port
    async with AsyncLossClient(server.target, retries=4) as client:
        stream = client.stream(pairs(100), L1(), in_flight=4)
        values = [(await anext(stream)).value for _ in range(10)]
        await asyncio.to_thread(server.stop)
        server = PeerServer(f"127.0.0.1:{port}")
        values += [result.value async for result in stream]
    await asyncio.to_thread(server.stop)
    assert values == list(range(100))


async def test_pairs_are_read_no_further_than_the_window_and_in_the_callers_task(async_client: AsyncLossClient) -> None:
    pulled: list[int] = []
    tasks: set[Any] = set()

    async def source() -> AsyncIterator[tuple[Any, Any]]:
        async for pair in async_pairs(200):
            pulled.append(1)
            tasks.add(asyncio.current_task())
            yield pair

    given = 0
    async for _ in async_client.stream(source(), L1(), in_flight=10):
        assert len(pulled) - given <= 10
        given += 1
    assert given == 200
    assert tasks == {asyncio.current_task()}


async def test_a_request_that_is_never_answered_is_given_up(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    outcomes = await async_client.compute_many(pairs(2), L1(), timeout=0.05, on_error="return")
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 2


async def test_leaving_a_stream_ends_the_call_and_its_task(async_client: AsyncLossClient, peer: Peer) -> None:
    stream = async_client.stream(pairs(1000), L1(), in_flight=8)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until(peer.ended)
    await other_tasks_end()


async def test_cancelling_a_task_in_a_stream_ends_the_call(async_client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    task = asyncio.create_task(async_client.compute_many(pairs(10), L1()))
    await until(peer.arrived)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(peer.ended)
    await other_tasks_end()


async def test_closing_the_client_ends_a_stream(target: str, peer: Peer) -> None:
    peer.hold.clear()
    client = AsyncLossClient(target)
    task = asyncio.create_task(client.compute_many(pairs(10), L1()))
    await until(peer.arrived)
    await client.close()
    with pytest.raises(Cancelled, match="closed during the stream"):
        await task
