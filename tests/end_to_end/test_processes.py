"""`--processes 2`, the real program: both processes serve, and to whoever looks at them they are one server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

import lossgrad
from lossgrad.cli import main
from lossgrad_api.codec import SERVICE
from tests.faults.resources import descriptors
from tests.security.conftest import Authority
from tests.security.test_tls import serial
from tests.server.calling import Caller, message, stub_on
from tests.server.processes.several import SeveralProgram, is_there, scrape, total
from tests.server.program import ROOT
from tests.server.requests import L1, request
from tests.server.serving import eventually

CLIENTS = 24  # all with one of two processes: once in eight million runs
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
KNOWN = "first-of-all-tokens"
X, Y = np.full(4, 3, np.float32), np.ones(4, np.float32)


class Several:
    """A server with two processes, and clients of it."""

    def __init__(self, program: SeveralProgram) -> None:
        self.program = program
        self.address, self.metrics = program.addresses()
        self.quiet_descriptors = [descriptors(pid) for pid in program.children()]
        self.clients = [lossgrad.LossClient(self.address) for _ in range(CLIENTS)]


@pytest.fixture(scope="module")
def several() -> Iterator[Several]:
    program = SeveralProgram(2, "--reflection", "--log-format=json", "--drain-grace-seconds=60")
    with contextlib.ExitStack() as stack:
        stack.callback(program.close)
        started = Several(program)
        for client in started.clients:
            stack.enter_context(client)
        yield started


@pytest.fixture
def start() -> Iterator[Callable[..., SeveralProgram]]:
    programs: list[SeveralProgram] = []

    def run(count: int, *arguments: str, **environment: str) -> SeveralProgram:
        programs.append(SeveralProgram(count, *arguments, **environment))
        return programs[-1]

    yield run
    for program in programs:
        program.close()


def test_both_processes_have_connections_and_metrics_add_up_to_the_calls(several: Several) -> None:
    before = scrape(several.metrics)
    for _ in range(5):
        for client in several.clients:
            assert client.l1(X, Y).value == 2.0
    grown = [
        descriptors(pid) - quiet
        for pid, quiet in zip(several.program.children(), several.quiet_descriptors, strict=True)
    ]
    assert len(grown) == 2
    assert min(grown) > 0
    assert sum(grown) >= CLIENTS
    after = scrape(several.metrics)
    counted = {
        name: total(after, name, **labels) - total(before, name, **labels)
        for name, labels in (
            ("lossgrad_requests_total", {"loss": "l1", "outcome": "ok", "api": "native"}),
            ("lossgrad_request_duration_seconds_count", {"loss": "l1"}),
            ("grpc_server_handled_total", {"grpc_method": "ComputeLoss", "grpc_code": "OK"}),
            ("lossgrad_elements_total", {"loss": "l1"}),
        )
    }
    calls = 5 * CLIENTS
    assert counted == dict(zip(counted, (calls, calls, calls, calls * len(X)), strict=True))
    assert after.of("lossgrad_process_up") == {frozenset({("process", process)}): 1.0 for process in "01"}
    assert after("lossgrad_ready") == 1
    assert len(after.of("lossgrad_build_info")) == 1
    assert after("lossgrad_queue_limit_bytes", device="cpu") == 1 << 30  # the whole server's


def test_its_metrics_are_openmetrics_for_those_who_ask(several: Several) -> None:
    several.clients[0].l1(X, Y)
    asked = urllib.request.Request(several.metrics, headers={"Accept": "application/openmetrics-text"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        families = {family.name: family for family in parse_openmetrics(response.read().decode())}  # type: ignore[no-untyped-call]
    assert families["lossgrad_requests"].type == "counter"
    assert families["lossgrad_request_duration_seconds"].type == "histogram"


def test_each_process_answers_for_itself(several: Several) -> None:
    infos = {client.info().limits.max_queued_bytes for client in several.clients}
    assert infos == {1 << 29}  # what a caller can have: its process's share
    with grpc.insecure_channel(several.address, OWN_CONNECTION) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        for name in ("", SERVICE, "liveness"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=10)
        assert SERVICE in {service.name for service in answer.list_services_response.service}


def test_lossgrad_top_and_doctor_see_one_server(several: Several, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = several.metrics.removeprefix("http://").removesuffix("/metrics")
    assert main(["top", "--metrics", metrics, "--once", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 ready" in shown
    assert main(["doctor", "--target", several.address, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert all(check["state"] != "failed" for check in checks)


def test_every_line_of_the_log_names_its_process(several: Several) -> None:
    lines = [json.loads(line) for line in several.program.logged]
    ready = [line["process"] for line in lines if line["message"].startswith("Ready: ")]
    assert sorted(ready) == ["0", "1", "parent"]
    assert all(line["process"] in ("0", "1", "parent") for line in lines)


def test_a_second_server_on_its_port_is_refused(several: Several, start: Callable[..., SeveralProgram]) -> None:
    port = several.address.rpartition(":")[2]
    second = start(2, f"--port={port}", "--log-level=error")
    assert second.end() == 2
    assert second.logged == [
        f"lossgrad-server: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port\n"
    ]


def says_that_it_drains(logged: list[str], process: str) -> bool:
    return any('"Draining' in line and f'"process": "{process}"' in line for line in logged)


def test_sigterm_lets_every_process_finish_what_it_has_and_ends_with_0(several: Several) -> None:
    """The last test of this server."""
    callers = [Caller() for _ in range(6)]
    channels = [grpc.insecure_channel(several.address, OWN_CONNECTION) for _ in callers]
    streams = [
        stub_on(channel).StreamComputeLoss(iter(caller)) for channel, caller in zip(channels, callers, strict=True)
    ]
    one = message(request([3.0], [0.0], L1))
    for caller, stream in zip(callers, streams, strict=True):
        caller.send(one)
        assert next(stream).responses[0].response.results[0].scalar == 3.0
    children = several.program.children()
    several.program.signal(signal.SIGTERM)
    for process in "01":
        eventually(partial(says_that_it_drains, several.program.logged, process))
    for caller in callers:  # what was sent before the drain's delay is over is answered
        caller.send(one)
    for stream in streams:
        assert [answer.responses[0].response.results[0].scalar for answer in stream] == [3.0]
        assert stream.code() is grpc.StatusCode.OK
    for caller, channel in zip(callers, channels, strict=True):
        caller.close()
        channel.close()
    assert several.program.end() == 0
    assert not any(map(is_there, children))
    assert several.program.process.stdout is not None
    assert several.program.process.stdout.read() == ""  # the ready line was the only one


def running_first(folder: Path, text: str) -> dict[str, str]:
    """Return an environment in which every Python runs a text before anything else."""
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_a_process_that_cannot_start_ends_the_server_with_its_exit_code(
    start: Callable[..., SeveralProgram], tmp_path: Path
) -> None:
    ends = "import os, sys\nif 'lossgrad_server.processes.child' in sys.orig_argv:\n    os._exit(7)\n"
    program = start(2, "--log-level=error", **running_first(tmp_path, ends))
    assert program.end() == 7
    assert program.logged == ["lossgrad-server: process 0 ended with exit code 7 before it served; the log says why\n"]


def test_a_setting_that_only_a_process_finds_unusable_is_told_once_and_ends_the_server_with_2(
    start: Callable[..., SeveralProgram], tmp_path: Path
) -> None:
    without = running_first(tmp_path, "import sys\nsys.modules['opentelemetry'] = None\n")
    program = start(2, "--log-level=error", "--tracing", **without)
    assert program.end() == 2
    assert program.logged == [
        "lossgrad-server: --tracing needs opentelemetry, which is not installed: pip install 'lossgrad[otel]'\n"
    ]


def test_processes_end_when_the_parent_is_killed(start: Callable[..., SeveralProgram]) -> None:
    program = start(2, "--drain-delay-seconds=0")
    address, _ = program.addresses()
    children = program.children()
    assert len(children) == 2
    program.signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_there, children)))
    host, _, port = address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_tokens_and_a_certificate_that_changes_hold_for_every_process(
    start: Callable[..., SeveralProgram], tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("localhost", "127.0.0.1")
    (tmp_path / "tokens").write_text(KNOWN + "\n")
    program = start(2, f"--tls-cert={certificate}", f"--tls-key={key}", f"--token-file={tmp_path}/tokens")
    address, metrics = program.addresses()
    serials = {serial(address, authority.file) for _ in range(CLIENTS)}
    assert len(serials) == 1
    for _ in range(6):
        with lossgrad.LossClient(address, ca=authority.file, token=KNOWN) as known:
            assert known.l1(X, Y).value == 2.0
        with lossgrad.LossClient(address, ca=authority.file, token=KNOWN[::-1], retries=0) as unknown:
            with pytest.raises(lossgrad.LossgradError) as caught:
                unknown.l1(X, Y)
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    authority.issue("localhost", "127.0.0.1")
    eventually(lambda: serials.isdisjoint({serial(address, authority.file) for _ in range(CLIENTS)}))
    assert (scrape(metrics)("lossgrad_tls_certificate_expiry_timestamp_seconds") or 0) > 1.7e9
