"""Callers that hang up while their answer is being sent, which is no failure of ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from lossgrad_server.transport import grpc_server
from lossgrad_server.transport.call import Call, Method, Send
from lossgrad_server.transport.transfers import Receiving, Unsent
from tests.server.serving import RunningServer, handled


class GoneContext:
    """The context of a call whose caller is gone."""

    def add_done_callback(self, callback: Any) -> None:
        pass

    def time_remaining(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def write(self, message: bytes) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def no_messages() -> AsyncIterator[bytes]:
    for message in list[bytes]():
        yield message


async def test_a_stream_whose_caller_hung_up_is_cancelled_and_not_failed(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(messages: AsyncIterator[bytes], send: Send, call: Call) -> None:
        await send(b"answer")

    method = Method("/lossgrad_api.v1.LossService/StreamComputeLoss", stream=handler)
    limits = grpc_server._Limits(1024, 10.0, Receiving(10.0), Unsent(1024), grpc_server.UnderWay())
    before = handled(server, "StreamComputeLoss", "CANCELLED") or 0
    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        await grpc_server._stream(method, server.metrics, limits)(no_messages(), GoneContext())
    assert handled(server, "StreamComputeLoss", "CANCELLED") == before + 1
    assert not caplog.records
