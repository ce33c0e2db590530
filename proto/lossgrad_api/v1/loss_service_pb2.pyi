from google.rpc import status_pb2 as _status_pb2
from lossgrad_api.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_NONE: _ClassVar[Reduction]
    REDUCTION_MEAN: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]
    REDUCTION_SAMPLE_MEAN: _ClassVar[Reduction]
    REDUCTION_SAMPLE_SUM: _ClassVar[Reduction]
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_NONE: Reduction
REDUCTION_MEAN: Reduction
REDUCTION_SUM: Reduction
REDUCTION_SAMPLE_MEAN: Reduction
REDUCTION_SAMPLE_SUM: Reduction

class LossSpec(_message.Message):
    __slots__ = ("smooth_l1", "huber", "l1", "mse", "reduction", "include_gradient", "denominator", "gradient_scale", "include_total")
    SMOOTH_L1_FIELD_NUMBER: _ClassVar[int]
    HUBER_FIELD_NUMBER: _ClassVar[int]
    L1_FIELD_NUMBER: _ClassVar[int]
    MSE_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SCALE_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOTAL_FIELD_NUMBER: _ClassVar[int]
    smooth_l1: SmoothL1Loss
    huber: HuberLoss
    l1: L1Loss
    mse: MseLoss
    reduction: Reduction
    include_gradient: bool
    denominator: float
    gradient_scale: float
    include_total: bool
    def __init__(self, smooth_l1: _Optional[_Union[SmoothL1Loss, _Mapping]] = ..., huber: _Optional[_Union[HuberLoss, _Mapping]] = ..., l1: _Optional[_Union[L1Loss, _Mapping]] = ..., mse: _Optional[_Union[MseLoss, _Mapping]] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., include_gradient: bool = ..., denominator: _Optional[float] = ..., gradient_scale: _Optional[float] = ..., include_total: bool = ...) -> None: ...

class SmoothL1Loss(_message.Message):
    __slots__ = ("beta",)
    BETA_FIELD_NUMBER: _ClassVar[int]
    beta: float
    def __init__(self, beta: _Optional[float] = ...) -> None: ...

class HuberLoss(_message.Message):
    __slots__ = ("delta",)
    DELTA_FIELD_NUMBER: _ClassVar[int]
    delta: float
    def __init__(self, delta: _Optional[float] = ...) -> None: ...

class L1Loss(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MseLoss(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ComputeLossRequest(_message.Message):
    __slots__ = ("specs", "allow_broadcast", "idempotency_key", "mask", "weight", "target", "input", "outputs")
    SPECS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_BROADCAST_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    specs: _containers.RepeatedCompositeFieldContainer[LossSpec]
    allow_broadcast: bool
    idempotency_key: str
    mask: _tensor_pb2.Tensor
    weight: _tensor_pb2.Tensor
    target: _tensor_pb2.Tensor
    input: _tensor_pb2.Tensor
    outputs: _tensor_pb2.SharedMemory
    def __init__(self, specs: _Optional[_Iterable[_Union[LossSpec, _Mapping]]] = ..., allow_broadcast: bool = ..., idempotency_key: _Optional[str] = ..., mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., target: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., outputs: _Optional[_Union[_tensor_pb2.SharedMemory, _Mapping]] = ...) -> None: ...

class ComputeLossResponse(_message.Message):
    __slots__ = ("stats", "results", "idempotency_key", "padding")
    STATS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    stats: ComputeStats
    results: _containers.RepeatedCompositeFieldContainer[LossResult]
    idempotency_key: str
    padding: bytes
    def __init__(self, stats: _Optional[_Union[ComputeStats, _Mapping]] = ..., results: _Optional[_Iterable[_Union[LossResult, _Mapping]]] = ..., idempotency_key: _Optional[str] = ..., padding: _Optional[bytes] = ...) -> None: ...

class LossResult(_message.Message):
    __slots__ = ("scalar", "tensor", "element_count", "weight_sum", "nonfinite_count", "target_gradient", "input_gradient", "total")
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SUM_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TARGET_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    scalar: float
    tensor: _tensor_pb2.Tensor
    element_count: int
    weight_sum: float
    nonfinite_count: int
    target_gradient: _tensor_pb2.Tensor
    input_gradient: _tensor_pb2.Tensor
    total: LossState
    def __init__(self, scalar: _Optional[float] = ..., tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., element_count: _Optional[int] = ..., weight_sum: _Optional[float] = ..., nonfinite_count: _Optional[int] = ..., target_gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., input_gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., total: _Optional[_Union[LossState, _Mapping]] = ...) -> None: ...

class ComputeStats(_message.Message):
    __slots__ = ("queue_ns", "pack_ns", "compute_ns", "unpack_ns", "batch_request_count", "batch_element_count", "device")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    PACK_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    UNPACK_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    pack_ns: int
    compute_ns: int
    unpack_ns: int
    batch_request_count: int
    batch_element_count: int
    device: str
    def __init__(self, queue_ns: _Optional[int] = ..., pack_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., unpack_ns: _Optional[int] = ..., batch_request_count: _Optional[int] = ..., batch_element_count: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class StreamComputeLossRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[TaggedRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[TaggedRequest, _Mapping]]] = ...) -> None: ...

class StreamComputeLossResponse(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[TaggedResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[TaggedResponse, _Mapping]]] = ...) -> None: ...

