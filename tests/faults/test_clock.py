"""A wall clock that is set while the server runs (R16)."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import lossgrad
from tests.faults.programs import PacedProgram, serving
from tests.prometheus import fetch, free_port
from tests.server.serving import eventually

X, Y = np.full(64, 3, np.float32), np.ones(64, np.float32)
HOUR_SECONDS = 3600
DEVICE_SECONDS = 0.6


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the clock that can be set."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def late_calls(port: int) -> float:
    """Return how many calls the server has seen end at their deadline."""
    lines = fetch(f"http://127.0.0.1:{port}/metrics").splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("grpc_server_handled_total") and 'grpc_code="DEADLINE_EXCEEDED"' in line
    )


def test_r16_a_clock_that_is_set_by_an_hour_changes_no_deadline(shim: Path, tmp_path: Path) -> None:
    setting = tmp_path / "offset"
    setting.write_bytes(struct.pack("q", 0))
    port = free_port()
    # The device takes longer than the short deadline and less than the long one.
    flags = ("--port=0", f"--metrics-port={port}", "--log-format=json", "--drain-delay-seconds=0")
    program = PacedProgram(DEVICE_SECONDS * 1e3, *flags, LD_PRELOAD=str(shim), CLOCK_OFFSET=str(setting))
    figures = []
    with serving(program) as (_, address), lossgrad.LossClient(address, retries=0) as client:
        client.l1(X, Y)
        for hours in (0, 1, -1):
            with setting.open("r+b") as file:
                file.write(struct.pack("q", hours * HOUR_SECONDS))
            before = late_calls(port)
            began = time.monotonic()
            assert client.l1(X, Y, timeout=10).value == 2.0
            answered = time.monotonic() - began
            time.sleep(1.1)  # the pace is stale, so that the short one too is tried
            began = time.monotonic()
            with pytest.raises(lossgrad.DeadlineExceeded):
                client.l1(X, Y, timeout=0.3)
            late = time.monotonic() - began - 0.3
            eventually(lambda before=before: late_calls(port) > before)  # type: ignore[misc]
            seen = time.monotonic() - began - 0.3
            figures.append((hours, answered, late, seen))
        program.signal(signal.SIGTERM)
        assert program.end() == 0
    (said,) = (json.loads(line)["time"] for line in program.logged if '"Draining' in line)
    shown = (datetime.now(UTC) - datetime.fromisoformat(said)).total_seconds()
    for hours, answered, late, seen in figures:
        print(
            f"\nclock set by {hours:+d} h: a call of {DEVICE_SECONDS} s answered in {answered:.2f} s, one of 0.3 s failed "
            f"{late * 1e3:.0f} ms late, the server let go of it {seen * 1e3:.0f} ms late"
        )
        assert answered < DEVICE_SECONDS + 1
        assert abs(late) < 0.2
        assert seen < 1
    assert HOUR_SECONDS - 60 < shown < HOUR_SECONDS + 60  # the server did see another time
