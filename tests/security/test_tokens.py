"""Tokens: who may call, that a refused call's body is never read, and tokens that change while the server runs."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import lossgrad
from lossgrad_api.codec import COMPUTE_LOSS, GET_SERVER_INFO, STREAM_COMPUTE_LOSS
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.security import security
from lossgrad_server.transport.tokens import RELOAD_SECONDS, TokenFileError, Tokens, read_tokens
from tests.server.calling import Connect
from tests.server.scraping import Scrape
from tests.server.serving import PATIENCE_SECONDS, RunningServer, StartServer

FIRST, SECOND = "first-token-0123456789", "second-token-0123456789"
PAIR = ([1.0, 2.0], [0.0, 0.0])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of the evaluation team\n{FIRST}\n\n{SECOND}\n")
    return path


@pytest.fixture
def guarded(start_server: StartServer, file: Path) -> RunningServer:
    return start_server(token_file=str(file), metrics_port=0, reflection=True)


def raw(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    """Return a method of any name, which takes and gives bytes."""
    call: Callable[..., Any] = channel.unary_unary(method)
    return call


def call(server: RunningServer, token: str | None) -> float:
    with lossgrad.LossClient(server.address, token=token, retries=0, timeout=PATIENCE_SECONDS) as client:
        return float(client.l1(*PAIR).loss)


def test_each_token_of_the_file_lets_its_callers_in_by_every_way(guarded: RunningServer) -> None:
    for token in (FIRST, SECOND):
        assert call(guarded, token) == 1.5
        with lossgrad.LossClient(guarded.address, token=token) as client:
            assert [result.loss for result in client.stream([PAIR], lossgrad.L1())] == [1.5]
            assert client.info().device == "cpu"


@pytest.mark.parametrize("token", [None, "wrong-token-0123456789", FIRST[:-1], FIRST + "0", FIRST.upper()])
def test_nobody_else_gets_in(guarded: RunningServer, token: str | None) -> None:
    with pytest.raises(lossgrad.Unauthenticated) as caught:
        call(guarded, token)
    assert caught.value.reason == "UNAUTHENTICATED"
    assert "authorization: Bearer" in caught.value.message
    assert FIRST not in caught.value.message
    found = Scrape(guarded.scrape())
    assert (
        found("lossgrad_requests_total", loss="unknown", mode="unknown", api="native", outcome="unauthenticated") == 1
    )


@pytest.mark.parametrize(
    ("method", "api"),
    [
        (STREAM_COMPUTE_LOSS, "stream"),
        ("/lossgrad_api.v1.LossService/AccumulateLoss", "accumulate"),
        ("/inference.GRPCInferenceService/ModelInfer", "open_inference"),
        ("/inference.GRPCInferenceService/ModelStreamInfer", "open_inference_stream"),
        (GET_SERVER_INFO, "other"),
        ("/no.such.Service/Method", "other"),
    ],
)
def test_a_refusal_counts_for_the_method_that_was_called(
    guarded: RunningServer, connect: Connect, method: str, api: str
) -> None:
    def refused() -> float:
        labels = {"loss": "unknown", "mode": "unknown", "api": api, "outcome": "unauthenticated"}
        return Scrape(guarded.scrape())("lossgrad_requests_total", **labels) or 0.0

    before = refused()
    call: Any = connect(guarded.address).stream_stream(method)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b""]), timeout=30))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused() == before + 1


METHODS = [
    COMPUTE_LOSS,
    STREAM_COMPUTE_LOSS,
    GET_SERVER_INFO,
    "/lossgrad_api.v1.LossService/AccumulateLoss",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ServerLive",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/no.such.Service/Method",
    "/grpc.health.v1.Health/check",
    "//grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Check/",
    "/grpc.health.v1.Health/%43heck",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "metadata",
    [(), (("authorization", FIRST),), (("authorization", f"Basic {FIRST}"),), (("authorization", "Bearer "),)],
)
def test_without_a_token_no_method_answers_not_even_whether_it_exists(
    guarded: RunningServer, connect: Connect, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(connect(guarded.address), method)(b"", timeout=PATIENCE_SECONDS, metadata=metadata)
    assert caught.value.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    if not method.startswith("//"):
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_needs_no_token(guarded: RunningServer, connect: Connect) -> None:
    stub = health_pb2_grpc.HealthStub(connect(guarded.address))  # type: ignore[no-untyped-call]
    for name in ("", "liveness", "lossgrad_api.v1.LossService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_scheme_may_be_written_in_any_case(guarded: RunningServer, connect: Connect) -> None:
    info = raw(connect(guarded.address), GET_SERVER_INFO)
    for value in (f"bearer {FIRST}", f"BEARER {FIRST}", f"Bearer   {FIRST} "):
        assert info(b"", timeout=PATIENCE_SECONDS, metadata=(("authorization", value),))


def test_the_body_of_a_refused_call_is_never_in_memory(guarded: RunningServer, connect: Connect) -> None:
    body = bytes(np.zeros(192 * 1024 * 1024, np.uint8))
    compute = raw(connect(guarded.address), COMPUTE_LOSS)

    def refused() -> None:
        with pytest.raises(grpc.RpcError) as caught:
            compute(body, timeout=PATIENCE_SECONDS)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    refused()  # what the sending side takes is in this process too: its copy is there from now on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    callers = [threading.Thread(target=refused) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # Three senders have a copy each in flight; a server that read the bodies would have three more.
    assert grown_bytes < 3.5 * len(body), f"{grown_bytes >> 20} MiB"


# ---- The file ----


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_changed_file_is_read_again_and_an_unusable_one_changes_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tokens = Tokens(file, clock)
    assert tokens.accept(FIRST)
    third = "third-token-0123456789"
    file.write_text(third)
    assert tokens.accept(FIRST)  # not looked at yet
    clock.now += RELOAD_SECONDS
    assert tokens.accept(third)
    assert not tokens.accept(FIRST)
    for broken in ("", "short", "two tokens-in-one-line"):
        file.write_text(broken)
        clock.now += RELOAD_SECONDS
        assert tokens.accept(third)
    file.unlink()
    clock.now += RELOAD_SECONDS
    assert tokens.accept(third)
    assert third not in caplog.text
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 4
    file.write_text(SECOND)
    clock.now += RELOAD_SECONDS
    assert tokens.accept(SECOND)
    assert not tokens.accept(third)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no token"),
        (b"# nothing\n\n", "holds no token"),
        (b"0123456789abcdef\nshort\n", "token 2 of .* has 5 characters"),
        (b"0123 456789abcdef", "token 1 of .* has spaces"),
        (b"0123456789abcd\xff", "is not ASCII"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_without_its_tokens(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match=said) as caught:
        read_tokens(path)
    assert "0123456789abcd" not in str(caught.value)
    with pytest.raises(ConfigError, match=said):
        security(ServerConfig(token_file=str(path)))


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "lossgrad.example", "[::]"])
def test_tokens_are_taken_in_plaintext_from_this_machine_only(file: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="tokens would travel in plaintext"):
        security(ServerConfig(token_file=str(file), host=host, insecure=True))
    for local in ("127.0.0.1", "localhost", "unix:/run/lossgrad.sock"):
        assert security(ServerConfig(token_file=str(file), host=local)).tokens is not None


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        security(ServerConfig(token_file=str(tmp_path / "no")))
