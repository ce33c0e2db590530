"""What a call needs before it is sent and after it is answered; the same for every client, sync or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict

import grpc
from google.protobuf.message import DecodeError

from lossgrad import tracing
from lossgrad.errors import InvalidRequest, LossgradError, RequestTooLarge, ServerError, Unavailable, from_rpc_error
from lossgrad.losses import Loss
from lossgrad.results import LossResult, ServerInfo, ServerLimits, Timing, new_loss_result, new_timing
from lossgrad.tensors import (
    NAMES,
    NUMPY,
    Family,
    broadcast_shapes,
    is_array,
    own_view,
    promote,
    read_mask,
    read_pair,
    read_weight,
    tensor_of,
)
from lossgrad_api.codec import (
    COMPUTE_LOSS,
    GET_SERVER_INFO,
    SERVICE,
    STREAM_COMPUTE_LOSS,
    Buffer,
    CodecError,
    ResponseView,
    ResultView,
    decode_compute_response,
    encode_compute_request,
)
from lossgrad_api.raw_bytes import IS_SUPPORTED
from lossgrad_api.v1 import loss_service_pb2 as pb

if TYPE_CHECKING:
    from lossgrad.channel import Channel
    from lossgrad.metrics import ClientMetrics, MethodMetrics
    from lossgrad.shared_memory import SharedMemory
    from lossgrad.thread_coalescer import ThreadCoalescer

HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
# grpc.health.v1.HealthCheckRequest{service: SERVICE}; two fields are not worth depending on another package.
HEALTH_REQUEST: Final = b"\x0a" + bytes((len(SERVICE),)) + SERVICE.encode()
_SERVING: Final = b"\x08\x01"
MAX_SPECS: Final = 16
# Below this a request is joined when it is made. A second copy costs less there than handling parts, and the caller may
# use the arrays for something else.
JOINED_BYTES: Final = 256 * 1024
# From this size on an answer's arrays are made in the memory that it came in. Below it a copy costs less.
OWNED_BYTES: Final = 64 * 1024
# No server may be told to find so small a request too large, nor its answer: 64 KiB is its least limit. So it is not cut.
UNCUT_BYTES: Final = 16 * 1024
_MAX_FORMS: Final = 1024
# How long a call may wait to learn whether the server shares memory.
ASK_SECONDS: Final = 5.0

Losses = Loss | Sequence[Loss]
Answer = LossResult | tuple[LossResult, ...]


@dataclass(slots=True, eq=False)  # not frozen: that takes a microsecond, and every call has one
class Request:
    """A request ready to send: its parts, and how to read its answer.

    The parts of a large one are views into the caller's arrays. A small one has a single part, which is a copy.
    """

    parts: list[Buffer]
    byte_count: int
    losses: tuple[Loss, ...]
    is_single: bool
    input_family: Family
    target_family: Family
    result_type: int

    def message(self) -> bytes:
        """Return the message: the one copy of the caller's elements."""
        return b"".join(self.parts)

    @property
    def copies_answer(self) -> bool:
        """Whether reading a large answer, nobody else's, takes long: where it has several tensors, they are copied."""
        return not IS_SUPPORTED or sum(loss.gradient + (loss.reduction == "none") for loss in self.losses) > 1

    def instead(self, error: LossgradError) -> Request | None:
        """Return the request to send in place of this one, which failed; None where there is none."""
        return None

    def read(self, message: bytes, round_trip_seconds: float, *, is_own: bool = False) -> Answer:
        """Return what a ComputeLossResponse says. `is_own`: nobody else has it, so its one large tensor is not copied."""
        view = own_view(message) if is_own and len(message) >= OWNED_BYTES else None
        try:
            return self.read_view(decode_compute_response(message, view=view), round_trip_seconds)
        except CodecError as error:
            raise ServerError(f"the server's answer cannot be read: {error}") from error

    def read_view(self, view: ResponseView, round_trip_seconds: float) -> Answer:
        """Return what an answer says, in the caller's kind of arrays."""
        stats, results, idempotency_key = view
        if len(results) != len(self.losses):
            raise ServerError(f"the server gave {len(results)} results for {len(self.losses)} losses")
        timing = new_timing(stats, round_trip_seconds)
        if self.is_single:
            return self._result(self.losses[0], results[0], timing, idempotency_key)
        return tuple(
            self._result(spec, result, timing, idempotency_key)
            for spec, result in zip(self.losses, results, strict=True)
        )

    def _result(self, spec: Loss, result: ResultView, timing: Timing, idempotency_key: str) -> LossResult:
        value, tensor, element_count, weight_sum, nonfinite_count, target_gradient, gradient, _ = result
        family = self.input_family
        if value is not None:
            loss = family.scalar(value, self.result_type)
        elif tensor is not None:
            loss = tensor_of(family, tensor)
        else:
            raise ServerError(f"the server's answer has no loss for {spec!r}")
        if spec.gradient and gradient is None:
            raise ServerError(f"the server's answer has no gradient for {spec!r}")
        return new_loss_result(
            loss,
            value,
            None if gradient is None else tensor_of(family, gradient),
            None if target_gradient is None else tensor_of(self.target_family, target_gradient),
            element_count,
            weight_sum,
            nonfinite_count,
            timing,
            spec,
            idempotency_key,
        )


