"""A small call of an AsyncLossClient that is connected: a future for whoever waits for it, a coroutine for who wants one."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import numpy as np
import pytest

from lossgrad import AsyncLossClient, DeadlineExceeded, InvalidRequest, LossResult
from lossgrad.calls import UNCUT_BYTES
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, Refused, status
from tests.client.waiting import until

ZERO = np.zeros(1)


def call(client: AsyncLossClient, number: float, **options: Any) -> Any:
    return client.l1(np.array([float(number)]), ZERO, **options)


@pytest.fixture
async def client(async_client: AsyncLossClient, peer: Peer) -> AsyncLossClient:
    """A client that has connected: from then on a small call is begun when it is made."""
    await call(async_client, 0)
    peer.arrived.clear()
    return async_client


async def test_calls_are_futures_and_take_no_tasks(client: AsyncLossClient) -> None:
    tasks = asyncio.all_tasks()
    calls = [call(client, number) for number in range(100)]
    assert all(map(asyncio.isfuture, calls))
    assert len(asyncio.all_tasks() - tasks) == 1  # the writer
    results = await asyncio.gather(*calls)
    assert [result.value for result in results] == list(range(100))


async def test_whatever_takes_a_coroutine_or_an_awaitable_takes_a_call(client: AsyncLossClient) -> None:
    assert asyncio.iscoroutine(call(client, 0))
    assert (await asyncio.create_task(call(client, 1))).value == 1
    assert (await asyncio.wait_for(call(client, 2), 10)).value == 2
    assert (await asyncio.shield(call(client, 3))).value == 3
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(client, number)) for number in range(4, 7)]
    assert [task.result().value for task in tasks] == [4, 5, 6]
    completed = [(await answer).value for answer in asyncio.as_completed([call(client, number) for number in range(5)])]
    assert sorted(completed) == list(range(5))
    done = call(client, 7)
    await asyncio.shield(done)
    assert (await asyncio.create_task(done)).value == 7  # answered before the task asks


async def test_a_call_is_sent_though_nobody_awaits_it_yet(client: AsyncLossClient, peer: Peer) -> None:
    begun = call(client, 5)
    await until(peer.arrived)
    assert (await begun).value == 5


@pytest.mark.parametrize("is_task", [False, True])
async def test_cancelling_one_leaves_the_others(client: AsyncLossClient, peer: Peer, is_task: bool) -> None:
    peer.hold.clear()
    calls = [asyncio.create_task(call(client, n)) if is_task else call(client, n) for n in range(10)]
    await until(peer.arrived)
    for each in calls[::2]:
        assert each.cancel()
    peer.hold.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    assert [outcome.value for outcome in outcomes[1::2] if isinstance(outcome, LossResult)] == [1, 3, 5, 7, 9]
    assert not calls[1].cancel()
    assert peer.streams == 1


async def test_the_server_is_told_when_a_gather_is_cancelled(client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    gathered = asyncio.gather(*(call(client, number) for number in range(10)))
    await until(peer.arrived)
    gathered.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathered
    await until(peer.ended)
    peer.hold.set()
    assert (await call(client, 1)).value == 1
    assert peer.streams == 2


async def test_closing_it_as_a_coroutine_gives_it_up(client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    begun = call(client, 1)
    await until(peer.arrived)
    begun.close()
    assert begun.cancelled()
    await until(peer.ended)


async def test_an_error_thrown_into_its_task_is_raised_there(client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.create_task(call(client, 1))
    peer.hold.set()


async def test_errors_are_raised_where_it_is_awaited(client: AsyncLossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        raise Refused(status(grpc.StatusCode.INVALID_ARGUMENT, "three", reason="BAD_PARAMETER", field="input"))

    wrong = [call(client, 1, timeout=-1.0), client.l1("a", ZERO), client.l1(ZERO, ZERO, weight="b")]
    peer.fail = fail
    outcomes = await asyncio.gather(*wrong, call(client, 3), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InvalidRequest] * 4
    assert str(outcomes[3]) == "three"


async def test_its_timeout_is_its_own(client: AsyncLossClient, peer: Peer) -> None:
    peer.hold.clear()
    calls = [call(client, number) for number in range(5)]
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
        await call(client, 99, timeout=0.05)
    peer.hold.set()
    assert [result.value for result in await asyncio.gather(*calls)] == list(range(5))


async def test_options_are_kept(client: AsyncLossClient) -> None:
    ones = np.ones(3, np.float32)
    masked, named, spread = await asyncio.gather(
        client.l1(ones, ones * 4, mask=np.array([True, False, True]), reduction="sum"),
        client.mse(ones, ones, idempotency_key="a name"),
        client.l1(ones, np.zeros(1, np.float32), allow_broadcast=True, reduction="sum"),
    )
    assert (masked.value, masked.element_count) == (6.0, 2)
    assert named.idempotency_key == "a name"
    assert spread.value == 3.0


async def test_answered_calls_leave_no_cycles_behind(client: AsyncLossClient) -> None:
    await asyncio.gather(*(call(client, number) for number in range(64)))
    gc.collect()
    gc.disable()
    try:
        await asyncio.gather(*(call(client, number) for number in range(512)))
        assert gc.collect() < 512  # less than one object each
    finally:
        gc.enable()


async def test_what_might_have_to_be_cut_is_a_coroutine_as_ever(client: AsyncLossClient) -> None:
    small, large = np.ones(UNCUT_BYTES // 32), np.ones(UNCUT_BYTES // 16)
    for _ in range(2):  # the second time its form is known
        begun, begun_large = client.l1(small, small * 2), client.l1(large, large * 2)
        broadcast = client.l1(small[:, None], small * 2, allow_broadcast=True)
        assert [asyncio.isfuture(each) for each in (begun, begun_large, broadcast)] == [True, False, False]
        assert [result.value for result in await asyncio.gather(begun, begun_large, broadcast)] == [1.0, 1.0, 1.0]
