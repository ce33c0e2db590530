"""LossClient against the peer: answers, options, limits, timeouts, retries, life cycle, forks."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch.nn import functional

from lossgrad import (
    L1,
    MSE,
    Cancelled,
    DeadlineExceeded,
    Huber,
    InvalidRequest,
    Loss,
    LossClient,
    LossResult,
    Overloaded,
    RequestTooLarge,
    ServerError,
    ServerLimits,
    SmoothL1,
    Unavailable,
)
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, PeerServer, Refused, status

Code = grpc.StatusCode
INPUT = np.array([[0.1, -2.0, 3.0], [0.5, 0.25, -0.75]], np.float32)
TARGET = np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]], np.float32)


def test_each_method_gives_torchs_loss_and_gradient(client: LossClient) -> None:
    x, y = torch.tensor(INPUT, requires_grad=True), torch.tensor(TARGET)
    for result, expected in (
        (client.smooth_l1(INPUT, TARGET, beta=0.5, gradient=True), functional.smooth_l1_loss(x, y, beta=0.5)),
        (client.huber(INPUT, TARGET, delta=0.5, gradient=True), functional.huber_loss(x, y, delta=0.5)),
        (client.l1(INPUT, TARGET, gradient=True, reduction="sum"), functional.l1_loss(x, y, reduction="sum")),
        (client.mse(INPUT, TARGET, gradient=True, reduction="none"), functional.mse_loss(x, y, reduction="none")),
    ):
        np.testing.assert_allclose(result.loss, expected.detach().numpy(), rtol=1e-6)
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        np.testing.assert_allclose(result.gradient, gradient.numpy(), rtol=1e-6)
        assert result.gradient.dtype == np.float32
        assert result.target_gradient is None
        assert (result.element_count, result.weight_sum, result.nonfinite_count) == (6, 6.0, 0)


def test_a_scalar_loss_is_rounded_to_the_result_type_and_kept_as_float64(client: LossClient) -> None:
    result = client.mse(INPUT, TARGET)
    assert isinstance(result.loss, np.float32)
    assert type(result.value) is float
    assert result.loss == np.float32(result.value)
    assert client.l1(INPUT, TARGET, reduction="none").value is None
    assert isinstance(client.l1(INPUT, TARGET.astype(np.float64)).loss, np.float64)
    half = client.l1(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16))
    assert half.loss.dtype == torch.float32
    assert half.loss.shape == ()


def test_several_losses_come_from_one_request_in_their_order(client: LossClient, peer: Peer) -> None:
    losses: list[Loss] = [SmoothL1(0.1), Huber(2.0, gradient=True), L1(reduction="sample_sum"), MSE(reduction="none")]
    results = client.compute(INPUT, TARGET, losses)
    assert len(peer.requests) == 1
    assert isinstance(results, tuple)
    assert [result.spec for result in results] == losses
    assert [result.gradient is not None for result in results] == [False, True, False, False]
    np.testing.assert_allclose(results[2].loss, np.abs(INPUT - TARGET).sum(1), rtol=1e-6)
    np.testing.assert_allclose(results[3].loss, (INPUT - TARGET) ** 2, rtol=1e-6)
    (alone,) = client.compute(INPUT, TARGET, [L1()])
    assert isinstance(client.compute(INPUT, TARGET, L1()), LossResult)
    assert alone.value == client.compute(INPUT, TARGET, L1()).value


def test_every_option_reaches_the_server(client: LossClient, peer: Peer) -> None:
    weight, mask = np.ones((2, 3), np.float32) * 2, np.array([[True, False, True]] * 2)
    result = client.smooth_l1(
        INPUT,
        TARGET[:1],
        beta=0.25,
        reduction="mean",
        gradient=True,
        weight=weight,
        mask=mask,
        denominator=10.0,
        gradient_scale=3.0,
        allow_broadcast=True,
        idempotency_key="key-1",
    )
    (request,) = peer.requests
    assert request.allow_broadcast
    assert request.idempotency_key == result.idempotency_key == "key-1"
    assert request.weight.data == weight.tobytes()
    assert request.mask.data == mask.tobytes()
    (spec,) = request.specs
    assert (spec.smooth_l1.beta, spec.denominator, spec.gradient_scale) == (0.25, 10.0, 3.0)
    assert (result.element_count, result.weight_sum) == (4, 8.0)
    x, y = torch.tensor(INPUT, requires_grad=True), torch.tensor(TARGET[:1], requires_grad=True)
    wide = torch.where(
        torch.tensor(mask), 2 * functional.smooth_l1_loss(x, y.expand(2, 3), beta=0.25, reduction="none"), 0
    )
    grad_x, grad_y = torch.autograd.grad(wide.sum() / 10 * 3, (x, y))
    np.testing.assert_allclose(result.gradient, grad_x.numpy(), rtol=1e-6)
    np.testing.assert_allclose(result.target_gradient, grad_y.numpy(), rtol=1e-6)


def test_the_targets_gradient_comes_in_the_targets_type_where_it_is_not_the_negative(client: LossClient) -> None:
    result = client.l1(INPUT, torch.tensor(TARGET, dtype=torch.float64), gradient=True)
    assert result.gradient.dtype == np.float32
    assert isinstance(result.target_gradient, torch.Tensor)
    assert result.target_gradient.dtype == torch.float64


def test_timing_is_in_seconds(client: LossClient) -> None:
    timing = client.l1(INPUT, TARGET).timing
    assert (timing.queue_seconds, timing.pack_seconds) == (1e-6, 2e-6)
    assert (timing.compute_seconds, timing.unpack_seconds) == (3e-6, 4e-6)
    assert (timing.batch_request_count, timing.batch_element_count, timing.device) == (5, 6, "cpu")
    assert 0 < timing.round_trip_seconds < 30


def test_a_result_shows_shapes_and_types_and_no_tensor_data(client: LossClient) -> None:
    shown = repr(client.mse(torch.full((2, 3), 7.25), torch.zeros(2, 3), gradient=True, reduction="none"))
    assert shown.startswith("LossResult(loss=float32[2, 3], gradient=float32[2, 3], element_count=6")
    assert "52.56" not in shown
    assert "14.5" not in shown
    scalar = client.mse(np.full(2, 3.0), np.zeros(2))
    assert repr(scalar).startswith("LossResult(loss=9.0 (float64), element_count=2")


def test_unequal_shapes_are_the_callers_mistake(client: LossClient) -> None:
    with pytest.raises(InvalidRequest, match="send equal shapes") as raised:
        client.l1(INPUT, TARGET[:1])
    assert (raised.value.field, raised.value.reason) == ("target.shape", "SHAPE_MISMATCH")


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([], "holds 0 losses; one request takes 1 to 16"),
        ([L1()] * 17, "holds 17 losses"),
        ("l1", "losses holds 'l' (str); give lossgrad.SmoothL1()"),
        (None, "losses holds None"),
        ([L1], "losses holds <class"),
    ],
)
def test_what_is_no_list_of_losses_is_refused_here(client: LossClient, peer: Peer, losses: Any, says: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        client.compute(INPUT, TARGET, losses)
    assert says in str(raised.value)
    assert not peer.requests


def test_a_message_over_a_limit_too_small_to_cut_it_is_refused_before_it_is_sent(target: str, peer: Peer) -> None:
    with LossClient(target, max_message_bytes=40_000) as client:
        client.l1(np.zeros(800, np.float32), np.zeros(800, np.float32))
        with pytest.raises(RequestTooLarge, match=r"takes 64000 bytes, the limit is 40000, and its smallest") as raised:
            client.l1(np.zeros(8000, np.float32), np.zeros(8000, np.float32))
    assert raised.value.code is Code.RESOURCE_EXHAUSTED
    assert len(peer.requests) == 1


def test_a_timeout_ends_the_call_here_and_on_the_server(client: LossClient, peer: Peer) -> None:
    peer.hold.clear()
    with pytest.raises(DeadlineExceeded) as raised:
        client.l1(INPUT, TARGET, timeout=0.05)
    assert raised.value.code is Code.DEADLINE_EXCEEDED
    assert isinstance(raised.value, TimeoutError)
    assert peer.ended.wait(10)


def test_the_clients_timeout_is_the_default_and_infinity_means_none(target: str, peer: Peer) -> None:
    remaining: list[float | None] = []
    peer.fail_call = lambda _number, context: remaining.append(context.time_remaining())
    with LossClient(target, timeout=20.0, coalesce=False) as client:
        client.l1(INPUT, TARGET)
        client.l1(INPUT, TARGET, timeout=5)
        client.l1(INPUT, TARGET, timeout=math.inf)
        with pytest.raises(InvalidRequest, match="timeout is 0 seconds; it must be above 0"):
            client.l1(INPUT, TARGET, timeout=0)
    first, second, third = remaining
    assert first is not None
    assert second is not None
    assert 10 < first < 21
    assert 0 < second < 6
    assert third is None or third > 1e6


def test_unavailable_is_tried_again_as_often_as_set_and_honours_push_back(target: str, peer: Peer) -> None:
    def busy_until(call: int) -> Any:
        def fail(_: pb.ComputeLossRequest) -> None:
            if len(peer.requests) < call:
                raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL"))

        return fail

    peer.pushback_ms = 1
    with LossClient(target, retries=2) as client:
        peer.fail = busy_until(3)
        client.l1(INPUT, TARGET)
        assert len(peer.requests) == 3
        assert peer.metadata[-1]["grpc-previous-rpc-attempts"] == "2"
        peer.reset()
        peer.pushback_ms = 1
        peer.fail = busy_until(4)
        with pytest.raises(Overloaded, match="full"):
            client.l1(INPUT, TARGET)
        assert len(peer.requests) == 3


def test_a_large_request_is_tried_again_too(target: str, peer: Peer) -> None:
    # gRPC silently gives up retries beyond its buffer, 256 KiB by default.
    def fail(_: pb.ComputeLossRequest) -> None:
        if len(peer.requests) < 2:
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL"))

    peer.pushback_ms = 1
    peer.fail = fail
    array = np.zeros(1024 * 1024, np.float32)
    with LossClient(target) as client:
        client.l1(array, array)
    assert len(peer.requests) == 2


def test_a_server_that_comes_up_during_the_retries_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with LossClient(f"127.0.0.1:{port}", retries=4) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.l1, INPUT, TARGET)
        server = PeerServer(f"127.0.0.1:{port}")
        assert call.result(10).element_count == 6
    server.stop()


def test_without_retries_a_call_is_sent_once(target: str, peer: Peer) -> None:
    def fail(_: pb.ComputeLossRequest) -> None:
        raise Refused(status(Code.UNAVAILABLE, "drains", reason="DRAINING"))

    peer.fail = fail
    with LossClient(target, retries=0) as client, pytest.raises(Unavailable, match=r"^drains$"):
        client.l1(INPUT, TARGET)
    assert len(peer.requests) == 1


def test_what_the_caller_must_change_is_never_tried_again(client: LossClient, peer: Peer) -> None:
    def fail(_: pb.ComputeLossRequest) -> None:
        raise Refused(status(Code.RESOURCE_EXHAUSTED, "too large", reason="MESSAGE_TOO_LARGE"))

    peer.fail = fail
    with pytest.raises(RequestTooLarge):
        client.l1(INPUT, TARGET)
    assert len(peer.requests) == 1


def test_the_token_goes_with_every_call(target: str, peer: Peer) -> None:
    with LossClient(target, token="secret") as client:  # noqa: S106
        client.l1(INPUT, TARGET)
        client.info()
        client.compute_many([(INPUT, TARGET)], L1())
    assert [metadata["authorization"] for metadata in peer.metadata] == ["Bearer secret"] * 3


def test_the_target_comes_from_the_environment(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSGRAD_TARGET", target)
    with LossClient() as client:
        assert repr(client) == f"LossClient('{target}')"
        assert client.l1([1.0], [0.0]).value == 1.0


def test_info_is_a_plain_value(client: LossClient) -> None:
    info = client.info()
    assert (info.server_version, info.torch_version, info.device) == ("1.2.3", "2.13.0", "cpu")
    assert info.data_types == ("float32", "bfloat16")
    assert info.limits == ServerLimits(64 * 1024 * 1024, 2, 3, 64)
    assert info.determinism == "peer"


def test_ping_gives_the_round_trip_of_a_server_that_serves(client: LossClient, peer: Peer) -> None:
    assert 0 < client.ping(timeout=10) < 10
    peer.health = b"\x08\x02"
    with pytest.raises(Unavailable, match="does not serve now"):
        client.ping()


def test_an_answer_that_is_none_is_the_servers_error() -> None:
    class Broken(grpc.GenericRpcHandler):
        answer = b""

        def service(self, details: grpc.HandlerCallDetails) -> Any:
            if "LossService" in details.method:
                return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.answer)
            return None

    broken = Broken()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[broken])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with LossClient(f"127.0.0.1:{port}", coalesce=False) as client:
        for answer, says in (
            (b"\xff\xff\xff", "cannot be read"),
            (b"", "0 results for 1 losses"),
            (pb.ComputeLossResponse(results=[pb.LossResult(element_count=1)]).SerializeToString(), "has no loss"),
            (pb.ComputeLossResponse(results=[pb.LossResult(scalar=1.0)]).SerializeToString(), "has no gradient"),
        ):
            broken.answer = answer
            with pytest.raises(ServerError, match=says):
                client.l1(INPUT, TARGET, gradient=True)
        broken.answer = b"\x0a\xff"
        with pytest.raises(ServerError, match="GetServerInfoResponse"):
            client.info()
    server.stop(None).wait()


def test_a_closed_client_says_so(target: str) -> None:
    client = LossClient(target)
    client.l1(INPUT, TARGET)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="this client is closed"):
        client.l1(INPUT, TARGET)
    unused = LossClient(target)
    unused.close()
    with pytest.raises(RuntimeError, match="this client is closed"):
        unused.info()


def test_closing_ends_the_calls_under_way(target: str, peer: Peer) -> None:
    peer.hold.clear()
    client = LossClient(target)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.l1, INPUT, TARGET)
        assert peer.arrived.wait(10)
        client.close()
        with pytest.raises(Cancelled) as raised:
            call.result(10)
    assert raised.value.code is Code.CANCELLED


def test_a_client_serves_many_threads(client: LossClient, peer: Peer) -> None:
    barrier = threading.Barrier(8)

    def work(number: int) -> list[float | None]:
        barrier.wait(10)
        return [client.l1(np.full(3, number + i, np.float64), np.zeros(3)).value for i in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for number, values in enumerate(pool.map(work, range(8))):
            assert values == [number + i for i in range(20)]
    assert len(peer.requests) == 160


def test_a_client_is_shared_by_copies_and_not_pickled(client: LossClient) -> None:
    assert copy.deepcopy({"client": client})["client"] is client
    assert copy.copy(client) is client
    with pytest.raises(TypeError, match="cannot be pickled; make one in each process"):
        pickle.dumps(client)


def test_a_channel_of_the_callers_own_is_used(target: str) -> None:
    with LossClient.from_channel(grpc.insecure_channel(target), timeout=5.0) as client:
        assert client.l1([1.0], [3.0]).value == 2.0


def test_a_unix_socket_is_a_target(tmp_path: Path) -> None:
    server = PeerServer(f"unix:{tmp_path}/s")
    with LossClient(server.target, token="secret") as client:  # noqa: S106
        assert client.l1([1.0], [3.0]).value == 2.0
    server.stop()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_tls_with_a_client_certificate_carries_a_token(tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    cert, key = (tmp_path / "cert.pem").read_bytes(), (tmp_path / "key.pem").read_bytes()
    server = PeerServer(credentials=grpc.ssl_server_credentials([(key, cert)], cert, require_client_auth=True))
    target = f"localhost:{server.port}"
    path = tmp_path / "cert.pem"
    with LossClient(target, token="secret", ca=path, cert=str(path), key=key) as client:  # noqa: S106
        assert client.l1([1.0], [3.0]).value == 2.0
    assert server.peer.metadata[-1]["authorization"] == "Bearer secret"
    with LossClient(target, ca=cert, retries=0) as client, pytest.raises(Unavailable):
        client.l1([1.0], [3.0])
    with LossClient(target, tls=True, retries=0) as client, pytest.raises(Unavailable):
        client.l1([1.0], [3.0])
    server.stop()


def test_a_server_that_never_answers_the_connection_is_given_up_within_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with LossClient(target, retries=0) as client, pytest.raises((DeadlineExceeded, Unavailable)):
            client.l1(INPUT, TARGET, timeout=0.2)
