"""The device's worker as a thread of the server and in a process of its own, side by side: throughput, and a lone call.

    python -m bench.isolation [--quick] [--json] [--rounds N] [--seconds S] [--sizes 1MiB ...]

Two servers with their defaults, one with `--isolation thread`, one with `process`, take turns in every round. "throughput"
is unary calls of smooth L1 with its gradient by several callers at a time, "alone" one caller's. A size is that of each of
the two tensors of a request, and of the gradient that comes back. The bar is issue 8's: at 1 MiB the process keeps at least
85% of the thread's throughput.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import grpc

from bench import transport_messages as messages
from bench.measuring import (
    MIB,
    Bar,
    bars_table,
    interleave,
    number,
    paired_ratio,
    parse_size,
    progress,
    size_name,
    table,
    to_json,
)
from bench.transport_servers import loss_server
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_api.codec import COMPUTE_LOSS

SIZES: Final = (1024, MIB)
BAR_BYTES: Final = MIB
LEAST_SHARE: Final = 0.85
CALLERS: Final = 4
KINDS: Final = ("thread", "process")


class Caller:
    """Calls one server with messages that are made beforehand."""

    def __init__(self, target: str, callers: int) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        # A channel, and so a connection, for each caller.
        own = [[*options, ("grpc.use_local_subchannel_pool", 1)] for _ in range(callers)]
        self._channels = [grpc.insecure_channel(target, options=one) for one in own]
        self._methods: list[Any] = [channel.unary_unary(COMPUTE_LOSS) for channel in self._channels]

    def calls_per_second(self, byte_count: int, callers: int, seconds: float) -> float:
        """Return how many calls a second so many callers get answered."""
        request = messages.request(byte_count)
        for method in self._methods[:callers]:
            method(request)
        counts = [0] * callers
        begun = time.perf_counter()

        def call(index: int) -> None:
            while time.perf_counter() - begun < seconds:
                self._methods[index](request)
                counts[index] += 1

        threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - begun)

    def answer(self, byte_count: int) -> bytes:
        """Return an answer's bytes."""
        answer: bytes = self._methods[0](messages.request(byte_count))
        return answer

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()


def measure(targets: dict[str, str], byte_count: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the calls a second of every case, round by round."""
    callers = {kind: Caller(target, CALLERS) for kind, target in targets.items()}
    cases: dict[str, Callable[[], float]] = {}
    for kind, caller in callers.items():
        cases[f"throughput, {kind}"] = partial(caller.calls_per_second, byte_count, CALLERS, seconds)
        cases[f"alone, {kind}"] = partial(caller.calls_per_second, byte_count, 1, seconds / 2)
    try:
        if len({len(caller.answer(byte_count)) // 4096 for caller in callers.values()}) != 1:
            raise RuntimeError("the two servers do not give the same answers")
        return interleave(cases, rounds)
    finally:
        for caller in callers.values():
            caller.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables or JSON. Return 0 whatever the bar says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=0, help="how often every case has its turn")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long it then runs")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=list(SIZES))
    options = parser.parse_args(arguments)
    keep_large_blocks()
    rounds, seconds = options.rounds or (3 if options.quick else 9), options.seconds or (0.5 if options.quick else 1.0)
    rows: list[tuple[str, ...]] = []
    report: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with (
        loss_server("127.0.0.1", "--isolation", "thread") as thread,
        loss_server("127.0.0.1", "--isolation", "process") as process,
    ):
        for server in (thread, process):
            server.wait_until_ready()
        targets = dict(zip(KINDS, (thread.target, process.target), strict=True))
        for byte_count in options.sizes:
            progress(size_name(byte_count))
            rates = measure(targets, byte_count, rounds, seconds)
            for case in ("throughput", "alone"):
                medians = [statistics.median(rates[f"{case}, {kind}"]) for kind in KINDS]
                share = paired_ratio(rates[f"{case}, process"], rates[f"{case}, thread"])
                rows.append((size_name(byte_count), case, *map(number, medians), number(share)))
                report.append({"bytes": byte_count, "case": case, "calls_per_second": medians, "share": share})
                if byte_count == BAR_BYTES and case == "throughput":
                    bars.append(Bar(f"{size_name(byte_count)}: share of the thread's throughput", share, LEAST_SHARE))
    if options.json:
        print(json.dumps({"cases": report, "bars": json.loads(to_json(bars))}))
    else:
        heads = ("each tensor", f"{CALLERS} callers, or one", "thread, calls/s", "process, calls/s", "share")
        print(table(heads, rows, left=(0, 1)), bars_table(bars), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
