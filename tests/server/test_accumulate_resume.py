"""Whatever breaks a stream, and wherever: going on from the last state gives the same bytes, and nothing counts twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossgrad_api.accumulation import Accumulation
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.accumulate_calls import MSE, SMOOTH_L1, Stream, accumulate, config, numbers, slice_of
from tests.server.calling import Connect, stub_on
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

UNAVAILABLE, INVALID_ARGUMENT = 14, 3

X, Y = numbers(7 * 5000, 1).reshape(7, 5000), numbers(7 * 5000, 2).reshape(7, 5000)
GROUPS = ("a", "", "a", "b", "b", "a", "")
SLICES = [slice_of(10 * (index + 1), X[index], Y[index], group=GROUPS[index]) for index in range(7)]
WITH_GRADIENT = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5), include_gradient=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[LossServiceStub, LossServiceStub]]:
    """Return stubs to two servers."""
    with (
        RunningServer() as first,
        RunningServer() as second,
        grpc.insecure_channel(first.address) as to_first,
        grpc.insecure_channel(second.address) as to_second,
    ):
        yield stub_on(to_first), stub_on(to_second)


@pytest.fixture(scope="module")
def expected(servers: tuple[LossServiceStub, LossServiceStub]) -> bytes:
    """Return the total of all slices over one stream that nothing disturbs."""
    return accumulate(servers[0], config(SMOOTH_L1, MSE), SLICES).state.to_bytes()


def after(state: Accumulation | None) -> list[pb.AccumulateLossRequest]:
    """Return the slices that a state does not hold."""
    return [one for one in SLICES if state is None or one.slice.sequence > state.last_sequence]


def resumed(state: Accumulation | None, *specs: pb.LossSpec, **more: int) -> pb.AccumulateLossRequest:
    return config(*(specs or (SMOOTH_L1, MSE)), resume_from=state.to_message() if state is not None else None, **more)


# ---- Streams that break ----


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("read", range(8))
def test_a_stream_that_was_killed_at_any_slice_is_gone_on_from_its_last_snapshot(
    servers: tuple[LossServiceStub, LossServiceStub], expected: bytes, every: int, read: int
) -> None:
    stream = Stream(servers[0], config(SMOOTH_L1, MSE, snapshot_every_slices=every), *SLICES)
    results, state = 0, None
    while results < read and results < len(SLICES):
        message = stream.receive()
        results += message.HasField("slice")
        if message.HasField("snapshot"):
            state = Accumulation.from_message(message.snapshot)
    stream.call.cancel()
    answers = accumulate(servers[1], resumed(state), after(state))
    assert answers.state.to_bytes() == expected
    assert [one.sequence for one in answers.results] == [one.slice.sequence for one in after(state)]


@settings(max_examples=20)
@given(st.data())
def test_any_number_of_kills_and_servers_gives_the_same_bytes(
    servers: tuple[LossServiceStub, LossServiceStub], expected: bytes, data: st.DataObject
) -> None:
    state: Accumulation | None = None
    for _ in range(data.draw(st.integers(1, 4))):
        stub = data.draw(st.sampled_from(servers))
        # A client that does not know how far it came may begin anywhere before.
        skipped = data.draw(st.integers(0, len(SLICES) - len(after(state))))
        stream = Stream(stub, resumed(state, snapshot_every_slices=1), *SLICES[skipped:])
        for _ in range(data.draw(st.integers(0, 2 * len(SLICES[skipped:])))):
            message = stream.receive()
            if message.HasField("snapshot"):
                state = Accumulation.from_message(message.snapshot)
        stream.call.cancel()
    assert accumulate(servers[0], resumed(state), SLICES).state.to_bytes() == expected


def test_slices_that_the_state_holds_are_acknowledged_and_not_counted(
    servers: tuple[LossServiceStub, LossServiceStub], expected: bytes
) -> None:
    state = accumulate(servers[0], config(SMOOTH_L1, MSE), SLICES[:4]).state
    answers = accumulate(servers[1], resumed(state, snapshot_every_slices=2), SLICES)
    assert answers.state.to_bytes() == expected
    assert [one.sequence for one in answers.results] == [one.slice.sequence for one in SLICES]
    assert [len(one.results) for one in answers.results] == [0] * 4 + [2] * 3
    assert answers.order == "rrrr" + "rrsr" + "t"


def test_a_slice_that_is_sent_again_has_the_same_gradient_and_may_not_even_be_looked_at_if_it_is_held(
    servers: tuple[LossServiceStub, LossServiceStub],
) -> None:
    one = config(WITH_GRADIENT, element_count=X.size)
    first = accumulate(servers[0], one, SLICES)
    again = accumulate(servers[1], one, SLICES)
    for before, behind in zip(first.results, again.results, strict=True):
        assert before.SerializeToString() == behind.SerializeToString()
    empty = pb.AccumulateLossRequest(slice=pb.Slice(sequence=70, group="x" * 1000))
    answers = accumulate(servers[0], resumed(first.state, WITH_GRADIENT, element_count=X.size), empty)
    assert answers.state == first.state
    assert answers.results[0].sequence == 70


def test_a_merged_state_is_gone_on_from_by_a_stream_that_numbers_anew(
    servers: tuple[LossServiceStub, LossServiceStub], expected: bytes
) -> None:
    shards = [
        accumulate(stub, config(SMOOTH_L1, MSE), part).state
        for stub, part in zip(servers, (SLICES[:2], SLICES[5:]), strict=True)
    ]
    merged = Accumulation.merge(shards)
    assert merged.last_sequence == 0
    state = accumulate(servers[0], resumed(merged), SLICES[2:5]).state
    state.last_sequence = SLICES[-1].slice.sequence
    assert state.to_bytes() == expected


def test_the_element_count_is_that_of_all_slices_those_before_included(
    servers: tuple[LossServiceStub, LossServiceStub],
) -> None:
    state = accumulate(servers[0], config(MSE), SLICES[:3]).state
    assert accumulate(servers[0], resumed(state, MSE, element_count=X.size), SLICES[3:]).failure is None
    short = accumulate(servers[0], resumed(state, MSE, element_count=X.size), SLICES[4:])
    assert short.failure is not None
    assert short.failure.info.reason == "ELEMENT_COUNT_MISMATCH"
    assert "hold 30000 elements, but config.element_count is 35000" in short.failure.message
    # What was missing can still be sent.
    rest = accumulate(servers[0], resumed(short.last_snapshot, MSE), slice_of(80, X[3], Y[3], group=GROUPS[3]))
    assert rest.state.element_count == X.size


# ---- Slices that fail ----


def test_a_slice_that_is_refused_costs_no_other_its_place(
    servers: tuple[LossServiceStub, LossServiceStub], expected: bytes
) -> None:
    bad = slice_of(45, X[0], Y[0][:-1])
    answers = accumulate(servers[0], config(SMOOTH_L1, MSE), SLICES[:4], bad, SLICES[4:])
    assert answers.order == "rrrrs"
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (INVALID_ARGUMENT, "SHAPE_MISMATCH")
    assert answers.failure.message.startswith("slice 45: target has shape [4999], input [5000]")
    assert [field for field, _, _ in answers.failure.violations] == ["slice.target.shape"]
    assert accumulate(servers[0], resumed(answers.last_snapshot), SLICES[4:]).state.to_bytes() == expected


def test_no_snapshot_comes_before_an_error_where_the_caller_has_the_state_already(
    servers: tuple[LossServiceStub, LossServiceStub],
) -> None:
    bad = slice_of(45, X[0], Y[0][:-1])
    assert accumulate(servers[0], config(MSE, snapshot_every_slices=2), SLICES[:4], bad).order == "rrsrrs"
    assert accumulate(servers[0], config(MSE), bad).order == ""


def test_a_slice_that_the_worker_fails_is_not_counted(
    start_server: StartServer, connect: Connect, expected: bytes
) -> None:
    worker = HeldWorker()
    stub = stub_on(connect(start_server(worker=worker).address))
    stream = Stream(stub, config(SMOOTH_L1, MSE), *SLICES[:3])
    assert [stream.receive().slice.sequence for _ in range(3)] == [10, 20, 30]
    worker.failure = RuntimeError("the device is on fire")
    stream.send(SLICES[3])
    answers = stream.rest()
    assert answers.order == "s"
    assert answers.failure is not None
    assert answers.failure.info.reason == "INTERNAL"
    assert answers.failure.message.startswith("slice 40: the server failed")
    worker.failure = None
    assert accumulate(stub, resumed(answers.last_snapshot), SLICES[3:]).state.to_bytes() == expected


# ---- Servers that go down ----


def test_a_drain_lets_the_slice_under_way_finish_and_hands_over_the_state(
    start_server: StartServer, connect: Connect, servers: tuple[LossServiceStub, LossServiceStub], expected: bytes
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, drain_delay_seconds=0.0)
    stub = stub_on(connect(running.address))
    stream = Stream(stub, config(SMOOTH_L1, MSE), *SLICES[:2])
    assert [stream.receive().slice.sequence for _ in range(2)] == [10, 20]
    for _ in range(2):
        worker.wait_for_batch()
    worker.hold()
    stream.send(SLICES[2])
    stream.send(SLICES[3])
    worker.wait_for_batch()
    drained = asyncio.run_coroutine_threadsafe(running.server.drain(), running._loop)
    eventually(lambda: running.server._core.pipeline._is_draining)
    worker.release()
    answers = stream.rest()
    assert answers.order == "rs"
    assert answers.results[0].sequence == 30
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (UNAVAILABLE, "DRAINING")
    assert answers.failure.retry_seconds == 0.0
    drained.result(PATIENCE_SECONDS)
    answers = accumulate(servers[0], resumed(answers.last_snapshot), after(answers.last_snapshot))
    assert answers.state.to_bytes() == expected


def test_a_drain_ends_streams_that_wait_for_their_caller_and_refuses_new_ones(
    start_server: StartServer, connect: Connect
) -> None:
    running = start_server(drain_delay_seconds=0.0)
    stub = stub_on(connect(running.address))
    idle = Stream(stub, config(MSE, snapshot_every_slices=1), SLICES[0])
    assert idle.receive().HasField("slice")
    assert idle.receive().HasField("snapshot")
    unopened = Stream(stub)
    eventually(lambda: running.metrics.registry.get_sample_value("lossgrad_accumulations") == 2)
    running.run(_drain_pipeline(running))
    late = accumulate(stub, config(MSE), SLICES[0])
    for answers in (idle.rest(), unopened.rest(), late):
        assert answers.order == ""
        assert answers.failure is not None
        assert answers.failure.info.reason == "DRAINING"
    assert running.metrics.registry.get_sample_value("lossgrad_accumulations") == 0


async def _drain_pipeline(running: RunningServer) -> None:
    running.server._core.pipeline.drain()
