"""A whole data set through `lossgrad evaluate`: memory, exactness, and the same bits whatever happens on the way.

    python -m bench.dataset [--elements 100000000] [--seed 6] [--json]

Writes random predictions and targets to memory-mapped files, starts a server, and evaluates them with three losses: with
one, two and four workers, as shards in another order, and with client and server killed at random points, going on from a
checkpoint. The numbers are held against sums in extended precision (numpy.longdouble). The bars are issue 6's. Takes 28
bytes of disk an element (8 for the files, 8 for each of two sets of shards, 4 for float64), in the folder for temporary
files.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from bench.measuring import Bar, bars_table, machine, progress, table, to_json
from examples.demo.server_process import ServerProcess
from lossgrad.files.dataset import SLICE_ELEMENTS
from lossgrad.state_file import read_state

LOSSES: Final = ("smooth_l1:beta=0.5", "huber:delta=2", "mse")
SHARDS: Final = 7
# Where the kills come: after these parts of the slices, at random between each two. Server, client, then both.
_KILLED_IN: Final = ((0.1, 0.25), (0.35, 0.5), (0.6, 0.75))
_CHUNK: Final = 4096  # shards that are cut at multiples of it have the bits of the whole
_BLOCK: Final = 1 << 20  # elements that are made, or summed, at a time
_MEMORY_BAR_MB: Final = 400


@dataclass(slots=True)
class Run:
    """One evaluation: what it was, its seconds, its largest process's peak of resident memory, and its exact losses."""

    name: str
    seconds: float
    peak_mb: float
    losses: list[dict[str, Any]]
    resumed_slices: int = 0


@dataclass(slots=True)
class Report:
    """What a run found."""

    benchmark: str = "dataset"
    machine: dict[str, Any] = field(default_factory=dict)
    elements: int = 0
    runs: list[Run] = field(default_factory=list)
    server_peak_mb: float = 0.0
    bars: list[Bar] = field(default_factory=list)


class Watched:
    """A process and its children, whose peak of resident memory is read while they run."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.peak_mb = 0.0
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak_mb = max([self.peak_mb, *(peak_mb(one) for one in family(self._process.pid))])


def family(pid: int) -> Iterator[int]:
    """Yield a process's id and those of its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return
    for child in children.split():
        yield from family(int(child))


