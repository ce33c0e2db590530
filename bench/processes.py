"""What `--processes N` gives: the same callers at a server of one process and at one of several, in turns.

    python -m bench.processes [--processes 2] [--callers 6] [--seconds 1.5] [--rounds 3] [--json]

Both servers have the same `--threads`, which the second divides. Callers are processes of their own, one connection each,
which the kernel gives to one of a server's processes; they wait for each answer. A ratio is taken within a round, and the
median over the rounds is shown. Callers and servers share this machine's cores: where callers need as many as servers do,
the cores that are left decide what can be gained, and on two there are none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

import lossgrad
from bench.measuring import KIB, MIB, interleave, machine, paired_ratio, to_json
from bench.transport_servers import ChildProcess, ServerProcess

PACKED: Final = 512  # pairs to a stream
WARM_SECONDS: Final = 0.3
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PATIENCE_SECONDS: Final = 60.0

# The bytes of each of two float32 tensors, whether a client's calls share its kept stream, and whether a stream packs them.
# Calls that are not packed ask for the gradient.
CASES: Final = {
    "1 KiB, calls": (KIB // 2, True, False),
    "1 KiB, unary": (KIB // 2, False, False),
    "1 KiB, packed": (KIB // 2, True, True),
    "1 MiB, unary": (MIB // 2, False, False),
}


@dataclass(frozen=True)
class Measured:
    """One case with one server."""

    requests_per_second: float
    server_seconds_per_request: float


class Server(ServerProcess):
    """A server whose processor time is that of all its processes."""

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have taken, the parent's included."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return super().cpu_seconds() + sum(_cpu_seconds(int(child)) for child in children)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def call() -> None:
    """Be a caller: take lines "target, case, seconds" and answer each with how many requests were answered."""
    for line in sys.stdin:
        target, case, seconds = line.rstrip("\n").split("\t")
        # A connection for each: which process it comes to is chance, and that is part of what is measured.
        with lossgrad.LossClient(target, coalesce=CASES[case][1]) as client:
            _call_for(client, case, WARM_SECONDS)
            count = _call_for(client, case, float(seconds))
        print(count, flush=True)


def _call_for(client: lossgrad.LossClient, case: str, seconds: float) -> int:
    byte_count, _, is_packed = CASES[case]
    pair = np.linspace(-2, 2, byte_count // 4, dtype=np.float32), np.zeros(byte_count // 4, np.float32)
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        if is_packed:
            count += sum(1 for _ in client.stream([pair] * PACKED, lossgrad.SmoothL1()))
        else:
            client.smooth_l1(*pair, gradient=True)
            count += 1
    return count


def measure(server: Server, callers: list[ChildProcess], case: str, seconds: float) -> Measured:
    """Have the callers call for some seconds."""
    before = server.cpu_seconds()
    for caller in callers:
        caller.tell(f"{server.target}\t{case}\t{seconds}")
    counts = [int(caller.read_line(_PATIENCE_SECONDS)) for caller in callers]
    share = seconds / (seconds + WARM_SECONDS)  # of what the servers did, the warm-up left out
    used = (server.cpu_seconds() - before) * share
    return Measured(sum(counts) / seconds, used / max(1, sum(counts)))


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of each server, all its processes together")
    parser.add_argument("--callers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each case is measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        call()
        return
    flags = ("--port=0", "--metrics-port=-1", "--device=cpu", f"--threads={arguments.threads}", "--log-level=error")
    names = ("one", "several")
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(Server("lossgrad_server", *flags))
        several = stack.enter_context(Server("lossgrad_server", *flags, f"--processes={arguments.processes}"))
        servers = dict(zip(names, (one, several), strict=True))
        for server in servers.values():
            server.wait_until_ready()
        callers = [stack.enter_context(ChildProcess("bench.processes", "--call")) for _ in range(arguments.callers)]
        results = interleave(
            {
                (case, name): partial(measure, server, callers, case, arguments.seconds)
                for case in CASES
                for name, server in servers.items()
            },
            arguments.rounds,
        )
    if arguments.json:
        cases = [{"case": case, "server": name, "rounds": seen} for (case, name), seen in results.items()]
        print(to_json({"machine": machine(), "processes": arguments.processes, "cases": cases}))
        return
    print(f"| request | one process, requests/s | {arguments.processes} to one | by round | server time, to one |")
    print("| --- | ---: | ---: | --- | ---: |")
    for case in CASES:
        alone, together = (results[case, name] for name in names)
        rates = [[each.requests_per_second for each in seen] for seen in (together, alone)]
        costs = [[each.server_seconds_per_request for each in seen] for seen in (together, alone)]
        by_round = ", ".join(f"{above / below:.2f}" for above, below in zip(*rates, strict=True))
        print(
            f"| {case} | {statistics.median(rates[1]):,.0f} | {paired_ratio(*rates):.2f} | {by_round} "
            f"| {paired_ratio(*costs):.2f} |"
        )


if __name__ == "__main__":
    main()