class TaggedRequest(_message.Message):
    __slots__ = ("tag", "timeout_ns", "request", "traceparent", "tracestate")
    TAG_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    tag: int
    timeout_ns: int
    request: ComputeLossRequest
    traceparent: str
    tracestate: str
    def __init__(self, tag: _Optional[int] = ..., timeout_ns: _Optional[int] = ..., request: _Optional[_Union[ComputeLossRequest, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class TaggedResponse(_message.Message):
    __slots__ = ("tag", "response", "error")
    TAG_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    tag: int
    response: ComputeLossResponse
    error: _status_pb2.Status
    def __init__(self, tag: _Optional[int] = ..., response: _Optional[_Union[ComputeLossResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class AccumulateLossRequest(_message.Message):
    __slots__ = ("config", "slice")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    config: AccumulationConfig
    slice: Slice
    def __init__(self, config: _Optional[_Union[AccumulationConfig, _Mapping]] = ..., slice: _Optional[_Union[Slice, _Mapping]] = ...) -> None: ...

class AccumulateLossResponse(_message.Message):
    __slots__ = ("slice", "snapshot", "total", "padding")
    SLICE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    slice: SliceResult
    snapshot: Accumulation
    total: Accumulation
    padding: bytes
    def __init__(self, slice: _Optional[_Union[SliceResult, _Mapping]] = ..., snapshot: _Optional[_Union[Accumulation, _Mapping]] = ..., total: _Optional[_Union[Accumulation, _Mapping]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class AccumulationConfig(_message.Message):
    __slots__ = ("specs", "element_count", "resume_from", "snapshot_every_slices", "allow_broadcast")
    SPECS_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_EVERY_SLICES_FIELD_NUMBER: _ClassVar[int]
    ALLOW_BROADCAST_FIELD_NUMBER: _ClassVar[int]
    specs: _containers.RepeatedCompositeFieldContainer[LossSpec]
    element_count: int
    resume_from: Accumulation
    snapshot_every_slices: int
    allow_broadcast: bool
    def __init__(self, specs: _Optional[_Iterable[_Union[LossSpec, _Mapping]]] = ..., element_count: _Optional[int] = ..., resume_from: _Optional[_Union[Accumulation, _Mapping]] = ..., snapshot_every_slices: _Optional[int] = ..., allow_broadcast: bool = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("sequence", "group", "mask", "weight", "target", "input")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    group: str
    mask: _tensor_pb2.Tensor
    weight: _tensor_pb2.Tensor
    target: _tensor_pb2.Tensor
    input: _tensor_pb2.Tensor
    def __init__(self, sequence: _Optional[int] = ..., group: _Optional[str] = ..., mask: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., target: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SliceResult(_message.Message):
    __slots__ = ("sequence", "results")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    results: _containers.RepeatedCompositeFieldContainer[LossResult]
    def __init__(self, sequence: _Optional[int] = ..., results: _Optional[_Iterable[_Union[LossResult, _Mapping]]] = ...) -> None: ...

class Accumulation(_message.Message):
    __slots__ = ("last_sequence", "groups", "specs", "element_count")
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SPECS_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    last_sequence: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupState]
    specs: _containers.RepeatedCompositeFieldContainer[LossSpec]
    element_count: int
    def __init__(self, last_sequence: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupState, _Mapping]]] = ..., specs: _Optional[_Iterable[_Union[LossSpec, _Mapping]]] = ..., element_count: _Optional[int] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("group", "states")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    group: str
    states: _containers.RepeatedCompositeFieldContainer[LossState]
    def __init__(self, group: _Optional[str] = ..., states: _Optional[_Iterable[_Union[LossState, _Mapping]]] = ...) -> None: ...

class LossState(_message.Message):
    __slots__ = ("partial_sums", "element_count", "weight_sum", "min", "max", "nonfinite_count", "weight_partial_sums")
    PARTIAL_SUMS_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_SUM_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_PARTIAL_SUMS_FIELD_NUMBER: _ClassVar[int]
    partial_sums: _containers.RepeatedScalarFieldContainer[float]
    element_count: int
    weight_sum: float
    min: float
    max: float
    nonfinite_count: int
    weight_partial_sums: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, partial_sums: _Optional[_Iterable[float]] = ..., element_count: _Optional[int] = ..., weight_sum: _Optional[float] = ..., min: _Optional[float] = ..., max: _Optional[float] = ..., nonfinite_count: _Optional[int] = ..., weight_partial_sums: _Optional[_Iterable[float]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "torch_version", "device", "data_types", "limits", "determinism", "shared_memory")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISM_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    torch_version: str
    device: str
    data_types: _containers.RepeatedScalarFieldContainer[_tensor_pb2.DataType]
    limits: ServerLimits
    determinism: str
    shared_memory: SharedMemoryInfo
    def __init__(self, server_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., device: _Optional[str] = ..., data_types: _Optional[_Iterable[_Union[_tensor_pb2.DataType, str]]] = ..., limits: _Optional[_Union[ServerLimits, _Mapping]] = ..., determinism: _Optional[str] = ..., shared_memory: _Optional[_Union[SharedMemoryInfo, _Mapping]] = ...) -> None: ...

class SharedMemoryInfo(_message.Message):
    __slots__ = ("socket", "max_region_bytes")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    MAX_REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    socket: str
    max_region_bytes: int
    def __init__(self, socket: _Optional[str] = ..., max_region_bytes: _Optional[int] = ...) -> None: ...

class ServerLimits(_message.Message):
    __slots__ = ("max_message_bytes", "max_queued_requests", "max_queued_bytes", "max_stream_requests", "max_groups")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_GROUPS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_queued_requests: int
    max_queued_bytes: int
    max_stream_requests: int
    max_groups: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_queued_bytes: _Optional[int] = ..., max_stream_requests: _Optional[int] = ..., max_groups: _Optional[int] = ...) -> None: ...
