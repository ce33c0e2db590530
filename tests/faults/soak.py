"""The soak (R35): calls of every kind for half an hour while servers are frozen, killed and drained; nothing may be lost.

Run as `python -m tests.faults.soak [SECONDS] [SEED]`, or `make soak`. Two servers stand behind one client-side
balancer. Every answer is compared with torch. It ends with 1 if an answer is wrong, a call fails, or what a server takes
grows.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import threading
import time

import numpy as np
import torch

import lossgrad
from tests.faults.http2 import Peer, headers_of
from tests.faults.resources import MIB, descriptors, resident_bytes, threads
from tests.prometheus import free_port
from tests.server.program import Program

CALLERS = 3
# Against torch in float64: what float32 differences summed in float64 may be off by.
TOLERANCE = 1e-5


class Soak:
    """Two servers, their callers, and what happens to them."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._end = time.monotonic() + seconds
        self._chance = random.Random(seed)
        self._seed = seed
        self._ports = [free_port(), free_port()]
        self._servers = [self._start(port) for port in self._ports]
        self._addresses = [server.address() for server in self._servers]
        self.answers = 0
        self.problems: list[str] = []

    def _start(self, port: int) -> Program:
        flags = ("--metrics-port=-1", "--threads=1", "--drain-delay-seconds=0.5", "--transfer-timeout-seconds=5")
        return Program(f"--port={port}", *flags)

    def _call(self, number: int) -> None:
        chance = np.random.default_rng([self._seed, number])
        with lossgrad.LossClient("ipv4:" + ",".join(self._addresses), retries=4) as client:
            while time.monotonic() < self._end:
                size = int(chance.choice([1, 7, 256, 5000, 300_000]))
                beta = float(chance.choice([0.0, 0.5, 1.0]))
                input, target = chance.standard_normal((2, size), np.float32)
                leaf = torch.from_numpy(input).double().requires_grad_()
                loss = torch.nn.functional.smooth_l1_loss(leaf, torch.from_numpy(target).double(), beta=beta)
                loss.backward()  # type: ignore[no-untyped-call]
                wanted = loss.item()
                assert leaf.grad is not None
                try:
                    if chance.random() < 0.5:
                        result = client.smooth_l1(input, target, beta=beta, gradient=True)
                        got = [result.value]
                        off = np.abs(result.gradient - leaf.grad.numpy()).max() * size
                        if not off <= TOLERANCE:
                            self.problems.append(f"{size} elements, beta {beta}: a gradient is off by {off}")
                    else:
                        pairs = [(input, target)] * int(chance.integers(1, 8))
                        got = [one.value for one in client.stream(pairs, lossgrad.SmoothL1(beta=beta))]
                        if len(got) != len(pairs):
                            self.problems.append(f"{len(pairs)} requests got {len(got)} answers")
                except Exception as error:
                    self.problems.append(f"{type(error).__name__}: {error}")
                    continue
                for value in got:
                    if value is None or abs(value - wanted) > TOLERANCE * max(1.0, wanted):
                        self.problems.append(f"{size} elements, beta {beta}: {value!r} for {wanted!r}")
                self.answers += len(got)

    def _freeze(self, index: int) -> None:
        self._servers[index].signal(signal.SIGSTOP)
        time.sleep(self._chance.uniform(0.1, 1.5))
        self._servers[index].signal(signal.SIGCONT)

    def _restart(self, index: int, number: signal.Signals) -> None:
        self._servers[index].signal(number)
        code = self._servers[index].end()
        if number is signal.SIGTERM and code != 0:
            self.problems.append(f"a drained server ended with {code}")
        self._servers[index].close()
        self._servers[index] = self._start(self._ports[index])
        self._servers[index].address()

    def _flood(self, index: int) -> None:
        with Peer(self._addresses[index]) as peer:
            for _ in range(100):
                peer.reset(peer.open(headers_of()))

    def _do_something(self) -> None:
        # Faults come to the second server. The first lives through it all: what it takes must not grow.
        fault = self._chance.choice(("freeze", "kill", "drain", "flood", "flood"))
        if fault == "flood":
            self._flood(self._chance.randrange(2))
        elif fault == "freeze":
            self._freeze(self._chance.randrange(2))
        else:
            self._restart(1, signal.SIGKILL if fault == "kill" else signal.SIGTERM)

    def run(self) -> int:
        """Do it; return the exit status."""
        callers = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]
        for caller in callers:
            caller.start()
        pid = self._servers[0].process.pid
        samples: list[tuple[float, int, int, int]] = []
        begun = time.monotonic()
        while time.monotonic() < self._end:
            try:
                self._do_something()
            except OSError as error:  # a peer that was cut off
                print(f"cut off: {error}")
            time.sleep(self._chance.uniform(1, 4))
            samples.append((time.monotonic() - begun, resident_bytes(pid), descriptors(pid), threads(pid)))
        for caller in callers:
            caller.join()
        samples.append((time.monotonic() - begun, resident_bytes(pid), descriptors(pid), threads(pid)))
        for server in self._servers:
            server.close()
        warm = samples[len(samples) // 3 :]
        last = warm[-1]
        # The allocator gives memory back when it likes: the median of the last third against that of the one before.
        halves = warm[: len(warm) // 2] or warm, warm[len(warm) // 2 :]
        (early, early_bytes), (late, late_bytes) = (
            (statistics.median(one[0] for one in half), statistics.median(one[1] for one in half)) for half in halves
        )
        slope = (late_bytes - early_bytes) / MIB / max(1.0, (late - early) / 60)
        print(
            f"seed {self._seed}: {self.answers} answers, {len(self.problems)} problems, {len(samples)} faults; memory "
            f"{last[1] / MIB:.0f} MiB, {slope:+.2f} MiB a minute; descriptors {warm[0][2]} to {last[2]}; threads "
            f"{warm[0][3]} to {last[3]}"
        )
        for problem in self.problems[:20]:
            print(problem)
        is_long = last[0] > 600  # a slope of less says nothing
        is_flat = (slope < 1 or not is_long) and last[2] <= warm[0][2] + 20 and last[3] <= warm[0][3] + 4
        return 0 if is_flat and not self.problems and self.answers else 1


if __name__ == "__main__":
    arguments = [float(argument) for argument in sys.argv[1:]]
    sys.exit(Soak(arguments[0] if arguments else 1800, int(arguments[1]) if len(arguments) > 1 else 35).run())
