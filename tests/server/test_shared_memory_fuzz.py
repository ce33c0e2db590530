"""Ten thousand hostile sequences against a server's shared memory end without a crash, a wrong read or a told secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lossgrad_server.shared_memory.segments import why_impossible

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_sequences_neither_crash_it_nor_learn_anything() -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.server.shared_memory_fuzz", "10000", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # -7 would be SIGBUS
    seen = json.loads(done.stdout)
    assert seen["sequences"] == 10_000
    # What must have happened for the above to mean anything.
    for what in ("UNKNOWN_REGION", "BAD_REGION", "SHARED_MEMORY_OFF", "REGIONS_FULL", "DATA_LENGTH_MISMATCH"):
        assert seen[f"refused {what}"] > 100
    for what in ("segment", "nothing", "cut", "gone", "unregister", "grow"):
        assert seen[f"right, {what}"] > 100
