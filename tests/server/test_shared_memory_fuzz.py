"""Hostile sequences against a server's shared memory end without a crash, a wrong read or a told secret.

A few hundred in every run of the tests, ten thousand in `make test-faults`, which prints what happened in them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lossgrad_server.shared_memory.segments import why_impossible

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sequences", "seed"),
    [pytest.param(400, 2, id="a few hundred"), pytest.param(10_000, 1, id="ten thousand", marks=pytest.mark.faults)],
)
def test_hostile_sequences_neither_crash_it_nor_learn_anything(sequences: int, seed: int) -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.server.shared_memory_fuzz", str(sequences), str(seed)]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"  # -7 would be SIGBUS
    seen = json.loads(done.stdout)
    print(f"\n{sequences} hostile sequences, seed {seed}, {seconds:.0f} s: {json.dumps(seen, sort_keys=True)}")  # noqa: T201
    assert seen["sequences"] == sequences
    # What must have happened for the above to mean anything.
    least = sequences // 100
    for what in ("UNKNOWN_REGION", "BAD_REGION", "SHARED_MEMORY_OFF", "REGIONS_FULL", "DATA_LENGTH_MISMATCH"):
        assert seen[f"refused {what}"] > least
    for what in ("segment", "nothing", "cut", "gone", "unregister", "grow"):
        assert seen[f"right, {what}"] > least
