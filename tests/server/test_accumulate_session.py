"""One accumulation beside others: what it holds, when it waits, how it ends, what it costs the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_server.errors import RequestError
from lossgrad_server.transport import accumulate as accumulate_module
from lossgrad_server.work import BatchResult, WorkResult
from tests.server.accumulate_calls import MSE, Answers, EndlessCall, Stream, accumulate, config, session_on, slice_of
from tests.server.calling import Connect, stub_on
from tests.server.requests import request, zeros
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

DEADLINE_EXCEEDED, UNAVAILABLE, INTERNAL = 4, 14, 13
NONE = pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_NONE)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture
def stub(running: RunningServer, connect: Connect) -> LossServiceStub:
    return stub_on(connect(running.address))


def gauge(running: RunningServer, name: str, **labels: str) -> float | None:
    return running.metrics.registry.get_sample_value(name, labels)


# ---- What is inside ----


def test_while_a_slice_is_computed_the_next_is_received_and_no_more(start_server: StartServer) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    messages = [config(MSE), *(slice_of(number, [1.0], [2.0]) for number in range(1, 6))]
    taken: list[int] = []

    async def run() -> list[int]:
        async def source() -> AsyncIterator[bytes]:
            for number, message in enumerate(messages):
                taken.append(number)
                yield message.SerializeToString()

        answers: list[bytes] = []

        async def send(data: bytes) -> None:
            answers.append(data)

        worker.hold()
        serving = asyncio.create_task(session_on(running, send).run(source(), EndlessCall()))
        await asyncio.get_running_loop().run_in_executor(None, worker.wait_for_batch)
        for _ in range(20):
            await asyncio.sleep(0)
        while_computing = list(taken)
        worker.release()
        await serving
        assert len(answers) == 6
        return while_computing

    assert running.run(run()) == [0, 1, 2]  # the config, the slice that is computed, and the one that waits


def test_a_caller_that_does_not_read_is_not_read_from(running: RunningServer) -> None:
    """Two answers that nobody takes, a slice that waits: a stream holds no more, however large the data set."""
    taken = 0

    async def run() -> int:
        async def source() -> AsyncIterator[bytes]:
            nonlocal taken
            yield config(NONE, snapshot_every_slices=1).SerializeToString()
            for number in range(1, 30):
                taken = number
                yield slice_of(number, zeros(1000), zeros(1000)).SerializeToString()

        may_send = asyncio.Event()
        count = 0

        async def send(data: bytes) -> None:
            nonlocal count
            await may_send.wait()
            count += 1

        session = session_on(running, send)
        serving = asyncio.create_task(session.run(source(), EndlessCall()))
        await asyncio.get_running_loop().run_in_executor(None, eventually, lambda: len(session._outbox) == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        taken_meanwhile = taken
        may_send.set()
        await serving
        assert count == 29 + 29 + 1
        return taken_meanwhile

    assert running.run(run()) == 2


def test_a_drain_lets_a_stream_end_whose_caller_has_sent_everything(start_server: StartServer) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)

    async def run() -> Answers:
        answers = Answers()
        is_read_out = asyncio.Event()

        async def source() -> AsyncIterator[bytes]:
            yield config(MSE).SerializeToString()
            yield slice_of(1, [1.0], [3.0]).SerializeToString()
            is_read_out.set()

        async def send(data: bytes) -> None:
            answers.take(pb.AccumulateLossResponse.FromString(data))

        worker.hold()
        serving = asyncio.create_task(session_on(running, send).run(source(), EndlessCall()))
        await is_read_out.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        running.server._core.pipeline.drain()
        worker.release()
        await serving
        return answers

    assert running.run(run()).state.overall[0].sum == 4.0


# ---- Waiting ----


def test_a_slice_that_finds_the_queue_full_waits(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=1)
    stub = stub_on(connect(running.address))
    worker.hold()
    other = stub.ComputeLoss.future(request([1.0], [2.0]), timeout=PATIENCE_SECONDS)
    worker.wait_for_batch()
    stream = Stream(stub, config(MSE), slice_of(1, [1.0], [3.0]))
    eventually(lambda: running.batcher._admission._said_at > 0)
    worker.release()
    assert other.result().results
    assert stream.receive().slice.results[0].scalar == 4.0
    stream.close()
    assert stream.rest().state.element_count == 1
    # It was never refused, so nobody counts it as refused.
    assert gauge(running, "lossgrad_rejected_total", reason="queue_full") == 0


def test_a_queue_that_stays_full_ends_the_stream_with_its_state(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate_module, "_QUEUE_PATIENCE_SECONDS", 0.1)
    worker = HeldWorker()
    running = start_server(worker=worker, max_queued_requests=1)
    stub = stub_on(connect(running.address))
    stream = Stream(stub, config(MSE), slice_of(1, [1.0], [3.0]))
    assert stream.receive().slice.sequence == 1
    worker.wait_for_batch()
    worker.hold()
    other = stub.ComputeLoss.future(request([1.0], [2.0]), timeout=PATIENCE_SECONDS)
    worker.wait_for_batch()
    stream.send(slice_of(2, [1.0], [3.0]))
    answers = stream.rest()
    assert answers.order == "s"
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (UNAVAILABLE, "QUEUE_FULL")
    assert answers.failure.retry_seconds == 0.05
    assert answers.last_snapshot.last_sequence == 1
    assert gauge(running, "lossgrad_rejected_total", reason="queue_full") == 1
    worker.release()
    assert other.result().results


def test_a_server_that_warms_up_says_so(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    worker.hold_warm_up()
    running = RunningServer(worker=worker, metrics_port=-1).start(wait=False)
    try:
        answers = accumulate(stub_on(connect(running.address)), config(MSE), slice_of(1, [1.0], [3.0]))
        assert answers.failure is not None
        assert (answers.failure.code, answers.failure.info.reason) == (UNAVAILABLE, "WARMING_UP")
    finally:
        running.stop()


# ---- Ending ----


def test_a_deadline_ends_a_stream(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    stream = Stream(stub, config(MSE), slice_of(1, [1.0], [3.0]), timeout=0.2)
    with pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    worker.release()
    eventually(lambda: gauge(running, "lossgrad_accumulations") == 0)
    assert accumulate(stub, config(MSE), slice_of(1, [1.0], [3.0])).state.element_count == 1


def test_a_caller_that_goes_away_leaves_nothing_behind(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    worker.hold()
    blocking = stub.ComputeLoss.future(request([1.0], [2.0]), timeout=PATIENCE_SECONDS)
    worker.wait_for_batch()
    stream = Stream(stub, config(MSE), slice_of(1, [1.0], [3.0]), slice_of(2, [1.0], [3.0]))
    eventually(lambda: running.batcher.waiting_requests == 1)
    stream.call.cancel()
    eventually(lambda: gauge(running, "lossgrad_accumulations") == 0)
    worker.release()
    assert blocking.result().results
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1  # the slice was dropped, not computed in vain


class WithoutTotals(HeldWorker):
    """A worker that forgets what it was asked for."""

    def run(self, items: Any) -> BatchResult:
        result = super().run(items)
        outcomes = [WorkResult(one.scalars, one.outputs) for one in result.outcomes if isinstance(one, WorkResult)]
        return BatchResult(list(outcomes), 0, 0, 0)


def test_a_worker_without_totals_is_a_bug_of_ours_and_not_a_total_of_nothing(
    start_server: StartServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    worker = WithoutTotals()
    running = start_server(worker=worker)
    answers = accumulate(stub_on(connect(running.address)), config(MSE), slice_of(1, [1.0], [3.0]))
    assert (answers.order, answers.total) == ("", None)
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (INTERNAL, "INTERNAL")
    assert "Making an answer failed" in caplog.text


def test_sending_that_fails_ends_the_session(running: RunningServer) -> None:
    async def run() -> None:
        async def source() -> AsyncIterator[bytes]:
            yield config(MSE).SerializeToString()
            yield slice_of(1, [1.0], [3.0]).SerializeToString()
            await asyncio.Event().wait()

        async def send(data: bytes) -> None:
            raise ConnectionResetError("the caller has gone")

        with pytest.raises(ConnectionResetError):
            await session_on(running, send).run(source(), EndlessCall())

    running.run(run())
    assert gauge(running, "lossgrad_accumulations") == 0


# ---- What is told of it ----


def test_slices_are_counted_by_what_became_of_them(start_server: StartServer, connect: Connect) -> None:
    running = start_server()
    stub = stub_on(connect(running.address))
    state = accumulate(stub, config(MSE), slice_of(1, [1.0], [2.0])).state
    accumulate(
        stub,
        config(MSE, resume_from=state.to_message()),
        slice_of(1, [1.0], [2.0]),
        slice_of(2, [1.0, float("nan")], [2.0, 3.0]),
        slice_of(3, [1.0], [2.0, 3.0]),
    )
    counts = {
        outcome: gauge(running, "lossgrad_accumulation_slices_total", outcome=outcome)
        for outcome in ("counted", "repeated", "failed")
    }
    assert counts == {"counted": 2, "repeated": 1, "failed": 1}
    labels = {"loss": "mse", "mode": "loss", "api": "accumulate"}
    assert gauge(running, "lossgrad_requests_total", outcome="ok", **labels) == 2
    assert gauge(running, "lossgrad_request_duration_seconds_count", **labels) == 2
    assert gauge(running, "lossgrad_elements_total", loss="mse", mode="loss", dtype="float32", device="cpu") == 3
    assert gauge(running, "lossgrad_nonfinite_results_total", loss="mse", kind="nan") == 1
    refused = {"loss": "unknown", "mode": "unknown", "api": "accumulate", "outcome": "invalid"}
    assert gauge(running, "lossgrad_requests_total", **refused) == 1
    assert gauge(running, "lossgrad_request_bytes_count", api="accumulate") == 6
    assert gauge(running, "lossgrad_response_bytes_count", api="accumulate") == 5
    assert gauge(running, "lossgrad_accumulations") == 0


def test_an_error_is_one_of_ours(running: RunningServer) -> None:
    async def run() -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b""

        async def send(data: bytes) -> None:
            raise AssertionError("nothing is sent")

        with pytest.raises(RequestError, match="send the config first"):
            await session_on(running, send).run(source(), EndlessCall())

    running.run(run())
