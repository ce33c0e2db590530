"""CANCELLED that the client did not cause is retried; its own cancellations and timeouts never are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

import lossgrad
from tests.client.peer import Peer
from tests.client.waiting import until

X, Y = np.ones(4, np.float32), np.full(4, 3, np.float32)


def cancel_first(times: int) -> Callable[[int, Any], None]:
    """Return what gives the first calls a status that their caller did not cause."""

    def fail_call(number: int, context: Any) -> None:
        if number <= times:
            context.abort(grpc.StatusCode.CANCELLED, "spurious")

    return fail_call


def test_a_call_that_somebody_else_cancelled_is_made_again(peer: Peer, target: str) -> None:
    peer.fail_call = cancel_first(1)
    with lossgrad.LossClient(target) as client:
        assert client.l1(X, Y).value == 2.0
    assert len(peer.requests) == 2


def test_a_stream_that_somebody_else_cancelled_is_opened_again(peer: Peer, target: str) -> None:
    peer.fail_call = cancel_first(1)
    with lossgrad.LossClient(target) as client:
        assert [result.value for result in client.stream([(X, Y)] * 5, lossgrad.L1())] == [2.0] * 5
    assert peer.streams == 2


@pytest.mark.parametrize("coalesce", [True, False])
async def test_the_same_for_asyncio(peer: Peer, target: str, coalesce: bool) -> None:
    peer.fail_call = cancel_first(1)
    async with lossgrad.AsyncLossClient(target, coalesce=coalesce) as client:
        assert (await client.l1(X, Y)).value == 2.0
        results = [result.value async for result in client.stream([(X, Y)] * 5, lossgrad.L1())]
    assert results == [2.0] * 5


def test_it_ends_when_the_retries_do(peer: Peer, target: str) -> None:
    peer.fail_call = cancel_first(100)
    with lossgrad.LossClient(target, retries=1) as client:
        with pytest.raises(lossgrad.Cancelled):
            client.l1(X, Y)
        assert len(peer.requests) == 2
        with pytest.raises(lossgrad.Cancelled):
            list(client.stream([(X, Y)], lossgrad.L1()))
        assert peer.streams == 2


def test_a_client_that_is_closed_does_not_try_again(peer: Peer, target: str) -> None:
    peer.hold.clear()
    client = lossgrad.LossClient(target)
    outcome: list[BaseException] = []

    def consume() -> None:
        try:
            list(client.stream([(X, Y)], lossgrad.L1()))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    assert peer.arrived.wait(10)
    client.close()
    thread.join(10)
    assert isinstance(outcome[0], lossgrad.Cancelled), outcome
    assert peer.streams == 1


async def test_what_the_caller_cancels_is_not_made_again(peer: Peer, target: str) -> None:
    peer.hold.clear()
    async with lossgrad.AsyncLossClient(target, coalesce=False) as client:
        task = asyncio.ensure_future(client.l1(X, Y))
        await until(peer.arrived)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(peer.ended)
    assert len(peer.requests) == 1


def test_a_call_that_timed_out_is_not_made_again(peer: Peer, target: str) -> None:
    peer.hold.clear()
    with lossgrad.LossClient(target) as client, pytest.raises(lossgrad.DeadlineExceeded):
        client.l1(X, Y, timeout=0.3)
    assert len(peer.requests) == 1
