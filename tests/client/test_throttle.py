"""Where most of it fails, little is tried again; where little fails, all of it is."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

import lossgrad
from lossgrad.throttle import MAX_TOKENS, TOKEN_RATIO, RetryThrottle, throttle_of
from tests.client.peer import Peer, PeerServer, Refused, status

X, Y = np.ones(4, np.float32), np.full(4, 3, np.float32)
CALLS = 3 * MAX_TOKENS


@pytest.fixture
def fresh() -> Any:
    """Give a peer of the test's own, whose target nobody else has used up."""
    server = PeerServer()
    yield server
    server.stop()


def test_tokens_are_taken_by_failures_and_given_back_by_successes() -> None:
    throttle = RetryThrottle()
    assert [throttle.failed() for _ in range(MAX_TOKENS)] == [True] * (MAX_TOKENS // 2 - 1) + [False] * (
        MAX_TOKENS // 2 + 1
    )
    throttle.succeeded(round((MAX_TOKENS / 2 + 1) / TOKEN_RATIO))
    assert not throttle.failed()
    throttle.succeeded(round(2 / TOKEN_RATIO))
    assert throttle.failed()
    throttle.succeeded(10**6)
    assert throttle.failed()  # and no more than all are given back
    assert [throttle.failed() for _ in range(MAX_TOKENS)].count(True) == MAX_TOKENS // 2 - 2


def test_a_process_has_one_for_each_target() -> None:
    one = throttle_of("a:1")
    assert throttle_of("a:1") is one
    assert throttle_of("b:1") is not one


def refuse(peer: Peer) -> None:
    def fail(_: object) -> None:
        raise Refused(status(grpc.StatusCode.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.0))

    peer.fail = fail
    peer.pushback_ms = 1


def test_calls_to_a_server_that_refuses_all_are_soon_made_once(fresh: PeerServer) -> None:
    refuse(fresh.peer)
    with lossgrad.LossClient(fresh.target) as client:
        for _ in range(CALLS):
            with pytest.raises(lossgrad.Overloaded):
                client.l1(X, Y)
        attempts = len(fresh.peer.requests)
        assert CALLS < attempts <= CALLS + MAX_TOKENS / 2
        fresh.peer.fail = lambda _: None
        assert client.l1(X, Y).value == 2.0


def test_streams_to_a_server_that_refuses_all_are_soon_made_once(fresh: PeerServer) -> None:
    refuse(fresh.peer)

    async def call(client: lossgrad.AsyncLossClient) -> None:
        with pytest.raises(lossgrad.Overloaded):
            await client.l1(X, Y)

    async def call_all() -> None:
        async with lossgrad.AsyncLossClient(fresh.target) as client:
            for _ in range(CALLS):
                await call(client)
            fresh.peer.fail = lambda _: None
            assert (await client.l1(X, Y)).value == 2.0

    asyncio.run(call_all())
    attempts = len(fresh.peer.requests) - 1
    assert CALLS < attempts <= CALLS + MAX_TOKENS / 2


def test_one_message_of_many_refusals_is_one_failure(fresh: PeerServer) -> None:
    refused = set()

    def fail_once(request: Any) -> None:
        key = request.idempotency_key
        if key not in refused:
            refused.add(key)
            raise Refused(status(grpc.StatusCode.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.0))

    fresh.peer.fail = fail_once
    pairs = [(X, Y, {"idempotency_key": str(number)}) for number in range(CALLS)]
    with lossgrad.LossClient(fresh.target) as client:
        assert [one.value for one in client.stream(pairs, lossgrad.L1())] == [2.0] * CALLS