class Encoded(NamedTuple):
    """A ComputeLossRequest as parts, views into the caller's arrays among them, and what is known about it."""

    parts: list[Buffer]
    byte_count: int
    element_count: int  # of the result, 0 where the shapes do not fit
    input_family: Family
    target_family: Family
    result_type: int


class _Form(NamedTuple):
    """What requests for NumPy arrays of the same shapes, types and losses have in common."""

    target_head: Buffer  # all up to the target's elements
    input_head: Buffer  # all between those and the input's
    byte_count: int
    element_count: int
    result_type: int

    def parts(self, input: Any, target: Any) -> list[Buffer] | None:
        """Return the request for two such arrays; None where they do not lie in memory as they are sent."""
        try:
            if self.byte_count < JOINED_BYTES:
                # Arrays as they are: making views of them takes three times as long as joining them.
                return [b"".join((self.target_head, target, self.input_head, input))]
            return [self.target_head, target.data.cast("B"), self.input_head, input.data.cast("B")]
        except TypeError:  # not contiguous
            return None


_forms: dict[tuple[Any, ...], _Form] = {}
_NO_OPTIONS: Final[Mapping[str, Any]] = {}


class TensorOptions(TypedDict):
    """What a request has beside input, target and losses."""

    weight: Any
    mask: Any
    allow_broadcast: bool
    idempotency_key: str


_UNWATCHED: Final = nullcontext()


def watched(metrics: MethodMetrics | None) -> AbstractContextManager[None]:
    """Return what counts and traces the call that runs inside; where nothing does, it costs next to nothing."""
    if not tracing.is_on():
        return _UNWATCHED if metrics is None else metrics.call()
    return _counted_and_traced(metrics)


@contextmanager
def _counted_and_traced(metrics: MethodMetrics | None) -> Iterator[None]:
    with _UNWATCHED if metrics is None else metrics.call(), tracing.call_span("lossgrad.compute"):
        yield


def new_shared_memory(ask: Callable[[], bytes] | None = None) -> SharedMemory:
    """Return what a client that shares memory needs. Imported only here: it needs more of the system than other calls."""
    from lossgrad.shared_memory import SharedMemory

    return SharedMemory(ask)


