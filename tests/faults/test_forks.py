"""Processes that fork while they call (R33)."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.server.program import ROOT
from tests.server.serving import RunningServer


def test_r33_the_forked_workers_of_a_data_loader_are_served_and_none_hangs(server: RunningServer) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.data_loader", server.address],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
    )
    print(f"\nDataLoader with two workers, twice: {done.stdout.strip()} in {time.monotonic() - began:.1f} s")
    assert (done.returncode, done.stdout) == (0, "200 samples, 0 wrong\n"), done.stderr
