"""The codec that server and client share: bytes <-> plain values for the messages with tensors, without copying them.

What leaves here is plain protobuf and so is what comes in: any client and any server work with it. The generated
classes would copy every `bytes` field at parse, at access and at serialisation, and they refuse views. So reading keeps
views into the received bytes, and writing gives a list of parts whose join is the only copy.
"""

from __future__ import annotations

from typing import Final

from lossgrad_api.request_codec import (
    MAX_HEADER_BYTES,
    KnownRequests,
    RequestView,
    TaggedRequestView,
    TooManyRequests,
    encode_compute_request,
    encode_stream_request,
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
    "STREAM_COMPUTE_LOSS",
    "Buffer",
    "CodecError",
    "HeaderTooLarge",
    "KnownRequests",
    "RequestView",
    "ResponseForm",
    "ResponseView",
    "ResultForm",
    "ResultView",
    "StatsView",
    "TaggedRequestView",
    "TensorForm",
    "TooManyRequests",
    "WireTensor",
    "decode_compute_response",
    "decode_stream_response",
    "encode_compute_request",
    "encode_compute_response",
    "encode_stats",
    "encode_stream_request",
    "encode_stream_response",
    "parse_request_header",
    "split_compute_request",
    "split_stream_request",
    "stream_response_parts",
]

SERVICE: Final = "lossgrad_api.v1.LossService"
COMPUTE_LOSS: Final = f"/{SERVICE}/ComputeLoss"
STREAM_COMPUTE_LOSS: Final = f"/{SERVICE}/StreamComputeLoss"
ACCUMULATE_LOSS: Final = f"/{SERVICE}/AccumulateLoss"
GET_SERVER_INFO: Final = f"/{SERVICE}/GetServerInfo"
