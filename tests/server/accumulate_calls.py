"""Calls AccumulateLoss with generated classes: what another language's client would send, and what it would read."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_api.v1.tensor_pb2 import Tensor
from lossgrad_server.transport.accumulate import AccumulationSession
from tests.server.calling import Failure, failure_of
from tests.server.requests import tensor
from tests.server.serving import PATIENCE_SECONDS, RunningServer

CHUNK = 4096  # the bits of a tensor that is cut at multiples of this are those of the whole

SMOOTH_L1 = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5))
MSE = pb.LossSpec(mse=pb.MseLoss())
SUM = pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_SUM)


def config(*specs: pb.LossSpec, **more: Any) -> pb.AccumulateLossRequest:
    """Return a stream's first message; smooth_l1 and mse where no spec is given."""
    return pb.AccumulateLossRequest(config=pb.AccumulationConfig(specs=specs or (SMOOTH_L1, MSE), **more))


def slice_of(
    sequence: int,
    input: Any,
    target: Any,
    *,
    group: str = "",
    dtype: str = "float32",
    weight: Any = None,
    mask: Any = None,
) -> pb.AccumulateLossRequest:
    """Return a slice over array-likes."""
    return pb.AccumulateLossRequest(
        slice=pb.Slice(
            sequence=sequence,
            group=group,
            input=input if isinstance(input, Tensor) else tensor(input, dtype),
            target=target if isinstance(target, Tensor) else tensor(target, dtype),
            weight=None if weight is None else tensor(weight, dtype),
            mask=None if mask is None else tensor(mask, "bool"),
        )
    )


@dataclass
class Answers:
    """What came back over a stream, in order, and how it ended."""

    results: list[pb.SliceResult] = field(default_factory=list)
    snapshots: list[pb.Accumulation] = field(default_factory=list)
    total: pb.Accumulation | None = None
    failure: Failure | None = None
    order: str = ""  # r(esult), s(napshot), t(otal), one for each message

    def take(self, message: pb.AccumulateLossResponse) -> None:
        part = message.WhichOneof("part")
        assert self.total is None, "nothing comes behind the total"
        if part == "slice":
            self.results.append(message.slice)
        elif part == "snapshot":
            self.snapshots.append(message.snapshot)
        else:
            assert part == "total"
            self.total = message.total
        self.order += {"slice": "r", "snapshot": "s", "total": "t"}[part]

    @property
    def state(self) -> Accumulation:
        """The total, of a stream that ended well."""
        assert self.failure is None, self.failure.message
        assert self.total is not None
        return Accumulation.from_message(self.total)

    @property
    def last_snapshot(self) -> Accumulation:
        return Accumulation.from_message(self.snapshots[-1])


def accumulate(
    stub: LossServiceStub, *messages: pb.AccumulateLossRequest | Iterable[pb.AccumulateLossRequest]
) -> Answers:
    """Send a stream and return all that comes back."""
    flat = [one for some in messages for one in ([some] if isinstance(some, pb.AccumulateLossRequest) else some)]
    answers = Answers()
    try:
        for message in stub.AccumulateLoss(iter(flat), timeout=PATIENCE_SECONDS):
            answers.take(message)
    except grpc.RpcError as error:
        answers.failure = failure_of(error)
    return answers


class Stream:
    """A stream that a test drives message by message."""

    def __init__(
        self, stub: LossServiceStub, *messages: pb.AccumulateLossRequest, timeout: float = PATIENCE_SECONDS
    ) -> None:
        self._messages: queue.SimpleQueue[pb.AccumulateLossRequest | None] = queue.SimpleQueue()
        for message in messages:
            self.send(message)
        self.call: Any = stub.AccumulateLoss(iter(self._messages.get, None), timeout=timeout)

    def send(self, message: pb.AccumulateLossRequest) -> None:
        self._messages.put(message)

    def receive(self) -> pb.AccumulateLossResponse:
        """Return the next answer."""
        answer: pb.AccumulateLossResponse = next(self.call)
        return answer

    def close(self) -> None:
        """Say that no more slices come."""
        self._messages.put(None)

    def rest(self) -> Answers:
        """Return all that still comes."""
        answers = Answers()
        try:
            for message in self.call:
                answers.take(message)
        except grpc.RpcError as error:
            answers.failure = failure_of(error)
        return answers

    def __iter__(self) -> Iterator[pb.AccumulateLossResponse]:
        return iter(self.call)


class EndlessCall:
    """A call whose deadline never comes, for sessions without a transport."""

    method = codec.ACCUMULATE_LOSS
    metadata: dict[str, str | bytes] = {}  # noqa: RUF012
    deadline = None
    peer = ""
    begun_ns = 0


def session_on(running: RunningServer, send: Callable[[bytes], Any]) -> AccumulationSession:
    return AccumulationSession(
        running.server._core.pipeline, send, max_groups=4096, max_message_bytes=running.config.max_message_bytes
    )


def parts_of(length: int, cuts: Iterable[int]) -> list[slice]:
    """Return the slices of `length` elements between the cuts, given in chunks."""
    edges = sorted({0, length, *(min(CHUNK * cut, length) for cut in cuts)})
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)] or [slice(0, 0)]


def numbers(length: int, seed: int = 0, dtype: str = "float32") -> NDArray[Any]:
    """Return numbers of many magnitudes and both signs."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=length) * 10.0 ** generator.integers(-4, 4, size=length)).astype(dtype)
