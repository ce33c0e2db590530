"""Errors: which class a status becomes, what it carries, and that it survives pickling."""

from __future__ import annotations

import copy
import pickle
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lossgrad import (
    L1,
    AsyncLossClient,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LossClient,
    LossgradError,
    Overloaded,
    RequestTooLarge,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from lossgrad.errors import from_status
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, Refused, status

Code = grpc.StatusCode
ONES = np.ones(2, np.float32)

CASES = [
    (Code.INVALID_ARGUMENT, "BAD_SHAPE", InvalidRequest),
    (Code.OUT_OF_RANGE, "", InvalidRequest),
    (Code.FAILED_PRECONDITION, "", InvalidRequest),
    (Code.UNAVAILABLE, "QUEUE_FULL", Overloaded),
    (Code.UNAVAILABLE, "QUEUE_BYTES_FULL", Overloaded),
    (Code.UNAVAILABLE, "DRAINING", Unavailable),
    (Code.UNAVAILABLE, "WARMING_UP", Unavailable),
    (Code.UNAVAILABLE, "", Unavailable),
    (Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", RequestTooLarge),
    (Code.RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE", RequestTooLarge),
    (Code.RESOURCE_EXHAUSTED, "OUT_OF_DEVICE_MEMORY", RequestTooLarge),
    (Code.RESOURCE_EXHAUSTED, "", Overloaded),
    (Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED", DeadlineExceeded),
    (Code.UNAUTHENTICATED, "", Unauthenticated),
    (Code.PERMISSION_DENIED, "", Unauthenticated),
    (Code.CANCELLED, "", Cancelled),
    (Code.INTERNAL, "INTERNAL", ServerError),
    (Code.UNKNOWN, "", ServerError),
    (Code.UNIMPLEMENTED, "", ServerError),
    (Code.DATA_LOSS, "", ServerError),
]


@pytest.mark.parametrize(("code", "reason", "kind"), CASES)
def test_a_status_becomes_one_class_by_code_and_reason(code: Code, reason: str, kind: type[LossgradError]) -> None:
    error = from_status(status(code, "what it says", reason=reason))
    assert type(error) is kind
    assert error.code is code
    assert error.reason == reason
    assert str(error) == "what it says"
    assert (error.field, error.request_id, error.retry_after) == (None, None, None)


def test_grpcs_own_limit_is_too_large_by_its_text() -> None:
    error = from_status(status(Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (5 vs. 4)"))
    assert type(error) is RequestTooLarge


def test_a_status_without_a_text_or_with_an_unknown_code_still_says_something() -> None:
    assert str(from_status(status(Code.INTERNAL, ""))) == "the call failed with INTERNAL"
    broken = status(Code.INTERNAL, "x")
    broken.code = 99
    assert type(from_status(broken)) is ServerError


def test_errors_are_the_builtin_ones_too() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    for _, _, kind in CASES:
        assert issubclass(kind, LossgradError)


@pytest.mark.parametrize("kind", [LossgradError, *dict.fromkeys(kind for _, _, kind in CASES)])
def test_errors_survive_pickling_and_copying(kind: type[LossgradError]) -> None:
    error = kind("text", Code.UNAVAILABLE, "REASON", "field", "id", 1.5)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(again) is kind
        assert str(again) == "text"
        assert vars(again) == vars(error)
        assert again.args == ("text",)


def refuse_with_everything(_: pb.ComputeLossRequest) -> None:
    raise Refused(
        status(
            Code.INVALID_ARGUMENT,
            "beta is -1",
            reason="BAD_PARAMETER",
            field="specs[0].smooth_l1.beta",
            request_id="r-1",
        )
    )


def check_everything(error: InvalidRequest) -> None:
    assert error.message == str(error) == "beta is -1"
    assert error.code is Code.INVALID_ARGUMENT
    assert error.reason == "BAD_PARAMETER"
    assert error.field == "specs[0].smooth_l1.beta"
    assert error.request_id == "r-1"
    assert error.retry_after is None


def test_a_calls_error_has_the_servers_details_and_the_grpc_error_as_its_cause(client: LossClient, peer: Peer) -> None:
    peer.fail = refuse_with_everything
    with pytest.raises(InvalidRequest) as raised:
        client.l1(ONES, ONES)
    check_everything(raised.value)
    assert isinstance(raised.value.__cause__, grpc.RpcError)
    assert vars(pickle.loads(pickle.dumps(raised.value))) == vars(raised.value)  # noqa: S301


@pytest.mark.parametrize("coalesce", [False, True])
async def test_an_async_calls_error_has_the_same(target: str, peer: Peer, coalesce: bool) -> None:
    peer.fail = refuse_with_everything
    async with AsyncLossClient(target, coalesce=coalesce) as client:
        with pytest.raises(InvalidRequest) as raised:
            await client.l1(ONES, ONES)
    check_everything(raised.value)
    assert isinstance(raised.value.__cause__, grpc.aio.AioRpcError) is not coalesce  # on a stream, no call has failed


def test_an_item_of_a_stream_has_the_same(client: LossClient, peer: Peer) -> None:
    peer.fail = refuse_with_everything
    (error,) = client.compute_many([(ONES, ONES)], L1(), on_error="return")
    check_everything(error)


def test_retry_after_comes_from_the_details_or_the_push_back(target: str, peer: Peer) -> None:
    peer.pushback_ms = 250
    peer.fail = lambda _: refuse_once(retry_after=None)
    with LossClient(target, retries=0) as client:
        with pytest.raises(Overloaded) as raised:
            client.l1(ONES, ONES)
        assert raised.value.retry_after == 0.25
        peer.fail = lambda _: refuse_once(retry_after=1.5)
        with pytest.raises(Overloaded) as raised:
            client.l1(ONES, ONES)
        assert raised.value.retry_after == 1.5


def refuse_once(retry_after: float | None) -> None:
    raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=retry_after))


def test_details_that_cannot_be_read_leave_code_and_text(target: str, peer: Peer) -> None:
    def fail(_number: int, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff garbage"),))
        context.abort(Code.INVALID_ARGUMENT, "plain")

    peer.fail_call = fail
    with LossClient(target) as client, pytest.raises(InvalidRequest, match=r"^plain$"):
        client.l1(ONES, ONES)


def test_an_unreachable_server_is_unavailable_with_a_hint() -> None:
    with LossClient("127.0.0.1:1", retries=0) as client, pytest.raises(Unavailable) as raised:
        client.l1(ONES, ONES)
    first, hint = str(raised.value).split("\n")
    assert "refused" in first
    assert hint == "no answer from '127.0.0.1:1': is a server running there? See: lossgrad ping --target 127.0.0.1:1"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301


def test_what_the_server_still_finds_too_large_is_so(target: str, peer: Peer) -> None:
    def refuse(_: pb.ComputeLossRequest) -> None:
        raise Refused(status(Code.RESOURCE_EXHAUSTED, "too large", reason="RESULT_TOO_LARGE"))

    peer.fail = refuse
    with LossClient(target) as client, pytest.raises(RequestTooLarge, match="too large"):
        client.l1(ONES, ONES)


def test_a_server_that_does_not_serve_now_is_told_from_one_that_is_not_there() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer: Any = health.HealthServicer()  # type: ignore[no-untyped-call]
    servicer.set("lossgrad_api.v1.LossService", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with LossClient(f"127.0.0.1:{port}", retries=0) as client, pytest.raises(Unavailable) as raised:
            client.l1(ONES, ONES)
    finally:
        server.stop(None)
    assert str(raised.value).split("\n")[1].startswith(f"'127.0.0.1:{port}' is there and does not serve now")
