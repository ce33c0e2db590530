"""Calls servers with the generated stubs, and reads what errors carry: the service's tests see nothing of our SDK."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.serving import PATIENCE_SECONDS

Connect = Callable[[str], grpc.Channel]


class Failure:
    """What a failed call, or a failed request of a stream, told its caller."""

    def __init__(self, status: status_pb2.Status, trailers: dict[str, str | bytes] | None = None) -> None:
        self.status = status
        self.trailers = trailers or {}
        self.code = status.code
        self.message = status.message
        self.info = error_details_pb2.ErrorInfo()
        assert any(packed.Unpack(self.info) for packed in status.details), "every error of ours has an ErrorInfo"

    @property
    def violations(self) -> list[tuple[str, str, str]]:
        """The field, description and reason of each violation that BadRequest names."""
        bad_request = error_details_pb2.BadRequest()
        if not any(packed.Unpack(bad_request) for packed in self.status.details):
            return []
        return [(one.field, one.description, one.reason) for one in bad_request.field_violations]

    @property
    def retry_seconds(self) -> float | None:
        """The delay of RetryInfo; None without."""
        retry_info = error_details_pb2.RetryInfo()
        if not any(packed.Unpack(retry_info) for packed in self.status.details):
            return None
        return retry_info.retry_delay.ToNanoseconds() * 1e-9


def stub_on(channel: grpc.Channel) -> LossServiceStub:
    """Return the generated stub over a channel."""
    return LossServiceStub(channel)  # type: ignore[no-untyped-call]


def failure_of(error: Any) -> Failure:
    """Return what the RpcError of a call carries. Its code and text must agree with the details."""
    status = rpc_status.from_call(error)  # type: ignore[no-untyped-call]
    assert status is not None, f"{error.code()} came without details: {error.details()}"
    return Failure(status, dict(error.trailing_metadata()))


def failure(call: Callable[..., Any], message: pb.ComputeLossRequest | bytes) -> Failure:
    """Make a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(message, timeout=PATIENCE_SECONDS)
    return failure_of(caught.value)


def message(*requests: pb.ComputeLossRequest, first_tag: int = 0, timeout_ns: int = 0) -> pb.StreamComputeLossRequest:
    """Return a message of requests whose tags count from `first_tag`."""
    return pb.StreamComputeLossRequest(
        requests=[
            pb.TaggedRequest(tag=tag, timeout_ns=timeout_ns, request=one) for tag, one in enumerate(requests, first_tag)
        ]
    )


class Caller:
    """The sending side of a stream, as a test drives it."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[pb.StreamComputeLossRequest | None] = queue.SimpleQueue()

    def send(self, one: pb.StreamComputeLossRequest) -> None:
        self._messages.put(one)

    def close(self) -> None:
        self._messages.put(None)

    def __iter__(self) -> Iterator[pb.StreamComputeLossRequest]:
        return iter(self._messages.get, None)


def answers_by_tag(messages: list[pb.StreamComputeLossResponse]) -> dict[int, pb.TaggedResponse]:
    """Return a stream's answers by their tags, of which none comes twice."""
    answers = [answer for message in messages for answer in message.responses]
    by_tag = {answer.tag: answer for answer in answers}
    assert len(by_tag) == len(answers)
    return by_tag


def results_of(response: pb.ComputeLossResponse) -> bytes:
    """Return what may not depend on anything but the request: the results, to the bit."""
    return pb.ComputeLossResponse(results=response.results).SerializeToString(deterministic=True)
