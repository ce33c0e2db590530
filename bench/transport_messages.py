"""The messages of bench.transport: requests of two float32 tensors and one smooth L1 loss, and answers with one gradient.

The answers are what the server gives up to the values in them, so that a raw client, the SDK and our server can all be put
against the echo server, with messages of equal sizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np

from lossgrad import SmoothL1
from lossgrad_api import codec
from lossgrad_api.v1 import tensor_pb2
from lossgrad_api.wire import read_length, read_tag

LOSS: Final = SmoothL1(gradient=True)
_FLOAT32: Final = int(tensor_pb2.DATA_TYPE_FLOAT32)

Array = np.ndarray[Any, np.dtype[np.float32]]


@cache
def tensors(tensor_bytes: int) -> tuple[Array, Array]:
    """Return an input and a target of this size each."""
    generator = np.random.default_rng(20260101)
    count = tensor_bytes // 4
    return generator.random(count, np.float32), generator.random(count, np.float32)


def _request_parts(tensor_bytes: int) -> list[codec.Buffer]:
    input, target = (codec.WireTensor(_FLOAT32, array.shape, array.data.cast("B")) for array in tensors(tensor_bytes))
    return codec.encode_compute_request([LOSS.serialized], input, target)


def _answer_parts(tensor_bytes: int) -> list[codec.Buffer]:
    count = tensor_bytes // 4
    # Times as they commonly are: they decide over a byte or two.
    stats = codec.StatsView(30_000, 30_000, 60_000, 10_000, 1, count, "cpu")
    gradient = codec.WireTensor(_FLOAT32, (count,), bytes(tensor_bytes))
    result = codec.ResultView(0.125, None, count, float(count), 0, None, gradient)
    return codec.encode_compute_response(stats, [result])


def request(tensor_bytes: int) -> bytes:
    """Return a ComputeLossRequest."""
    return b"".join(_request_parts(tensor_bytes))


def answer(tensor_bytes: int) -> bytes:
    """Return a ComputeLossResponse."""
    return b"".join(_answer_parts(tensor_bytes))


def stream_request(tensor_bytes: int, count: int) -> bytes:
    """Return a StreamComputeLossRequest of `count` requests."""
    parts = _request_parts(tensor_bytes)
    return codec.encode_stream_request([(tag, 0, parts) for tag in range(1, count + 1)])


def stream_answer(tensor_bytes: int, count: int) -> bytes:
    """Return the StreamComputeLossResponse to that."""
    parts = _answer_parts(tensor_bytes)
    return codec.encode_stream_response([(tag, parts) for tag in range(1, count + 1)])


def count_answers(message: bytes) -> int:
    """Return how many answers a StreamComputeLossResponse holds, without looking into them."""
    count = position = 0
    end = len(message)
    while position < end:
        _, position = read_tag(message, position, end)
        _, position = read_length(message, position, end)
        count += 1
    return count


def bytes_in_flight(tensor_bytes: int, outstanding: int) -> int:
    """Return how many bytes of tensors so many unanswered requests stand for: two in, one out."""
    return 3 * tensor_bytes * outstanding
