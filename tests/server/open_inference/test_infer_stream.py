"""ModelStreamInfer: every request is answered, in the order of the requests, and one that fails fails alone."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from lossgrad_server.transport.open_inference.infer import InferRequests
from lossgrad_server.transport.open_inference.regions import NoRegions
from lossgrad_server.transport.open_inference.statistics import Statistics
from lossgrad_server.transport.open_inference.stream import InferStream
from tests.server.calling import Connect, failure_of
from tests.server.open_inference.asking import infer, infer_request, messages, outputs_of, pair, stub_on
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually


def good(size: int = 3, request_id: str = "", model: str = "smooth_l1_grad", **more: Any) -> Any:
    return infer_request(model, pair(2, size), id=request_id, **more)


def stream(stub: Any, requests: Any) -> list[Any]:
    return list(stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_SECONDS))


class Caller:
    """The sending side of a stream, as a test drives it."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, request: Any) -> None:
        self._requests.put(request)

    def close(self) -> None:
        self._requests.put(None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests.get, None)


def test_answers_come_in_the_order_of_the_requests_with_the_bits_of_model_infer(triton: Any) -> None:
    # Large requests among small ones: they take another way through the server, and longer.
    requests = [good(300_000 if index % 5 == 0 else 1 + index, str(index)) for index in range(40)]
    answers = stream(triton, requests)
    assert [answer.infer_response.id for answer in answers] == [str(index) for index in range(40)]
    assert not any(answer.error_message for answer in answers)
    for request, answer in list(zip(requests, answers, strict=True))[::7]:
        expected = infer(triton, request)
        outputs = outputs_of(answer.infer_response)
        assert {name: one.tobytes() for name, one in outputs.items()} == {
            name: one.tobytes() for name, one in expected.items()
        }


def test_a_request_that_fails_is_answered_with_its_error_and_the_stream_goes_on(triton: Any) -> None:
    bad_shape = good(3, "bad")
    bad_shape.inputs[0].shape[0] = 7
    requests = [good(3, "a"), bad_shape, good(3, "x", model="resnet"), good(3, "b")]
    first, second, third, fourth = stream(triton, requests)
    assert (first.error_message, first.infer_response.id) == ("", "a")
    assert second.error_message == "TARGET has shape [2, 3], INPUT [7, 3]; send equal shapes"
    assert second.infer_response.id == "bad"
    assert third.error_message.startswith("there is no model 'resnet'")
    assert third.infer_response.id == "x"
    assert (fourth.error_message, fourth.infer_response.id) == ("", "b")


def test_bytes_that_are_no_request_fail_alone(server: RunningServer, connect: Connect) -> None:
    call: Callable[..., Any] = connect(server.address).stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    answers = [
        messages.ModelStreamInferResponse.FromString(one)
        for one in call(iter([b"\xff\xff", good().SerializeToString()]), timeout=PATIENCE_SECONDS)
    ]
    assert answers[0].error_message.startswith("the message cannot be read")
    assert len(answers[1].infer_response.outputs) == 3


def test_an_answer_says_that_it_is_the_last_where_it_was_asked_to(triton: Any) -> None:
    asked = good(parameters={"triton_enable_empty_final_response": True})
    first, second = stream(triton, [asked, good()])
    assert first.infer_response.parameters["triton_final_response"].bool_param
    assert "triton_final_response" not in second.infer_response.parameters


def test_an_empty_stream_ends_well(triton: Any) -> None:
    assert stream(triton, []) == []


def test_a_stream_is_answered_while_it_is_open_and_only_as_far_as_the_order_allows(
    start_server: StartServer, connect: Connect
) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    caller = Caller()
    answers = stub_on(connect(running.address)).ModelStreamInfer(iter(caller), timeout=PATIENCE_SECONDS)
    caller.send(good(3, "1"))
    assert next(answers).infer_response.id == "1"
    worker.hold()
    caller.send(good(3, "2"))
    worker.wait_for_batch()
    worker.wait_for_batch()
    caller.send(good(3, "3", model="resnet"))  # fails at once, and waits for its turn
    eventually(lambda: running.batcher.admitted_requests == 1)
    worker.release()
    assert next(answers).infer_response.id == "2"
    assert next(answers).error_message.startswith("there is no model")
    caller.close()
    assert list(answers) == []


