"""How far servers go: requests and bytes a second, and what they cost a server's cores, for one server and for several.

    python -m bench.scaling [--servers 1 2] [--seconds 3] [--json]

Servers with one computing thread each, in processes of their own, and callers that wait for each answer, in threads of one
process, over `ipv4:` addresses with client-side balancing. Callers and servers share this machine's cores, so on few cores
the rate does not grow with the servers. What does carry over to servers on machines of their own is what a request takes of
a server's processor time, whether that stays the same with several, and how evenly calls spread over them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

import lossgrad
from bench.measuring import KIB, MIB
from bench.transport_servers import ServerProcess

CALLERS: Final = 4
PACKED: Final = 512  # pairs to a stream
WARM_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Case:
    """A kind of request: float32 tensors of so many bytes each, with the gradient in the answer, or packed without."""

    name: str
    tensor_bytes: int
    packed: bool = False

    @property
    def wire_bytes(self) -> int:
        """Return the bytes of tensors that a request moves: two there, and the gradient back."""
        return self.tensor_bytes * (2 if self.packed else 3)


CASES: Final = (
    Case("1 KiB, unary", KIB // 2),
    Case("1 KiB, packed", KIB // 2, packed=True),
    Case("64 KiB, unary", 32 * KIB),
    Case("1 MiB, unary", MIB // 2),
    Case("8 MiB, unary", 4 * MIB),
)


@dataclass(frozen=True)
class Measured:
    """What servers did with one case. `least_share` is the least server's processor time, to the mean of all servers'."""

    case: str
    servers: int
    requests_per_second: float
    bytes_per_second: float
    server_seconds_per_request: float
    least_share: float


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[ServerProcess]]:
    """Give running servers."""
    with contextlib.ExitStack() as stack:
        flags = ("--port", "0", "--metrics-port", "-1", "--device", "cpu", "--threads", "1", "--log-level", "error")
        started = [stack.enter_context(ServerProcess("lossgrad_server", *flags)) for _ in range(count)]
        for server in started:
            server.wait_until_ready()
        yield started


def caller(client: lossgrad.LossClient, case: Case) -> Callable[[], int]:
    """Return what makes calls of a case, and returns how many requests were answered."""
    elements = case.tensor_bytes // 4
    input, target = np.linspace(-2, 2, elements, dtype=np.float32), np.zeros(elements, np.float32)

    def one() -> int:
        client.smooth_l1(input, target, gradient=True)
        return 1

    def many() -> int:
        return sum(1 for _ in client.stream([(input, target)] * PACKED, lossgrad.SmoothL1()))

    return many if case.packed else one


def measure(running: Sequence[ServerProcess], case: Case, seconds: float) -> Measured:
    """Load servers for some seconds."""
    target = "ipv4:" + ",".join(server.target for server in running)
    begin, done = threading.Event(), threading.Event()
    answered = [0] * CALLERS

    def run(index: int) -> None:
        with lossgrad.LossClient(target) as client:
            call = caller(client, case)
            while not done.is_set():
                count = call()
                if begin.is_set():
                    answered[index] += count

    threads = [threading.Thread(target=run, args=(index,)) for index in range(CALLERS)]
    for thread in threads:
        thread.start()
    time.sleep(WARM_SECONDS)
    before = [server.cpu_seconds() for server in running]
    started = time.perf_counter()
    begin.set()
    time.sleep(seconds)
    begin.clear()
    took = time.perf_counter() - started
    used = [server.cpu_seconds() - earlier for server, earlier in zip(running, before, strict=True)]
    done.set()
    for thread in threads:
        thread.join()
    requests = sum(answered)
    return Measured(
        case.name,
        len(running),
        requests / took,
        requests * case.wire_bytes / took,
        sum(used) / max(1, requests),
        min(used) / max(sum(used), 1e-9) * len(used),
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2], help="how many servers, each in turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each case is measured")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: list[Measured] = []
    for count in arguments.servers:
        with servers(count) as running:
            results += [measure(running, case, arguments.seconds) for case in CASES]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
        return
    print("| request | servers | requests/s | MB/s | server time, us | requests/s of a core | least share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for result in sorted(results, key=lambda each: [case.name for case in CASES].index(each.case)):
        cost = result.server_seconds_per_request
        print(
            f"| {result.case} | {result.servers} | {result.requests_per_second:,.0f} | {result.bytes_per_second / 1e6:,.0f} "
            f"| {cost * 1e6:,.0f} | {1 / max(cost, 1e-9):,.0f} | {result.least_share:.0%} |"
        )


if __name__ == "__main__":
    main()
