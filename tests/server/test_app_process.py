"""The program `lossgrad-server`: what it prints, where it listens, how it ends. Each test starts it as users do."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lossgrad_api.codec import SERVICE
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.server import losing_server, warming_server
from tests.server.calling import Connect, answers_by_tag, message, stub_on
from tests.server.program import Program
from tests.server.requests import request
from tests.server.serving import PATIENCE_SECONDS

GOOD = request([1.0, 2.0], [3.0, 5.0])
ONE = pb.StreamComputeLossRequest(requests=[pb.TaggedRequest(tag=1, request=GOOD)])


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def run(*arguments: str, **options: Any) -> Program:
        programs.append(Program(*arguments, **options))
        return programs[-1]

    yield run
    for program in programs:
        program.close()


class OpenStream:
    """A stream that is in flight until it is closed."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._may_end = threading.Event()
        self._may_go_on = threading.Event()
        self.answers = stub_on(channel).StreamComputeLoss(self._messages(), timeout=PATIENCE_SECONDS)
        next(self.answers)

    def _messages(self) -> Iterator[pb.StreamComputeLossRequest]:
        yield ONE
        self._may_go_on.wait(PATIENCE_SECONDS)
        yield ONE
        self._may_end.wait(PATIENCE_SECONDS)

    def ask_again(self) -> pb.StreamComputeLossResponse:
        self._may_go_on.set()
        answer: pb.StreamComputeLossResponse = next(self.answers)
        return answer

    def close(self) -> None:
        self._may_go_on.set()
        self._may_end.set()


def test_it_says_where_it_serves_and_after_sigterm_finishes_what_is_in_flight(
    start: Callable[..., Program], connect: Connect
) -> None:
    program = start("--port", "0", "--metrics-port", "0", "--drain-grace-seconds", "600")
    line = program.ready_line()
    address = line.removeprefix("lossgrad-server ready on ").split(", ")[0]
    host, _, port = address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert line.split(", ")[1].startswith("metrics http://127.0.0.1:")
    stream = OpenStream(connect(address))
    program.signal(signal.SIGTERM)
    program.wait_until_logged("Draining")
    assert stream.ask_again().responses[0].response.results
    stream.close()
    assert list(stream.answers) == []
    assert program.end() == 0
    assert program.process.stdout is not None
    assert program.process.stdout.read() == ""  # the ready line was the only one
    assert not any(word in text for text in program.logged for word in ("ERROR", "WARNING", "Traceback", "Exception"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_still_warms_up_ends_at_once(start: Callable[..., Program], number: signal.Signals) -> None:
    program = start("--port", "0", "--metrics-port", "-1", program=["-P", warming_server.__file__])
    program.wait_until_logged("Warming up: 127.0.0.1:")
    program.signal(number)
    assert program.end() == 0  # an hour before it would be warm
    assert any(f"{number.name} received while warming up" in line for line in program.logged)
    assert not any("Traceback" in line for line in program.logged)


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_it_at_once(
    start: Callable[..., Program], connect: Connect, again: signal.Signals
) -> None:
    program = start("--port", "0", "--metrics-port", "-1", "--drain-grace-seconds", "600")
    line = program.ready_line()
    assert line.endswith(", metrics off")
    stream = OpenStream(connect(line.removeprefix("lossgrad-server ready on ").split(", ")[0]))
    program.signal(signal.SIGTERM)
    program.wait_until_logged("Draining")
    assert program.process.poll() is None
    program.signal(again)
    assert program.end() == 0  # long before the ten minutes of grace
    with pytest.raises(grpc.RpcError) as caught:
        list(stream.answers)
    stream.close()
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert any(f"{again.name} received again" in text for text in program.logged)
    assert not any("Traceback" in text for text in program.logged)


def test_it_takes_its_settings_from_the_environment_and_serves_on_a_socket(
    start: Callable[..., Program], connect: Connect, tmp_path: Path
) -> None:
    target = f"unix:{tmp_path}/lossgrad.sock"
    program = start(
        LOSSGRAD_HOST=target,
        LOSSGRAD_METRICS_PORT="-1",
        LOSSGRAD_REFLECTION="true",
        LOSSGRAD_MAX_MESSAGE_BYTES="1000000",
        LOSSGRAD_LOG_LEVEL="error",
    )
    assert program.ready_line() == f"lossgrad-server ready on {target}, metrics off"
    channel = connect(target)
    stub = stub_on(channel)
    assert stub.ComputeLoss(GOOD).results[0].scalar == pytest.approx((1.75 + 2.75) / 2)  # |d| - beta / 2, beta = 0.5
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_message_bytes == 1_000_000
    assert reflected_services(channel) >= {SERVICE, "grpc.health.v1.Health"}
    health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    assert health.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == health_pb2.HealthCheckResponse.SERVING
    program.signal(signal.SIGINT)
    assert program.end() == 0
    assert program.logged == []


def reflected_services(channel: grpc.Channel) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = stub.ServerReflectionInfo(requests, timeout=PATIENCE_SECONDS)
    return {service.name for service in answer.list_services_response.service}


def test_a_port_that_is_taken_ends_it_with_2_and_one_line(start: Callable[..., Program]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start("--port", str(port), "--log-level", "error")
        assert program.end() == 2
    ours = [line for line in program.logged if line.startswith("lossgrad-server: ")]
    assert len(ours) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ours[0]
    assert not any("Traceback" in line for line in program.logged)


def test_what_a_stream_has_under_way_when_the_device_is_lost_is_answered(
    start: Callable[..., Program], connect: Connect
) -> None:
    program = start(
        *("--port", "0", "--metrics-port", "-1", "--drain-delay-seconds", "0", "--drain-grace-seconds", "600"),
        program=["-P", losing_server.__file__],
    )
    stub = stub_on(connect(program.address()))
    losing = request([0.0] * losing_server.LOST_AT, [1.0] * losing_server.LOST_AT)
    may_end = threading.Event()

    def messages() -> Iterator[pb.StreamComputeLossRequest]:
        yield message(losing, GOOD, GOOD)
        may_end.wait(PATIENCE_SECONDS)  # the caller has not said that this is all

    received = stub.StreamComputeLoss(messages(), timeout=PATIENCE_SECONDS)
    answers = answers_by_tag(list(received))  # to the end of the stream, which the drain brings
    may_end.set()
    assert sorted(answers) == [0, 1, 2]
    for answer in answers.values():
        assert answer.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert "the device cpu failed" in answer.error.message
    assert program.end() == 3


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_lost_device_ends_it_with_3_after_a_drain(
    start: Callable[..., Program], connect: Connect, is_streaming: bool
) -> None:
    program = start(
        *("--port", "0", "--metrics-port", "-1", "--drain-delay-seconds", "0", "--drain-grace-seconds", "600"),
        program=["-P", losing_server.__file__],
    )
    channel = connect(program.address())
    stub = stub_on(channel)
    assert stub.ComputeLoss(GOOD).results
    stream = OpenStream(channel) if is_streaming else None
    with pytest.raises(grpc.RpcError) as caught:
        stub.ComputeLoss(request([0.0] * losing_server.LOST_AT, [1.0] * losing_server.LOST_AT))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "the device cpu failed" in str(caught.value.details())
    program.wait_until_logged("Device cpu is lost")
    if stream is not None:
        assert list(stream.answers) == []  # a drain ends streams that nothing is under way on
        stream.close()
    assert program.end() == 3
    assert program.logged[-1] == "lossgrad-server: device cpu failed; this process cannot use it any more\n"
    assert not any("Traceback" in text for text in program.logged)
