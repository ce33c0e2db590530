"""A lossgrad server written against the .proto alone: generated classes, blocking grpcio, torch's own losses in float64.

The client is tested against it so that two independent readings of the contract meet. It does what it is told besides:
`fail` makes calls fail, `hold` makes them wait, and it keeps what it was sent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import torch
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from torch.nn import functional

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import loss_service_pb2_grpc as pb_grpc
from lossgrad_api.v1 import tensor_pb2

DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT64: torch.float64,
    tensor_pb2.DATA_TYPE_INT64: torch.int64,
    tensor_pb2.DATA_TYPE_INT32: torch.int32,
    tensor_pb2.DATA_TYPE_INT16: torch.int16,
    tensor_pb2.DATA_TYPE_INT8: torch.int8,
    tensor_pb2.DATA_TYPE_UINT8: torch.uint8,
    tensor_pb2.DATA_TYPE_BOOL: torch.bool,
}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


class Refused(Exception):
    """A request that gets this status for an answer."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


def status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    field: str = "",
    request_id: str = "",
    retry_after: float | None = None,
) -> status_pb2.Status:
    """Return a google.rpc.Status with the details that lossgrad servers send."""
    details: list[Any] = []
    if reason:
        metadata = {"request_id": request_id} if request_id else {}
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="lossgrad", metadata=metadata))
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def _rpc_status(status: status_pb2.Status) -> Any:
    return rpc_status.to_status(status)  # type: ignore[no-untyped-call]


class Peer(pb_grpc.LossServiceServicer):
    """The service, and the knobs of its behaviour."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything, and answer every request."""
        self.requests: list[pb.ComputeLossRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.messages: list[int] = []  # how many requests each message of a stream had
        self.streams = 0
        # Called with each request; raises Refused to refuse it.
        self.fail: Callable[[pb.ComputeLossRequest], None] = lambda _: None
        # Called with each call's number (unary calls and streams apart), before it is served.
        self.fail_call: Callable[[int, Any], None] = lambda _number, _context: None
        self.health = b"\x08\x01"
        self.max_message_bytes = 64 * 1024 * 1024  # what it says of itself
        self.pushback_ms: int | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.arrived = threading.Event()
        self.ended = threading.Event()
        # Reorders and regroups the answers of one message of a stream into messages.
        self.group: Callable[[list[pb.TaggedResponse]], list[list[pb.TaggedResponse]]] = lambda answers: [answers]

    def ComputeLoss(self, request: pb.ComputeLossRequest, context: Any) -> pb.ComputeLossResponse:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.arrived.set()
        context.add_callback(self.ended.set)
        self.fail_call(len(self.requests), context)
        self._wait(context)
        try:
            self.fail(request)
            return compute(request)
        except Refused as refused:
            if self.pushback_ms is None:
                context.abort_with_status(_rpc_status(refused.status))
            details = ("grpc-status-details-bin", refused.status.SerializeToString())
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.pushback_ms)), details))
            context.abort(_rpc_status(refused.status).code, refused.status.message)
            raise

    def StreamComputeLoss(
        self, request_iterator: Iterator[pb.StreamComputeLossRequest], context: Any
    ) -> Iterator[pb.StreamComputeLossResponse]:
        self.streams += 1
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.ended.set)
        self.fail_call(self.streams, context)
        requests, messages = self.requests, self.messages  # this test's: a stream may end in the course of the next
        for message in request_iterator:
            messages.append(len(message.requests))
            self.arrived.set()
            self._wait(context)
            if not context.is_active():
                return
            answers = []
            for tagged in message.requests:
                requests.append(tagged.request)
                answer = pb.TaggedResponse(tag=tagged.tag)
                try:
                    self.fail(tagged.request)
                    answer.response.CopyFrom(compute(tagged.request))
                except Refused as refused:
                    answer.error.CopyFrom(refused.status)
                answers.append(answer)
            for group in self.group(answers):
                yield pb.StreamComputeLossResponse(responses=group)

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.GetServerInfoResponse(
            server_version="1.2.3",
            torch_version="2.13.0",
            device="cpu",
            data_types=[tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_BFLOAT16],
            limits=pb.ServerLimits(
                max_message_bytes=self.max_message_bytes,
                max_queued_requests=2,
                max_queued_bytes=3,
                max_stream_requests=64,
            ),
            determinism="peer",
        )

    def _wait(self, context: Any) -> None:
        # Ends when the test lets go, or when the caller has gone.
        context.add_callback(self.hold.set)
        self.hold.wait()


class PeerServer:
    """The peer on a port of its own."""

    def __init__(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.peer = Peer()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[
                ("grpc.max_receive_message_length", 64 * 1024 * 1024),
                ("grpc.max_send_message_length", 64 * 1024 * 1024),
            ],
        )
        pb_grpc.add_LossServiceServicer_to_server(self.peer, self._server)  # type: ignore[no-untyped-call]
        self._server.add_generic_rpc_handlers((_Health(self.peer),))
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self, grace: float | None = None) -> None:
        """Stop, and end what is under way."""
        self.peer.hold.set()
        self._server.stop(grace).wait()


