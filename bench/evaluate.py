"""What `evaluate` costs: LossClient.evaluate against an echo of the same messages, pipelined, side by side in one run.

    python -m bench.evaluate [--sizes 1KiB 64KiB 1MiB 4MiB] [--json]

"floor" is a raw gRPC client that keeps as much in flight as `evaluate` does, against an echo server that looks at nothing:
one slice to a message, as bench.transport's streams, and also packed as `evaluate` packs slices of up to 2 MiB. It sends the
same bytes again and again. "copying floor" joins two arrays into each message, as whoever has arrays must, and computes
nothing. "evaluate" starts from NumPy arrays and ends with exact totals. The bar is issue 6's: 0.8 of the floor with one
slice to a message. All three channels and servers have the same message and frame sizes, and answers of the same size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final

import grpc

from bench import evaluate_echo
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
    progress,
    size_name,
    table,
    to_json,
)
from bench.transport_loads import CHANNEL_OPTIONS
from bench.transport_messages import count_answers, tensors
from bench.transport_servers import ServerProcess, loss_server
from lossgrad import LossClient, SmoothL1
from lossgrad.evaluating import DEFAULT_IN_FLIGHT_BYTES
from lossgrad.exchange import FULL_MESSAGE_BYTES, MAX_REQUESTS_PER_MESSAGE
from lossgrad.slice_window import MAX_SLICES, MESSAGE_BYTES, WRITTEN_BYTES
from lossgrad_api import codec
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_api.raw_bytes import join_without_gil

_HEADER_BYTES: Final = 256
_BAR: Final = 0.8


@dataclass(frozen=True, slots=True)
class Row:
    """One size of slices: medians over the rounds, in slices per second; ratios are medians of the rounds' ratios."""

    slice_bytes: int
    floor: float
    packed_floor: float | None
    copying_floor: float
    evaluate: float
    ratio: float
    packed_ratio: float | None
    copying_ratio: float
    evaluate_mib_per_second: float


@dataclass(slots=True)
class Report:
    """What a run found."""

    benchmark: str = "evaluate"
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__)
    parser.add_argument(
        "--no-computing",
        dest="computing",
        action="store_false",
        help="leave the engine out: transport and client alone",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything takes its turn")
    parser.add_argument("--burst-seconds", type=float, default=0.6, help="how long a turn lasts")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[KIB, 64 * KIB, MIB, 4 * MIB],
        help="bytes of each tensor of a slice",
    )
    given = parser.parse_args(arguments)
    keep_large_blocks()  # what a client may do too
    report = Report(machine=machine())
    with ExitStack() as parts:
        sizes = [(size, count) for size in given.sizes for count in dict.fromkeys((1, packed_count(size)))]
        flags = [text for size, count in sizes for text in ("--size", str(size), str(count))]
        echo = parts.enter_context(ServerProcess("bench.evaluate_echo", *flags))
        server = parts.enter_context(loss_server("tcp", computing=given.computing))
        for each in (echo, server):
            each.wait_until_ready()
        channel = parts.enter_context(grpc.insecure_channel(echo.target, options=CHANNEL_OPTIONS))
        client = parts.enter_context(LossClient(server.target))
        for size in given.sizes:
            progress(f"slices of {size_name(size)}")
            report.rows.append(measure(channel, client, size, given.rounds, given.burst_seconds))
    report.bars = [
        Bar(f"{size_name(row.slice_bytes)} slices: evaluate to the pipelined floor", row.ratio, _BAR, unit="x")
        for row in report.rows
    ]
    print(to_json(report) if given.json else text_of(report))
    return 0


