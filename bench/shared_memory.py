"""Tensors in shared memory, beside the wire and beside the kernel in this process: what a call takes, loss with gradient.

    python -m bench.shared_memory [--quick] [--json] [--rounds N]

"wire" and "shared" are LossClient with ordinary arrays, "in place" with arrays of `client.empty`, of which nothing is
copied. "kernel" is the engine's worker in this process over the same arrays, with as many threads as the server has; "small"
is a unary call with tensors of 1 KiB (`coalesce=False`). All take turns in every round. The bars are issue 5's: "in place"
is what they are held against, because a copy by the caller is the caller's; "shared" stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

import lossgrad
from bench.measuring import MIB, Bar, bars_table, interleave, number, paired_ratio, progress, size_name, table, to_json
from bench.transport_servers import loss_server
from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import WorkItem

SIZES: Final = (1 * MIB, 16 * MIB, 64 * MIB)
LEAST_SPEEDUP: Final = 4.0
SPEEDUP_BYTES: Final = 16 * MIB
MOST_OF_KERNEL: Final = 1.5
CASES: Final = ("wire", "shared", "in place", "kernel", "small")


def seconds_of(call: Callable[[], object], times: int) -> float:
    """Return the seconds of one of several calls, the first left out."""
    call()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def measure(target: str, byte_count: int, rounds: int, worker: CpuWorker) -> dict[str, list[float]]:
    """Return the seconds of every case, round by round."""
    count = byte_count // 4
    x, y = np.random.default_rng(0).normal(size=(2, count)).astype(np.float32)
    small = np.ones(256, np.float32)
    tensor = TensorPlan(DataType.FLOAT32, (count,))
    plan = JobPlan((SpecPlan(LossKind.SMOOTH_L1, 1.0, Reduction.MEAN, True),), tensor, tensor)
    item = WorkItem(plan.header, (x.data.cast("B"), y.data.cast("B")))
    times = max(2, 16 * MIB // byte_count)
    with (
        lossgrad.LossClient(target) as wire,
        lossgrad.LossClient(target, shared_memory=True) as sharing,
        lossgrad.LossClient(target, coalesce=False) as unary,
    ):
        mine, other = sharing.empty(count), sharing.empty(count)
        mine[:], other[:] = x, y
        check(wire, sharing, x, y, mine, other)
        cases: dict[str, Callable[[], float]] = {
            "wire": lambda: seconds_of(lambda: wire.smooth_l1(x, y, gradient=True), times),
            "shared": lambda: seconds_of(lambda: sharing.smooth_l1(x, y, gradient=True), times),
            "in place": lambda: seconds_of(lambda: sharing.smooth_l1(mine, other, gradient=True), times),
            "kernel": lambda: seconds_of(lambda: worker.submit([item]).result(), times),
            "small": lambda: seconds_of(lambda: unary.smooth_l1(small, small, gradient=True), 20),
        }
        return interleave(cases, rounds)


def check(wire: Any, sharing: Any, x: Any, y: Any, mine: Any, other: Any) -> None:
    """See to it that all compute the same, and that memory is shared at all."""
    expected = wire.smooth_l1(x, y, gradient=True)
    for result in (sharing.smooth_l1(x, y, gradient=True), sharing.smooth_l1(mine, other, gradient=True)):
        if result.value != expected.value or result.gradient.tobytes() != expected.gradient.tobytes():
            raise RuntimeError("the results over shared memory are not those of the wire")
        if result.gradient.base is None:
            raise RuntimeError("memory is not shared; the warning above says why")


def bars_of(byte_count: int, seconds: dict[str, list[float]]) -> list[Bar]:
    """Return what one size must show."""
    size = size_name(byte_count)
    allowed = [
        MOST_OF_KERNEL * kernel + small for kernel, small in zip(seconds["kernel"], seconds["small"], strict=True)
    ]
    share = paired_ratio(seconds["in place"], allowed)
    bars = [Bar(f"{size}: of 1.5 kernels and a small call, in place", share, 1.0, is_least=False)]
    if byte_count == SPEEDUP_BYTES:
        for case in ("shared", "in place"):
            speedup = paired_ratio(seconds["wire"], seconds[case])
            bars.append(Bar(f"{size}: throughput of the wire, {case}", speedup, LEAST_SPEEDUP, unit="x"))
    return bars


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables or JSON. Return 0 whatever the bars say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=0, help="how often every case has its turn")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[size // MIB for size in SIZES])
    options = parser.parse_args(arguments)
    lossgrad.keep_large_blocks()
    threads = len(os.sched_getaffinity(0))
    worker = CpuWorker(threads)
    worker.warm_up()
    rows: list[tuple[str, ...]] = []
    report: list[dict[str, Any]] = []
    bars: list[Bar] = []
    with loss_server("127.0.0.1", "--allow-shared-memory", "--log-level", "error") as server:
        server.wait_until_ready()
        for byte_count in (size * MIB for size in options.megabytes):
            progress(size_name(byte_count))
            seconds = measure(server.target, byte_count, options.rounds or (3 if options.quick else 9), worker)
            medians = {case: statistics.median(seconds[case]) for case in CASES}
            rows.append((size_name(byte_count), *(f"{number(1e3 * medians[case])} ms" for case in CASES)))
            report.append({"bytes": byte_count, "seconds": medians})
            bars += bars_of(byte_count, seconds)
    worker.close()
    if options.json:
        print(json.dumps({"sizes": report, "bars": json.loads(to_json(bars))}))
    else:
        print(table(("each tensor", *CASES), rows), bars_table(bars), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