class _Health(grpc.GenericRpcHandler):
    """grpc.health.v1.Health: SERVING, or whatever bytes the peer is told."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == "/grpc.health.v1.Health/Check":
            return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self._peer.health)
        return None


def compute(request: pb.ComputeLossRequest) -> pb.ComputeLossResponse:
    """Answer a request with torch's own functions and autograd, in float64."""
    input, target = to_torch(request.input), to_torch(request.target)
    if input.shape != target.shape and not request.allow_broadcast:
        message = f"target has shape {list(target.shape)}, input {list(input.shape)}; send equal shapes"
        raise Refused(status(grpc.StatusCode.INVALID_ARGUMENT, message, reason="SHAPE_MISMATCH", field="target.shape"))
    result_type = torch.promote_types(input.dtype, target.dtype)
    response = pb.ComputeLossResponse(
        stats=pb.ComputeStats(
            queue_ns=1000,
            pack_ns=2000,
            compute_ns=3000,
            unpack_ns=4000,
            batch_request_count=5,
            batch_element_count=6,
            device="cpu",
        ),
        idempotency_key=request.idempotency_key,
    )
    for spec in request.specs:
        result = response.results.add()
        x, y = input.double().requires_grad_(), target.double().requires_grad_()
        wide_x, wide_y = torch.broadcast_tensors(x, y)  # type: ignore[no-untyped-call]
        losses = elementwise(spec, wide_x, wide_y)
        weight = torch.ones_like(losses)
        if request.HasField("weight"):
            weight = to_torch(request.weight).double().expand(losses.shape)
        mask = torch.ones_like(losses, dtype=torch.bool)
        if request.HasField("mask"):
            mask = to_torch(request.mask).expand(losses.shape)
        losses, weight = torch.where(mask, losses * weight, 0.0), torch.where(mask, weight, 0.0)
        result.element_count = int(mask.sum())
        result.weight_sum = float(weight.detach().sum())
        result.nonfinite_count = int((~losses.isfinite()).sum())
        loss = reduce(spec, losses, weight)
        if spec.reduction in (pb.REDUCTION_MEAN, pb.REDUCTION_SUM, pb.REDUCTION_UNSPECIFIED):
            result.scalar = float(loss.detach())
        else:
            result.tensor.CopyFrom(to_message(loss.to(result_type)))
        if spec.include_total:
            result.total.CopyFrom(total_of(losses.detach()[mask], weight.detach()[mask]))
        if spec.include_gradient:
            scale = spec.gradient_scale if spec.HasField("gradient_scale") else 1.0
            grad_x, grad_y = torch.autograd.grad(loss.sum() * scale, (x, y))
            result.input_gradient.CopyFrom(to_message(grad_x.to(input.dtype)))
            if target.is_floating_point() and (input.shape != target.shape or input.dtype != result_type):
                result.target_gradient.CopyFrom(to_message(grad_y.to(target.dtype)))
    return response


def total_of(losses: torch.Tensor, weights: torch.Tensor) -> pb.LossState:
    """Return the exact total of unmasked elements' losses: Python's exact sum of a float64 for each 4096 of them."""
    finite = losses[~losses.isnan()]
    return pb.LossState(
        partial_sums=_partials(losses),
        element_count=losses.numel(),
        weight_sum=float(weights.sum()),
        min=float(finite.min()) if finite.numel() else math.inf,
        max=float(finite.max()) if finite.numel() else -math.inf,
        nonfinite_count=int((~losses.isfinite()).sum()),
        weight_partial_sums=_partials(weights),
    )


def _partials(values: torch.Tensor) -> list[float]:
    total = math.fsum(float(chunk.sum()) for chunk in values.flatten().split(4096))  # type: ignore[no-untyped-call]
    return [total] if total else []


def elementwise(spec: pb.LossSpec, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return each element's loss."""
    function = spec.WhichOneof("function")
    if function == "smooth_l1":
        return functional.smooth_l1_loss(input, target, reduction="none", beta=spec.smooth_l1.beta)
    if function == "huber":
        return functional.huber_loss(input, target, reduction="none", delta=spec.huber.delta)
    if function == "l1":
        return functional.l1_loss(input, target, reduction="none")
    assert function == "mse"
    return functional.mse_loss(input, target, reduction="none")


def reduce(spec: pb.LossSpec, losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the losses, reduced."""
    dimensions = tuple(range(losses.dim()))
    if spec.reduction == pb.REDUCTION_NONE:
        return losses
    if spec.reduction in (pb.REDUCTION_SAMPLE_MEAN, pb.REDUCTION_SAMPLE_SUM):
        dimensions = dimensions[1:]
    total = losses.sum(dimensions) if dimensions else losses
    if spec.reduction in (pb.REDUCTION_SUM, pb.REDUCTION_SAMPLE_SUM):
        return total
    if spec.HasField("denominator"):
        return total / spec.denominator
    return total / (weight.sum(dimensions) if dimensions else weight)


def to_torch(message: tensor_pb2.Tensor) -> torch.Tensor:
    """Return a Tensor message as a tensor."""
    dtype = DTYPES[message.data_type]
    if not message.data:
        return torch.empty(tuple(message.shape), dtype=dtype)
    return torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(tuple(message.shape))


def to_message(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """Return a tensor as a Tensor message."""
    data = bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    return tensor_pb2.Tensor(data_type=NUMBERS[tensor.dtype], shape=tuple(tensor.shape), data=data)