def measure(channel: grpc.Channel, client: LossClient, size: int, rounds: int, seconds: float) -> Row:
    """Measure one size of slices."""
    cases: dict[str, Callable[[], float]] = {
        "floor": floor(channel, size, 1, seconds),
        "copying floor": floor(channel, size, 1, seconds, copies=True),
        "evaluate": evaluate(client, size, seconds),
    }
    if is_packed(size):
        cases["packed floor"] = floor(channel, size, packed_count(size), seconds)
    for case in cases.values():
        case()  # warms up
    rates = interleave(cases, rounds)
    middle = {name: sorted(each)[len(each) // 2] for name, each in rates.items()}
    return Row(
        size,
        middle["floor"],
        middle.get("packed floor"),
        middle["copying floor"],
        middle["evaluate"],
        paired_ratio(rates["evaluate"], rates["floor"]),
        paired_ratio(rates["evaluate"], rates["packed floor"]) if is_packed(size) else None,
        paired_ratio(rates["evaluate"], rates["copying floor"]),
        middle["evaluate"] * 2 * size / MIB,
    )


def floor(
    channel: grpc.Channel, size: int, per_message: int, seconds: float, *, copies: bool = False
) -> Callable[[], float]:
    """Return what gives the slices per second of a raw client that keeps the same in flight as `evaluate`.

    `copies`: each message is made of two buffers, as from arrays.
    """
    call: Any = channel.stream_stream(codec.STREAM_COMPUTE_LOSS)
    message = evaluate_echo.request(size, per_message)
    parts = [bytearray(message[: len(message) // 2]), bytearray(message[len(message) // 2 :])]
    most = max(per_message, min(MAX_SLICES, DEFAULT_IN_FLIGHT_BYTES // len(message) * per_message))

    def burst() -> float:
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        answers = call(iter(outgoing.get, None), timeout=120.0)
        sent = answered = 0
        start = time.perf_counter()
        while True:
            while sent - answered + per_message <= most and time.perf_counter() - start < seconds:
                outgoing.put(join_without_gil(parts) if copies else message)
                sent += per_message
            if sent == answered:
                break
            answered += count_answers(next(answers))
        elapsed = time.perf_counter() - start
        outgoing.put(None)
        for _ in answers:
            raise RuntimeError("the server answers what was not asked")
        return answered / elapsed

    return burst


def evaluate(client: LossClient, size: int, seconds: float) -> Callable[[], float]:
    """Return what gives the slices per second of LossClient.evaluate."""
    pair = tensors(size)

    def burst() -> float:
        start = time.perf_counter()

        def batches() -> Iterator[tuple[Any, Any]]:
            while time.perf_counter() - start < seconds:
                yield pair

        report = client.evaluate(batches(), SmoothL1(), slice_bytes=2 * size)
        assert report.throughput is not None  # noqa: S101 - evaluate() sets it
        return report.throughput.slice_count / (time.perf_counter() - start)

    return burst


def is_packed(size: int) -> bool:
    """Whether `evaluate` packs several slices of this size into a message."""
    return packed_count(size) > 1


def packed_count(size: int) -> int:
    """Return how many slices of this size `evaluate` packs into a message."""
    message_bytes = MESSAGE_BYTES if 2 * size >= WRITTEN_BYTES else FULL_MESSAGE_BYTES
    return max(1, min(MAX_REQUESTS_PER_MESSAGE, message_bytes // (2 * size + _HEADER_BYTES)))


def text_of(report: Report) -> str:
    """Return the report for people."""
    heads = (
        "slice (each tensor)",
        "floor /s",
        "packed floor /s",
        "copying floor /s",
        "evaluate /s",
        "MiB/s",
        "ratio",
        "to packed",
        "to copying",
    )
    rows = [
        (
            size_name(row.slice_bytes),
            number(row.floor),
            "" if row.packed_floor is None else number(row.packed_floor),
            number(row.copying_floor),
            number(row.evaluate),
            number(row.evaluate_mib_per_second),
            number(row.ratio),
            "" if row.packed_ratio is None else number(row.packed_ratio),
            number(row.copying_ratio),
        )
        for row in report.rows
    ]
    machine_line = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    return "\n\n".join([machine_line, table(heads, rows), bars_table(report.bars)])


if __name__ == "__main__":
    sys.exit(main())
