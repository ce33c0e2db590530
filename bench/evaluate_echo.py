"""The floor of bench.evaluate: an echo for stream messages as `evaluate` sends them, with answers as the server's."""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

from bench import transport_messages
from bench.echo_server import Echo, serve
from lossgrad import SmoothL1
from lossgrad.slicing import INCLUDE_TOTAL
from lossgrad_api import codec
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2

_FLOAT32: Final = int(tensor_pb2.DATA_TYPE_FLOAT32)
_SPEC: Final = SmoothL1(reduction="sum").serialized + INCLUDE_TOTAL


def request(tensor_bytes: int, count: int) -> bytes:
    """Return a StreamComputeLossRequest of `count` slices, as `evaluate` sends it."""
    input, target = (
        codec.WireTensor(_FLOAT32, array.shape, array.data.cast("B"))
        for array in transport_messages.tensors(tensor_bytes)
    )
    parts = codec.encode_compute_request([_SPEC], input, target)
    return codec.encode_stream_request([(tag, 0, parts) for tag in range(1, count + 1)])


def answer(tensor_bytes: int, count: int) -> bytes:
    """Return an answer of the size of the server's."""
    elements = tensor_bytes // 4
    total = pb.LossState(
        partial_sums=[0.125, 1e-17],
        element_count=elements,
        weight_sum=elements,
        min=0.1,
        max=0.9,
        weight_partial_sums=[elements],
    )
    result = codec.ResultView(0.125, None, elements, float(elements), 0, None, None, total.SerializeToString())
    stats = codec.StatsView(30_000, 30_000, 60_000, 10_000, 1, elements, "cpu")
    parts = codec.encode_compute_response(stats, [result])
    return codec.encode_stream_response([(tag, parts) for tag in range(1, count + 1)])


class EvaluateEcho(Echo):
    """Answers a message of slices of one of these sizes (tensor bytes, slices to a message)."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__([], [], 0)
        for tensor_bytes, count in sizes:
            self._stream[len(request(tensor_bytes, count))] = answer(tensor_bytes, count)
        transport_messages.tensors.cache_clear()


def main() -> None:
    """Run the server from the command line; bench.evaluate does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:0", help="where to listen")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("BYTES", "SLICES"), required=True)
    arguments = parser.parse_args()
    keep_large_blocks()
    asyncio.run(serve(arguments.address, EvaluateEcho([tuple(size) for size in arguments.size])))


if __name__ == "__main__":
    main()
