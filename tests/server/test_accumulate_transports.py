"""Accumulations over every transport, from every kind of client, and beside what else the event loop has to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import numpy as np
import pytest

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation, LossFunction, LossTotal
from lossgrad_api.exact_sums import ExactSum
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_server.embedded import EmbeddedServer
from tests.server.accumulate_calls import (
    MSE,
    SUM,
    Answers,
    EndlessCall,
    Stream,
    accumulate,
    config,
    session_on,
    slice_of,
)
from tests.server.calling import Connect, stub_on
from tests.server.serving import PATIENCE_SECONDS, RunningServer


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture
def stub(running: RunningServer, connect: Connect) -> LossServiceStub:
    return stub_on(connect(running.address))


# ---- Other transports and clients ----


async def test_an_asyncio_client_with_generated_classes(running: RunningServer) -> None:
    async with grpc.aio.insecure_channel(running.address) as channel:
        call = LossServiceStub(channel).AccumulateLoss(timeout=PATIENCE_SECONDS)  # type: ignore[no-untyped-call]
        await call.write(config(SUM, snapshot_every_slices=2))
        answers = Answers()
        for number in range(1, 6):
            await call.write(slice_of(number, [float(number)], [0.0], group="even" if number % 2 == 0 else "odd"))
            answers.take(await call.read())
            if number % 2 == 0:
                answers.take(await call.read())
        await call.done_writing()
        answers.take(await call.read())
        assert await call.read() is grpc.aio.EOF
    assert answers.order == "rrsrrsrt"
    assert {name: group.totals[0].sum for name, group in answers.state.groups.items()} == {"even": 6.0, "odd": 9.0}


def test_the_embedded_server_gives_the_same_bytes(stub: LossServiceStub) -> None:
    slices = [slice_of(number, np.arange(5.0) / number, np.zeros(5), group=f"{number % 2}") for number in range(1, 6)]
    expected = accumulate(stub, config(MSE, SUM, snapshot_every_slices=2), slices)
    embedded = EmbeddedServer(device="cpu")
    embedded.start()
    try:
        call = embedded.channel().stream_stream(
            codec.ACCUMULATE_LOSS, pb.AccumulateLossRequest.SerializeToString, pb.AccumulateLossResponse.FromString
        )
        answers = Answers()
        for message in call(iter([config(MSE, SUM, snapshot_every_slices=2), *slices]), timeout=PATIENCE_SECONDS):
            answers.take(message)
        assert answers.order == expected.order
        assert answers.state.to_bytes() == expected.state.to_bytes()
        wrong = call(iter([config(MSE), slice_of(0, [1.0], [1.0])]))
        with pytest.raises(grpc.RpcError) as caught:
            list(wrong)
        assert "slice 0 comes after slice 0" in str(caught.value.details())
    finally:
        embedded.stop()


def test_streams_beside_each_other_do_not_mix(stub: LossServiceStub) -> None:
    streams = [Stream(stub, config(SUM)) for _ in range(8)]
    for number in range(1, 10):
        for factor, stream in enumerate(streams):
            stream.send(slice_of(number, [float(factor * number)], [0.0]))
    for stream in streams:
        stream.close()
    assert [stream.rest().state.overall[0].sum for stream in streams] == [45.0 * factor for factor in range(8)]


# ---- What it costs the event loop ----


def large_state(groups: int, losses: int) -> Accumulation:
    state = Accumulation([LossFunction("mse")] * losses)
    total = LossTotal(ExactSum([1.0, 2.0**-60]), ExactSum([3.0]), 3, 0, 0.1, 0.5)
    for number in range(1, groups + 1):
        state.add(number, f"group {number}", 3, [total] * losses)
    return state


def test_reading_and_writing_a_large_state_lets_others_have_their_turn(running: RunningServer) -> None:
    state = large_state(2000, 16)
    first = codec.encode_config_request(pb.AccumulationConfig(specs=[MSE] * 16), list(state.encoded_parts()))

    async def run() -> tuple[Accumulation, float, float]:
        answers = Answers()

        async def source() -> AsyncIterator[bytes]:
            yield b"".join(first)
            yield slice_of(2001, [1.0], [1.0], group="group 7").SerializeToString()

        async def send(data: bytes) -> None:
            answers.take(pb.AccumulateLossResponse.FromString(data))

        serving = asyncio.create_task(session_on(running, send).run(source(), EndlessCall()))
        began = last = time.perf_counter()
        longest = 0.0
        while not serving.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        await serving
        return answers.state, longest, time.perf_counter() - began

    total, longest, whole = running.run(run())
    assert total.last_sequence == 2001
    assert len(total.groups) == 2000
    # Half a second of work in turns of a millisecond; a machine that is busy may stretch one, but not all of them.
    assert longest < whole / 4