def as_losses(losses: Losses) -> tuple[tuple[Loss, ...], bool]:
    """Return the losses as a tuple, and whether the caller gave just one."""
    if isinstance(losses, Loss):
        return (losses,), True
    several = tuple(losses) if isinstance(losses, Iterable) else (losses,)
    for loss in several:
        if not isinstance(loss, Loss):
            raise InvalidRequest(
                f"losses holds {loss!r} ({type(loss).__name__}); give lossgrad.SmoothL1(), Huber(), L1() or MSE(), or a "
                "list of them",
                reason="UNKNOWN_LOSS",
                field="losses",
            )
    if not 1 <= len(several) <= MAX_SPECS:
        raise InvalidRequest(
            f"losses holds {len(several)} losses; one request takes 1 to {MAX_SPECS}",
            reason="SPEC_COUNT",
            field="losses",
        )
    return several, False


def prepare(
    input: Any,
    target: Any,
    losses: tuple[Loss, ...],
    *,
    is_single: bool,
    max_message_bytes: int,
    weight: Any = None,
    mask: Any = None,
    allow_broadcast: bool = False,
    idempotency_key: str = "",
) -> Request:
    """Return the request for these tensors. Raises InvalidRequest and RequestTooLarge before anything is sent."""
    parts, byte_count, _, input_family, target_family, result_type = encode(
        input,
        target,
        [loss.serialized for loss in losses],
        max_message_bytes=max_message_bytes,
        weight=weight,
        mask=mask,
        allow_broadcast=allow_broadcast,
        idempotency_key=idempotency_key,
    )
    return Request(parts, byte_count, losses, is_single, input_family, target_family, result_type)


def known_request(input: Any, target: Any, loss: Loss) -> Request | None:
    """Return the request for two small arrays and no options, if one of its form was made before; None for any other.

    The shortest way to a request, for those who make thousands a second. It is of less than UNCUT_BYTES.
    """
    if not (is_array(input) and is_array(target)):
        return None
    form = _forms.get((input.dtype, input.shape, target.dtype, target.shape, False, loss.serialized))
    if form is None or form.byte_count >= UNCUT_BYTES:
        return None
    parts = form.parts(input, target)
    return None if parts is None else Request(parts, form.byte_count, (loss,), True, NUMPY, NUMPY, form.result_type)


def encode(
    input: Any,
    target: Any,
    specs: Sequence[bytes],
    *,
    max_message_bytes: int,
    weight: Any = None,
    mask: Any = None,
    allow_broadcast: bool = False,
    idempotency_key: str = "",
) -> Encoded:
    """Return the message for these tensors. `specs` are serialised LossSpecs. Raises InvalidRequest and RequestTooLarge."""
    form_key: tuple[Any, ...] | None = None
    if weight is None and mask is None and not idempotency_key and is_array(input) and is_array(target):
        form_key = (input.dtype, input.shape, target.dtype, target.shape, allow_broadcast, *specs)
        form = _forms.get(form_key)
        if form is not None:
            _check_size(form.byte_count, max_message_bytes)
            parts = form.parts(input, target)
            if parts is not None:
                return Encoded(parts, form.byte_count, form.element_count, NUMPY, NUMPY, form.result_type)
    first, second = read_pair(input, target)
    parts = encode_compute_request(
        specs,
        first.wire,
        second.wire,
        weight=None if weight is None else read_weight(weight),
        mask=None if mask is None else read_mask(mask),
        allow_broadcast=allow_broadcast,
        idempotency_key=idempotency_key,
    )
    byte_count = sum(map(len, parts))
    _check_size(byte_count, max_message_bytes)
    result_type = promote(first.wire.data_type, second.wire.data_type)
    shape = broadcast_shapes(first.wire.shape, second.wire.shape)
    element_count = 0 if shape is None else math.prod(shape)
    if form_key is not None and len(parts) == 4 and first.family is NUMPY and second.family is NUMPY:
        if len(_forms) >= _MAX_FORMS:  # rare enough that starting over is the simplest bound
            _forms.clear()
        _forms[form_key] = _Form(parts[0], parts[2], byte_count, element_count, result_type)
    if byte_count < JOINED_BYTES:
        parts = [b"".join(parts)]
    return Encoded(parts, byte_count, element_count, first.family, second.family, result_type)


