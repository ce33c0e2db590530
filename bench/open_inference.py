"""What the Open Inference Protocol costs beside the native one: the same server, the same tensors, in turns.

    python -m bench.open_inference [--quick] [--json] [--sizes 1KiB 8MiB]

"raw" clients send bytes made beforehand and look at no answer: the server alone. "client" is what a user pays: LossClient
and tritonclient, from NumPy arrays to NumPy arrays. All ask for the loss and the gradient of two float32 tensors of a row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import grpc
import numpy as np

from bench import transport_messages
from bench.measuring import (
    KIB,
    MIB,
    Bar,
    bars_table,
    interleave,
    machine,
    number,
    paired_ratio,
    parse_size,
    percentile,
    size_name,
    table,
    to_json,
)
from bench.transport_loads import CHANNEL_OPTIONS, Burst, measured
from bench.transport_servers import ServerProcess, loss_server
from lossgrad import LossClient
from lossgrad_api import codec, inference
from lossgrad_api.allocator import keep_large_blocks

MODEL: Final = "smooth_l1_grad"
OUTPUTS: Final = ("LOSS", "GRAD")
SIZES: Final = (KIB, 64 * KIB, MIB, 8 * MIB)
DEADLINE_SECONDS: Final = 60.0

# Beside each, what it is held against: the native call that does the same.
PAIRS: Final = {"raw unary": "raw unary, native", "raw stream": "raw stream, native", "tritonclient": "LossClient"}


@dataclass(frozen=True)
class Row:
    """What one way of calling came to at one size. Times are per call."""

    tensor_bytes: int
    way: str
    calls_per_second: float
    ratio: float  # to the native way, the median of the rounds' ratios; NaN for the native ways
    median_us: float
    p99_us: float
    server_cpu_us: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0 however the bars came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.open_inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rough picture in half a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--sizes", type=parse_size, nargs="+", metavar="SIZE", help="sizes of a tensor, such as 64KiB")
    parser.add_argument("--rounds", type=int, help="how often everything takes its turn")
    parser.add_argument("--burst-seconds", type=float, help="how long a turn lasts")
    given = parser.parse_args(arguments)
    rounds = given.rounds or (5 if given.quick else 9)
    seconds = given.burst_seconds or (0.15 if given.quick else 0.4)
    keep_large_blocks()
    rows: list[Row] = []
    with loss_server("127.0.0.1:0") as server:
        server.wait_until_ready()
        for tensor_bytes in given.sizes or SIZES:
            rows += measure(server, tensor_bytes, rounds, seconds)
    bars = [
        Bar(f"{size_name(row.tensor_bytes)}, {row.way} beside {PAIRS[row.way]}", row.ratio, 0.9)
        for row in rows
        if row.way.startswith("raw") and row.way in PAIRS
    ]
    if given.json:
        print(to_json({"machine": machine(), "rows": rows, "bars": bars}))
    else:
        print(f"{shown(rows)}\n\n{bars_table(bars)}")
    return 0


def shown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    heads = ("tensor", "way", "calls/s", "of native", "median us", "p99 us", "server CPU us")
    cells = [
        (
            size_name(row.tensor_bytes),
            row.way,
            *map(number, (row.calls_per_second, row.ratio, row.median_us, row.p99_us, row.server_cpu_us)),
        )
        for row in rows
    ]
    return table(heads, cells, left=(0, 1))


def measure(server: ServerProcess, tensor_bytes: int, rounds: int, seconds: float) -> list[Row]:
    """Measure every way of calling at one size, in turns."""
    with ExitStack() as parts:
        cases = {
            name: measured(server, burst)
            for name, burst in parts.enter_context(ways(server.target, tensor_bytes, seconds)).items()
        }
        for burst in cases.values():  # connections, plans, memory
            burst()
        bursts = interleave(cases, rounds)
    rows = []
    for name, results in bursts.items():
        native = bursts.get(PAIRS.get(name, ""), None)
        latencies = [latency for one in results for latency in one.latencies]
        calls = sum(one.calls for one in results)
        rows.append(
            Row(
                tensor_bytes,
                name,
                statistics.median(one.rate for one in results),
                paired_ratio([one.rate for one in results], [one.rate for one in native]) if native else float("nan"),
                percentile(latencies, 50) * 1e6,
                percentile(latencies, 99) * 1e6,
                sum(one.server_cpu_seconds for one in results) / calls * 1e6,
            )
        )
    return rows


@contextmanager
def ways(target: str, tensor_bytes: int, seconds: float) -> Iterator[dict[str, Callable[[], Burst]]]:
    """Give a burst for each way of calling."""
    import tritonclient.grpc

    triton: Any = tritonclient.grpc  # it has no types
    input, target_array = transport_messages.tensors(tensor_bytes)
    row = (1, len(input))
    with ExitStack() as parts:
        channel = parts.enter_context(grpc.insecure_channel(target, options=CHANNEL_OPTIONS))
        ours = parts.enter_context(LossClient(target, timeout=DEADLINE_SECONDS))
        theirs: Any = triton.InferenceServerClient(target)
        parts.callback(theirs.close)
        native: Any = channel.unary_unary(codec.COMPUTE_LOSS)
        native_stream: Any = channel.stream_stream(codec.STREAM_COMPUTE_LOSS)
        open_inference: Any = channel.unary_unary(f"/{inference.SERVICE}/ModelInfer")
        open_stream: Any = channel.stream_stream(f"/{inference.SERVICE}/ModelStreamInfer")
        native_request, open_request = transport_messages.request(tensor_bytes), infer_request(input, target_array)

        def tritonclient_call() -> object:
            inputs: list[Any] = []
            for name, array in (("INPUT", input), ("TARGET", target_array)):
                one: Any = triton.InferInput(name, row, "FP32")
                one.set_data_from_numpy(array.reshape(row))
                inputs.append(one)
            outputs: list[Any] = [triton.InferRequestedOutput(name) for name in OUTPUTS]
            result = theirs.infer(MODEL, inputs, outputs=outputs)
            return result.as_numpy("LOSS"), result.as_numpy("GRAD")

        yield {
            "raw unary, native": unary(lambda: native(native_request, timeout=DEADLINE_SECONDS), seconds),
            "raw unary": unary(lambda: open_inference(open_request, timeout=DEADLINE_SECONDS), seconds),
            "raw stream, native": stream(native_stream, transport_messages.stream_request(tensor_bytes, 1), seconds),
            "raw stream": stream(open_stream, open_request, seconds),
            "LossClient": unary(lambda: ours.smooth_l1(input, target_array, gradient=True), seconds),
            "tritonclient": unary(tritonclient_call, seconds),
        }


def infer_request(input: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> bytes:
    """Return a ModelInferRequest of one row."""
    request = inference.messages().ModelInferRequest(model_name=MODEL)
    for name, array in (("INPUT", input), ("TARGET", target)):
        request.inputs.add(name=name, datatype="FP32", shape=(1, len(array)))
        request.raw_input_contents.append(array.tobytes())
    for name in OUTPUTS:
        request.outputs.add(name=name)
    data: bytes = request.SerializeToString()
    return data


def unary(call: Callable[[], object], seconds: float) -> Callable[[], Burst]:
    """Return a burst of calls one after the other."""

    def burst() -> Burst:
        result = Burst()
        start = now = time.perf_counter()
        while now - start < seconds:
            call()
            began, now = now, time.perf_counter()
            result.latencies.append(now - began)
        result.calls, result.seconds = len(result.latencies), now - start
        return result

    return burst


def stream(call: Any, message: bytes, seconds: float) -> Callable[[], Burst]:
    """Return a burst of messages on one stream, each sent when the one before it is answered."""

    def burst() -> Burst:
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        answers = call(iter(outgoing.get, None), timeout=DEADLINE_SECONDS)

        def exchange() -> None:
            outgoing.put(message)
            next(answers)

        result = unary(exchange, seconds)()
        outgoing.put(None)
        for _ in answers:
            raise RuntimeError("the server answers what was not asked")
        return result

    return burst


if __name__ == "__main__":
    sys.exit(main())
