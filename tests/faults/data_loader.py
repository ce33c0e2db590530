"""A DataLoader whose workers, forked from a process that has called a server, call it too (R33).

Run as `python -m tests.faults.data_loader TARGET`; it writes how many samples came, and how many were wrong.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import lossgrad

SAMPLES = 100


class Differences(Dataset[tuple[int, float, float]]):
    """Samples whose losses a server computes, in whichever process reads them; every tenth by a stream."""

    def __init__(self, client: lossgrad.LossClient) -> None:
        self._client = client

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, float, float]:
        chance = np.random.default_rng(index)
        input, target = chance.standard_normal((2, 1 + index * 14), np.float32)
        wanted = torch.nn.functional.smooth_l1_loss(
            torch.from_numpy(input).double(), torch.from_numpy(target).double(), beta=0.5
        ).item()
        if index % 10:
            got = self._client.smooth_l1(input, target, beta=0.5).value
        else:
            (one,) = self._client.stream([(input, target)], lossgrad.SmoothL1(beta=0.5))
            got = one.value
        assert got is not None
        return index, got, wanted


def main(target: str) -> None:
    """Read all samples twice, with the workers of each pass forked anew, while this process calls too."""
    seen: list[int] = []
    wrong = 0
    with lossgrad.LossClient(target) as client:
        x = np.ones(3, np.float32)
        assert client.l1(x, x * 3).value == 2.0  # connected, with gRPC's threads at work, before the first fork
        loader = DataLoader(Differences(client), batch_size=8, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            for indices, got, wanted in loader:
                seen += indices.tolist()
                wrong += int((abs(got - wanted) > 1e-5 * (1 + abs(wanted))).sum())
                assert client.l1(x, x * 3).value == 2.0
    assert sorted(seen) == sorted([*range(SAMPLES)] * 2)
    print(f"{len(seen)} samples, {wrong} wrong")


if __name__ == "__main__":
    main(sys.argv[1])