def peak_mb(pid: int) -> float:
    """Return a process's VmHWM in units of 10^6 bytes; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


class Server:
    """A server on one port, which can be killed and comes back there."""

    def __init__(self) -> None:
        self._process = ServerProcess().__enter__()
        self.target = self._process.target
        self.peak_mb = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.look()
        self._process.stop()

    def look(self) -> float:
        """Return the peak of its resident memory so far."""
        self.peak_mb = max(self.peak_mb, peak_mb(self._process.process_id))
        return self.peak_mb

    def kill(self) -> None:
        """End it at once, and start another in its place."""
        self.look()
        self._process.kill()
        self._process = ServerProcess(["--port", self.target.rpartition(":")[2]]).__enter__()


class Evaluations:
    """Runs `lossgrad evaluate` on files, as its users do."""

    def __init__(self, target: str) -> None:
        self._command = [sys.executable, "-m", "lossgrad.cli", "evaluate", "--target", target, "--json"]
        self._losses = [text for loss in LOSSES for text in ("--loss", loss)]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one."""
        command = [*self._command, *arguments, *self._losses]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, name: str, *arguments: str) -> Run:
        """Run one to its end."""
        began = time.perf_counter()
        process = self.start(*arguments)
        with Watched(process) as watched:
            out, err = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"lossgrad evaluate ended with {process.returncode}: {err}")
        report = json.loads(out)
        seconds = time.perf_counter() - began
        return Run(name, seconds, watched.peak_mb, report["losses"], report["resumed_batch_count"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.dataset", description=__doc__)
    parser.add_argument(
        "--elements", type=int, default=100_000_000, help="float32 pairs; a quarter of it float64 pairs"
    )
    parser.add_argument("--seed", type=int, default=6, help="of the data and of when the processes are killed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    report = Report(machine=machine(), elements=given.elements)
    with tempfile.TemporaryDirectory(prefix="lossgrad-dataset-") as name, Server() as server:
        measure(report, Path(name), server, given.elements, random.Random(given.seed))
    print(to_json(report) if given.json else text_of(report))
    return 0


def measure(report: Report, folder: Path, server: Server, count: int, chance: random.Random) -> None:
    """Evaluate the data in all ways; fill the report."""
    progress("writing the data")
    single = write(folder / "single", count, np.float32, chance.getrandbits(32))
    evaluations = Evaluations(server.target)
    progress("one worker")
    first = evaluations.run("1 worker", *single)
    report.runs.append(first)
    for workers in (2, 4):
        progress(f"{workers} workers")
        report.runs.append(evaluations.run(f"{workers} workers", *single, "--workers", str(workers)))
    for workers in (1, 2):
        progress(f"shards, {workers} workers")
        shards = shuffled(folder, single, chance)
        report.runs.append(
            evaluations.run(f"{SHARDS} shards, shuffled, {workers} workers", *shards, "--workers", str(workers))
        )
    report.server_peak_mb = server.look()
    progress("kills")
    report.runs.append(killed(evaluations, server, folder, single, chance))
    progress("float64")
    double = write(folder / "double", count // 4, np.float64, chance.getrandbits(32))
    exact = evaluations.run("float64", *double)
    report.runs.append(exact)
    progress("sums in extended precision")
    report.bars = [
        Bar(
            "client: peak resident memory of a process",
            max(run.peak_mb for run in report.runs),
            _MEMORY_BAR_MB,
            is_least=False,
            unit=" MB",
        ),
        Bar("server: peak resident memory", report.server_peak_mb, _MEMORY_BAR_MB, is_least=False, unit=" MB"),
        Bar("float32: largest relative error of a sum", error_of(first, single), 1e-7, is_least=False),
        Bar("float64: largest relative error of a sum", error_of(exact, double), 1e-15, is_least=False),
        *(
            Bar(f"{run.name}: the bits of one worker", float(run.losses == first.losses), 1.0)
            for run in report.runs[1:-1]
        ),
    ]


def write(folder: Path, count: int, dtype: type[np.floating[Any]], seed: int) -> tuple[str, str]:
    """Write predictions and targets of `count` elements, a block at a time; return their paths."""
    folder.mkdir()
    random_of = np.random.default_rng(seed)
    paths = str(folder / "predictions.npy"), str(folder / "targets.npy")
    predictions, targets = (np.lib.format.open_memmap(path, "w+", dtype, (count,)) for path in paths)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        targets[start : start + size] = random_of.normal(3.0, 2.0, size)
        predictions[start : start + size] = targets[start : start + size] + random_of.normal(0.1, 1.0, size)
    return paths


def shuffled(folder: Path, paths: tuple[str, str], chance: random.Random) -> tuple[str, str]:
    """Cut files at multiples of 4096 elements, name the shards in another order, and return the two folders."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="shards-"))
    names = chance.sample([f"{number:02}.npy" for number in range(SHARDS)], SHARDS)
    for path, kind in zip(paths, ("predictions", "targets"), strict=True):
        (place / kind).mkdir()
        data = np.load(path, mmap_mode="r")
        chunks = -(-len(data) // _CHUNK)
        cuts = [chunks * number // SHARDS * _CHUNK for number in range(SHARDS)] + [len(data)]
        for name, start, stop in zip(names, cuts[:-1], cuts[1:], strict=True):
            np.save(place / kind / name, data[start:stop])
    return str(place / "predictions"), str(place / "targets")


def killed(
    evaluations: Evaluations, server: Server, folder: Path, paths: tuple[str, str], chance: random.Random
) -> Run:
    """Evaluate with three kills at random points, and go on each time with another number of workers."""
    checkpoint = folder / "checkpoint"
    arguments = (*paths, "--checkpoint", str(checkpoint), "--checkpoint-every", "0", "--patience", "60")
    slices = -(-np.load(paths[0], mmap_mode="r").size // SLICE_ELEMENTS)
    began = time.perf_counter()
    at = [round(slices * chance.uniform(*range_)) for range_ in _KILLED_IN]
    kept: list[int] = []

    def wait_for(done: int) -> None:
        while done_slices(checkpoint) < done:
            if process.poll() is not None:
                raise RuntimeError(f"the evaluation ended before it was killed: {process.communicate()}")
            time.sleep(0.005)

    process = evaluations.start(*arguments)
    with Watched(process) as first:
        wait_for(at[0])
        kept.append(done_slices(checkpoint))
        server.kill()  # the client waits for another, and goes on
        wait_for(at[1])
        process.kill()
        process.communicate()
    kept.append(done_slices(checkpoint))
    process = evaluations.start(*arguments, "--workers", "2")
    with Watched(process) as second:
        wait_for(at[2])
        process.kill()
        server.kill()
        process.communicate()
    kept.append(done_slices(checkpoint))
    last = evaluations.run(f"killed after {kept} of {slices} slices", *arguments, "--workers", "4")
    if last.resumed_slices != kept[-1]:
        raise RuntimeError(f"it went on from {last.resumed_slices} slices, and {kept[-1]} were done")
    last.seconds = time.perf_counter() - began
    last.peak_mb = max(first.peak_mb, second.peak_mb, last.peak_mb)
    return last


def done_slices(checkpoint: Path) -> int:
    """Return how many slices a checkpoint holds."""
    try:
        content = read_state(checkpoint, "lossgrad.checkpoint")
    except FileNotFoundError:
        return 0
    return sum(stop - start for start, stop in content["done"])


def error_of(run: Run, paths: tuple[str, str]) -> float:
    """Return the largest relative error of a run's sums, to those in extended precision of the same float values."""
    predictions, targets = (np.load(path, mmap_mode="r") for path in paths)
    sums = [np.longdouble(0)] * len(LOSSES)
    for start in range(0, len(predictions), _BLOCK):
        x, y = (np.asarray(each[start : start + _BLOCK], np.longdouble) for each in (predictions, targets))
        distance = np.abs(x - y)
        losses = (
            np.where(distance < 0.5, distance * distance, distance - np.longdouble(0.25)),  # smooth L1, beta 0.5
            np.where(distance <= 2, distance * distance / 2, 2 * (distance - 1)),  # Huber, delta 2
            distance * distance,
        )
        sums = [total + loss.sum() for total, loss in zip(sums, losses, strict=True)]
    return max(float(abs(np.longdouble(got["sum"]) - want) / want) for got, want in zip(run.losses, sums, strict=True))


def text_of(report: Report) -> str:
    """Return the report as text."""
    rows = [(run.name, f"{run.seconds:.1f}", f"{run.peak_mb:.0f}") for run in report.runs]
    head = f"{report.elements:,} pairs, losses {', '.join(LOSSES)}"
    return "\n\n".join((head, table(("run", "seconds", "client's peak, MB"), rows), bars_table(report.bars)))


if __name__ == "__main__":
    sys.exit(main())
