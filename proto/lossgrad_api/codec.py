"""The codec that server and client share: bytes <-> plain values for the messages with tensors, without copying them.

What leaves here is plain protobuf and so is what comes in: any client and any server work with it. The generated
classes would copy every `bytes` field at parse, at access and at serialisation, and they refuse views. So reading keeps
views into the received bytes, and writing gives a list of parts whose join is the only copy.
"""

from __future__ import annotations

from typing import Final

from lossgrad_api.accumulate_codec import (
    SLICE_LAYOUT,
    ConfigView,
    SliceResultView,
    SliceView,
    StateView,
    decode_accumulate_response,
    encode_config_request,
    encode_slice_request,
    encode_slice_result,
    encode_state_response,
    parse_slice_header,
    slice_result_head,
    split_accumulate_request,
    split_slice,
)
from lossgrad_api.request_codec import (
    MAX_HEADER_BYTES,
    KnownRequests,
    RequestView,
    TaggedRequestView,
    TooManyRequests,
    encode_compute_request,
    encode_stream_request,
    encode_trace,
    parse_request_header,
    split_compute_request,
    split_stream_request,
)
from lossgrad_api.response_codec import (
    ResponseView,
    ResultView,
    StatsView,
    decode_compute_response,
    decode_stream_response,
    encode_compute_response,
    encode_stats,
    encode_stream_response,
    result_parts,
    stream_response_parts,
)
from lossgrad_api.response_form import ResponseForm, ResultForm, TensorForm
from lossgrad_api.wire import EMPTY, Buffer, CodecError, HeaderTooLarge, WireTensor

__all__ = [
    "ACCUMULATE_LOSS",
    "COMPUTE_LOSS",
    "EMPTY",
    "GET_SERVER_INFO",
    "MAX_HEADER_BYTES",
    "SERVICE",
    "SLICE_LAYOUT",
    "STREAM_COMPUTE_LOSS",
    "Buffer",
    "CodecError",
    "ConfigView",
    "HeaderTooLarge",
    "KnownRequests",
    "RequestView",
    "ResponseForm",
    "ResponseView",
    "ResultForm",
    "ResultView",
    "SliceResultView",
    "SliceView",
    "StateView",
    "StatsView",
    "TaggedRequestView",
    "TensorForm",
    "TooManyRequests",
    "WireTensor",
    "decode_accumulate_response",
    "decode_compute_response",
    "decode_stream_response",
    "encode_compute_request",
    "encode_compute_response",
    "encode_config_request",
    "encode_slice_request",
    "encode_slice_result",
    "encode_state_response",
    "encode_stats",
    "encode_stream_request",
    "encode_stream_response",
    "encode_trace",
    "parse_request_header",
    "parse_slice_header",
    "result_parts",
    "slice_result_head",
    "split_accumulate_request",
    "split_compute_request",
    "split_slice",
    "split_stream_request",
    "stream_response_parts",
]

SERVICE: Final = "lossgrad_api.v1.LossService"
COMPUTE_LOSS: Final = f"/{SERVICE}/ComputeLoss"
STREAM_COMPUTE_LOSS: Final = f"/{SERVICE}/StreamComputeLoss"
ACCUMULATE_LOSS: Final = f"/{SERVICE}/AccumulateLoss"
GET_SERVER_INFO: Final = f"/{SERVICE}/GetServerInfo"
