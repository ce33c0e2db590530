"""The handlers of lossgrad_api.v1.LossService, written against `Call` and bytes; they see no grpcio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import DataType
from lossgrad_server.transport import accumulate, stream
from lossgrad_server.transport.accumulate import AccumulationSession
from lossgrad_server.transport.call import Call, Method, Send
from lossgrad_server.transport.origin import CallOrigin
from lossgrad_server.transport.pipeline import Answer, PendingComputeLoss, RequestPipeline, joined
from lossgrad_server.transport.stream import StreamSession

API: Final = "native"


@dataclass(frozen=True, slots=True)
class ServiceDescription:
    """What GetServerInfo answers with. The units are those of the message's fields."""

    server_version: str
    torch_version: str
    device: str
    determinism: str
    max_message_bytes: int
    max_queued_requests: int
    max_queued_bytes: int
    max_stream_requests: int
    max_groups: int


class LossService:
    """Computes losses for callers, through one pipeline."""

    def __init__(
        self,
        pipeline: RequestPipeline,
        description: ServiceDescription,
        offer_memory: Callable[[str], tuple[str, int] | None] = lambda _: None,
    ) -> None:
        """`offer_memory` returns, for a caller's address, where it gets memory to share and how much; None for nobody."""
        self._pipeline = pipeline
        self._description = description
        self._offer_memory = offer_memory
        self._info = _info(description).SerializeToString()

    def methods(self) -> list[Method]:
        """Return the service's methods."""
        return [
            Method(codec.COMPUTE_LOSS, unary=self.compute_loss, api=API),
            Method(codec.STREAM_COMPUTE_LOSS, stream=self.stream_compute_loss, api=stream.API),
            Method(codec.ACCUMULATE_LOSS, stream=self.accumulate_loss, api=accumulate.API),
            Method(codec.GET_SERVER_INFO, unary=self.get_server_info),
        ]

    async def compute_loss(self, request: bytes, call: Call) -> bytes:
        """Answer a ComputeLossRequest with a ComputeLossResponse."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def on_answer(_: PendingComputeLoss, answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        metrics = self._pipeline.metrics
        metrics.request_bytes.labels(API).observe(len(request))
        tracer = self._pipeline.tracer
        try:
            pending = self._pipeline.open(request, 0, None, api=API, deadline=call.deadline, on_answer=on_answer)
        except RequestError as error:
            if tracer is not None:
                tracer.refused(error, call, None, call.begun_ns)
            raise
        pending.origin = CallOrigin(call)
        self._pipeline.submit([pending])
        try:
            answer = await answered
        except asyncio.CancelledError:
            pending.abandon()
            raise
        if isinstance(answer, RequestError):
            raise answer
        message = await joined(answer, API, metrics)
        if tracer is not None:
            pending.sent()
        return message

    async def stream_compute_loss(self, messages: AsyncIterator[bytes], send: Send, call: Call) -> None:
        """Answer StreamComputeLossRequests with StreamComputeLossResponses."""
        session = StreamSession(
            self._pipeline,
            send,
            max_requests=self._description.max_stream_requests,
            max_bytes=self._description.max_message_bytes,
        )
        await session.run(messages, call)

    async def accumulate_loss(self, messages: AsyncIterator[bytes], send: Send, call: Call) -> None:
        """Answer AccumulateLossRequests with AccumulateLossResponses."""
        session = AccumulationSession(
            self._pipeline,
            send,
            max_groups=self._description.max_groups,
            max_message_bytes=self._description.max_message_bytes,
        )
        await session.run(messages, call)

    async def get_server_info(self, request: bytes, call: Call) -> bytes:
        """Answer a GetServerInfoRequest with a GetServerInfoResponse."""
        offer = self._offer_memory(call.peer)
        if offer is None:
            return self._info
        socket, max_region_bytes = offer
        memory = pb.SharedMemoryInfo(socket=socket, max_region_bytes=max_region_bytes)
        return self._info + pb.GetServerInfoResponse(shared_memory=memory).SerializeToString()  # messages concatenate


def _info(description: ServiceDescription) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        server_version=description.server_version,
        torch_version=description.torch_version,
        device=description.device,
        data_types=[data_type.value for data_type in DataType],  # type: ignore[misc]
        limits=pb.ServerLimits(
            max_message_bytes=description.max_message_bytes,
            max_queued_requests=description.max_queued_requests,
            max_queued_bytes=description.max_queued_bytes,
            max_stream_requests=description.max_stream_requests,
            max_groups=description.max_groups,
        ),
        determinism=description.determinism,
    )