def _check_size(byte_count: int, max_message_bytes: int) -> None:
    if byte_count > max_message_bytes:
        raise RequestTooLarge(
            f"this request takes {byte_count} bytes, the limit is {max_message_bytes}; send fewer elements at a time, or "
            "raise max_message_bytes here and LOSSGRAD_MAX_MESSAGE_BYTES on the server",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "MESSAGE_TOO_LARGE",
        )


def split_pair(pair: Any) -> tuple[Any, Any, Mapping[str, Any]]:
    """Return input, target and options of one item of a stream: (input, target) or (input, target, options)."""
    if type(pair) is tuple and len(pair) == 2:
        return pair[0], pair[1], _NO_OPTIONS
    if isinstance(pair, (tuple, list)) and len(pair) in (2, 3):
        options = pair[2] if len(pair) == 3 else {}
        if isinstance(options, Mapping):
            unknown = set(options) - {"weight", "mask", "idempotency_key"}
            if not unknown:
                return pair[0], pair[1], options
            raise InvalidRequest(
                f"a pair's options hold {sorted(map(str, unknown))}; they may hold 'weight', 'mask', 'idempotency_key'",
                field="pairs",
            )
    size = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
    raise InvalidRequest(
        f"pairs holds a {type(pair).__name__}{size}; give (input, target) or "
        "(input, target, {'weight': ..., 'mask': ...})",
        field="pairs",
    )


def deadline_seconds(timeout: float | None, default: float) -> float | None:
    """Return the timeout as gRPC takes it: None for no limit."""
    seconds = default if timeout is None else timeout
    if not seconds > 0:
        raise InvalidRequest(
            f"timeout is {seconds!r} seconds; it must be above 0 (math.inf: no limit)",
            reason="BAD_TIMEOUT",
            field="timeout",
        )
    return None if math.isinf(seconds) else float(seconds)


def read_info(message: bytes) -> ServerInfo:
    """Return what a GetServerInfoResponse says."""
    try:
        info = pb.GetServerInfoResponse.FromString(message)
    except DecodeError as error:
        raise ServerError("the server's answer is not a lossgrad_api.v1.GetServerInfoResponse") from error
    return ServerInfo(
        server_version=info.server_version,
        torch_version=info.torch_version,
        device=info.device,
        data_types=tuple(NAMES.get(number, f"unknown ({number})") for number in info.data_types),
        limits=ServerLimits(
            info.limits.max_message_bytes,
            info.limits.max_queued_requests,
            info.limits.max_queued_bytes,
            info.limits.max_stream_requests,
        ),
        determinism=info.determinism,
    )


def require_serving(message: bytes, target: str) -> None:
    """Raise Unavailable unless a HealthCheckResponse says SERVING."""
    if message != _SERVING:
        raise Unavailable(
            f"the server at {target!r} is up, but does not serve now: it starts or drains", grpc.StatusCode.UNAVAILABLE
        )


def stream_ended(ending: Exception | None, target: str) -> LossgradError:
    """Return what the end of a stream with requests unanswered means: an error, or None where the server ended it."""
    if ending is None:
        return Unavailable("the server ended the stream before it had answered", grpc.StatusCode.UNAVAILABLE)
    if isinstance(ending, LossgradError):
        return ending
    if isinstance(ending, grpc.RpcError):
        return from_rpc_error(ending, target)
    raise ending


class Connection:
    """A channel, its four methods on bytes, and what shares its streams."""

    def __init__(self, channel: Channel, metrics: ClientMetrics | None = None) -> None:
        if metrics is not None:
            from lossgrad.metered import MeteredChannel

            channel = MeteredChannel(channel, metrics)
        self.channel = channel
        self.compute = channel.unary_unary(COMPUTE_LOSS)
        self.info = channel.unary_unary(GET_SERVER_INFO)
        self.health = channel.unary_unary(HEALTH_CHECK)
        self.stream = channel.stream_stream(STREAM_COMPUTE_LOSS)
        self.coalescer: ThreadCoalescer | None = None
