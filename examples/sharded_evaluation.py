"""One evaluation shared among four processes, with the bits of one: each saves its part, and the parts are merged.

So it is done with torch.distributed, Ray, Spark or an array of SLURM jobs, too: a rank, a file for its part, a merge.
Run it beside a server: `lossgrad-server &`, then `python examples/sharded_evaluation.py`.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lossgrad

RANKS = 4
ROWS, BATCH = 200_000, 4096
LOSSES = [lossgrad.SmoothL1(beta=0.5), lossgrad.MSE(), lossgrad.L1(reduction="sum")]


def write_data(folder: Path) -> None:
    """Write predictions and targets, as another job would."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(ROWS, 4)).astype(np.float32)
    np.save(folder / "target.npy", target)
    np.save(folder / "prediction.npy", (target + rng.laplace(size=target.shape)).astype(np.float32))


def batches(folder: Path, rank: int, ranks: int) -> Iterator[Any]:
    """Give every so many batch of the files, which are mapped and not read whole."""
    prediction, target = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("prediction", "target"))
    for start in range(rank * BATCH, ROWS, ranks * BATCH):
        rows = slice(start, start + BATCH)  # the last batch is shorter: nothing is padded, and nothing counted twice
        yield prediction[rows], target[rows]


def evaluate_part(folder: Path, rank: int) -> None:
    """Evaluate one process's part, and save it."""
    with lossgrad.LossClient() as client:
        report = client.evaluate(batches(folder, rank, RANKS), LOSSES)
    report.accumulation.save(folder / f"part-{rank}.lossgrad")


def main() -> None:
    """Evaluate in four processes and in one, and compare the bits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=evaluate_part, args=(folder, rank)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a process ended with {process.exitcode}")
        parts = [lossgrad.Accumulation.load(folder / f"part-{rank}.lossgrad") for rank in range(RANKS)]
        merged = lossgrad.Accumulation.merge(*reversed(parts))  # in any order
        with lossgrad.LossClient() as client:
            whole = client.evaluate(batches(folder, 0, 1), LOSSES).accumulation
    print(merged.report())
    for one, other in zip(merged.totals(), whole.totals(), strict=True):
        print(f"{one.loss!r}: {one.value.hex()} in {RANKS} processes, {other.value.hex()} in one")
    print("the same bits:", merged == whole)


if __name__ == "__main__":
    main()
