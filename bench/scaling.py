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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

import lossgrad
from bench.measuring import KIB, MIB
from bench.transport_servers import ServerProcess

CALLERS: Final = 4
PACKED: Final = 512  # pairs to a stream
WARM_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Case:
    """A kind of request: float32 tensors of so many bytes each. Only unary calls ask for the gradient."""

    name: str
    tensor_bytes: int
    how: Literal["unary", "packed", "evaluate"] = "unary"

    @property
    def wire_bytes(self) -> int:
        """Return the bytes of tensors that a request moves: two there, and the gradient back."""
        return self.tensor_bytes * (3 if self.how == "unary" else 2)


CASES: Final = (
    Case("1 KiB, unary", KIB // 2),
    Case("1 KiB, packed", KIB // 2, "packed"),
    Case("64 KiB, unary", 32 * KIB),
    Case("1 MiB, unary", MIB // 2),
    Case("8 MiB, unary", 4 * MIB),
    Case("1 MiB, evaluate", MIB // 2, "evaluate"),
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


class Load:
    """Callers of one case, each in a thread; they count what is answered while `counting` is set."""

    def __init__(self, targets: Sequence[str], case: Case) -> None:
        self.counting = threading.Event()
        self._done = threading.Event()
        self._targets = targets
        self._case = case
        elements = case.tensor_bytes // 4
        self._pair = np.linspace(-2, 2, elements, dtype=np.float32), np.zeros(elements, np.float32)
        # An evaluation shares its batches over the servers by itself.
        self._answered = [0] * (1 if case.how == "evaluate" else CALLERS)
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(len(self._answered))]
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """Have the callers end; return how many requests were counted."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        return sum(self._answered)

    def _run(self, index: int) -> None:
        with lossgrad.LossClient("ipv4:" + ",".join(self._targets)) as client:
            if self._case.how == "evaluate":
                client.evaluate(self._batches(), lossgrad.SmoothL1(), endpoints=self._targets)
                return
            while not self._done.is_set():
                if self._case.how == "packed":
                    count = sum(1 for _ in client.stream([self._pair] * PACKED, lossgrad.SmoothL1()))
                else:
                    client.smooth_l1(*self._pair, gradient=True)
                    count = 1
                self._count(index, count)

    def _batches(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        while not self._done.is_set():
            yield self._pair
            self._count(0, 1)

    def _count(self, index: int, count: int) -> None:
        if self.counting.is_set():
            self._answered[index] += count


def measure(running: Sequence[ServerProcess], case: Case, seconds: float) -> Measured:
    """Load servers for some seconds."""
    load = Load([server.target for server in running], case)
    time.sleep(WARM_SECONDS)
    before = [server.cpu_seconds() for server in running]
    started = time.perf_counter()
    load.counting.set()
    time.sleep(seconds)
    load.counting.clear()
    took = time.perf_counter() - started
    used = [server.cpu_seconds() - earlier for server, earlier in zip(running, before, strict=True)]
    requests = load.stop()
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
