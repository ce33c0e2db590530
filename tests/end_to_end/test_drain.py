"""A drain takes as long as the work that is left, and not as long as callers keep streams and watches open."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import lossgrad
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.faults.programs import PacedProgram
from tests.server.calling import Caller, message, stub_on
from tests.server.program import Program
from tests.server.requests import L1, request

DELAY_SECONDS = 0.2
FLAGS = ("--port=0", "--metrics-port=-1", f"--drain-delay-seconds={DELAY_SECONDS}", "--drain-grace-seconds=20")


@pytest.fixture
def program() -> Iterator[Program]:
    """Give a server whose device takes half a second for each request."""
    started = PacedProgram(500, *FLAGS)
    yield started
    started.close()


def test_idle_streams_and_watches_do_not_hold_up_a_drain(program: Program) -> None:
    with grpc.insecure_channel(program.address()) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())  # type: ignore[no-untyped-call]
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        caller = Caller()
        answers = stub_on(channel).StreamComputeLoss(iter(caller))
        caller.send(message(request([3.0], [0.0], L1)))
        assert next(answers).responses[0].response.results[0].scalar == 3.0
        program.signal(signal.SIGTERM)
        began = time.monotonic()
        assert program.end() == 0
        seconds = time.monotonic() - began
        assert list(answers) == []  # it ended well
        assert answers.code() is grpc.StatusCode.OK
        caller.close()
    assert seconds < DELAY_SECONDS + 5


def test_a_drain_answers_what_a_stream_and_a_call_have_sent(program: Program) -> None:
    with grpc.insecure_channel(program.address()) as channel:
        stub = stub_on(channel)
        caller = Caller()
        received: queue.SimpleQueue[pb.StreamComputeLossResponse] = queue.SimpleQueue()
        answers = stub.StreamComputeLoss(iter(caller))
        caller.send(message(request([3.0], [0.0], L1), request([4.0], [0.0], L1)))
        call = stub.ComputeLoss.future(request([5.0], [0.0], L1))
        time.sleep(0.1)  # they are on the device, or wait for it
        program.signal(signal.SIGTERM)
        for one in answers:
            received.put(one)
        assert call.result(20).results[0].scalar == 5.0
        assert program.end() == 0
        caller.close()
    values = [answer.response.results[0].scalar for _ in range(received.qsize()) for answer in received.get().responses]
    assert sorted(values) == [3.0, 4.0]


def test_a_client_of_ours_is_served_by_another_server_meanwhile(program: Program) -> None:
    other = Program(*FLAGS)
    try:
        target = "ipv4:" + program.address() + "," + other.address()
        with lossgrad.LossClient(target) as client:
            x = np.ones(4, np.float32)
            values: list[float | None] = []
            for number, result in enumerate(client.stream([(x, x * 2)] * 12, lossgrad.L1(), in_flight=1)):
                values.append(result.value)
                if number == 1:
                    program.signal(signal.SIGTERM)
        assert values == [1.0] * 12
        assert program.end() == 0
    finally:
        other.close()