def test_a_request_of_a_stream_has_its_own_timeout(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    worker.hold()
    caller = Caller()
    answers = stub_on(connect(running.address)).ModelStreamInfer(iter(caller), timeout=PATIENCE_SECONDS)
    caller.send(good(3, "1"))
    worker.wait_for_batch()
    caller.send(good(3, "2", parameters={"timeout": 1}))
    caller.send(good(3, "3"))
    eventually(lambda: running.batcher.waiting_requests == 2)
    worker.release()
    caller.close()
    first, second, third = answers
    assert (first.infer_response.id, third.infer_response.id) == ("1", "3")
    assert "deadline passed" in second.error_message
    assert second.infer_response.id == "2"


def test_a_caller_that_goes_leaves_nothing_behind(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    worker.hold()
    caller = Caller()
    answers = stub_on(connect(running.address)).ModelStreamInfer(iter(caller), timeout=PATIENCE_SECONDS)
    caller.send(good(3, "0"))
    worker.wait_for_batch()
    for index in range(1, 8):
        caller.send(good(3, str(index)))
    eventually(lambda: running.batcher.waiting_requests == 7)
    answers.cancel()
    registry = running.metrics.registry
    labels = {
        "grpc_type": "bidi_stream",
        "grpc_service": "inference.GRPCInferenceService",
        "grpc_method": "ModelStreamInfer",
        "grpc_code": "CANCELLED",
    }
    eventually(lambda: registry.get_sample_value("grpc_server_handled_total", labels) == 1)
    worker.release()
    eventually(lambda: running.batcher.admitted_requests == 0)
    assert worker.batch_count == 1  # the seven that waited were dropped
    caller.close()


def test_a_message_over_the_limit_ends_the_stream(start_server: StartServer, connect: Connect) -> None:
    stub = stub_on(connect(start_server(max_message_bytes=65_536).address))
    with pytest.raises(grpc.RpcError) as caught:
        stream(stub, [good(10_000)])
    assert failure_of(caught.value).info.reason == "MESSAGE_TOO_LARGE"


# ---- Bounds ----


class StalledCall:
    """A call whose deadline never comes, for sessions without a transport."""

    method = "/inference.GRPCInferenceService/ModelStreamInfer"
    metadata: dict[str, str | bytes] = {}  # noqa: RUF012
    deadline = None
    peer = "inproc"
    begun_ns = 0


@pytest.mark.parametrize(
    ("max_requests", "max_bytes", "taken"), [(5, 1 << 30, 5), (1 << 30, 100_000, 3), (1 << 30, 1, 1)]
)
def test_a_stream_is_not_read_from_while_it_is_full(
    server: RunningServer, max_requests: int, max_bytes: int, taken: int
) -> None:
    one = good(2000).SerializeToString()  # 2 rows of 2000: 32,000 bytes in, and 16,032 out that count too
    read = 0

    async def serve() -> None:
        nonlocal read
        nobody_reads = asyncio.Event()
        reads_again = asyncio.Event()
        sent = 0

        async def requests() -> AsyncIterator[bytes]:
            nonlocal read
            for _ in range(20):
                read += 1
                yield one

        async def send(message: bytes) -> None:
            nonlocal sent
            nobody_reads.set()
            await reads_again.wait()
            sent += 1

        pipeline = server.server._core.pipeline
        infer_requests = InferRequests(pipeline, NoRegions(), Statistics(), 1 << 30)
        session = InferStream(infer_requests, send, max_requests=max_requests, max_bytes=max_bytes)
        task = asyncio.create_task(session.run(requests(), StalledCall()))
        await nobody_reads.wait()
        for _ in range(100):  # whatever can go on goes on
            await asyncio.sleep(0.001)
        assert read == taken
        reads_again.set()
        await task
        assert (read, sent) == (20, 20)

    server.run(serve())


def test_a_stream_whose_caller_does_not_take_the_answers_ends_with_the_writers_error(server: RunningServer) -> None:
    async def serve() -> None:
        async def requests() -> AsyncIterator[bytes]:
            yield good().SerializeToString()
            await asyncio.Event().wait()

        async def send(message: bytes) -> None:
            raise ConnectionResetError

        pipeline = server.server._core.pipeline
        infer_requests = InferRequests(pipeline, NoRegions(), Statistics(), 1 << 30)
        with pytest.raises(ConnectionResetError):
            await InferStream(infer_requests, send, max_requests=5, max_bytes=1000).run(requests(), StalledCall())

    server.run(serve())
