"""The engine's benchmarks run, over far too little to measure anything, and print JSON with what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.accuracy import DATA, EXTREMES, MOST_ULPS, spacing
from lossgrad_server.jobs import DataType

_ROOT = Path(__file__).resolve().parent.parent


def _run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_accuracy_holds_its_bars_in_every_data_type() -> None:
    report = _run("bench.accuracy", "--elements", "30000", "--json")
    assert len(report["errors"]) == sum(len(data.data_types) for data in DATA)
    assert len(report["extremes"]) == len(EXTREMES)
    for bar in report["bars"]:
        # How torch's errors fall is a matter of luck where there are so few elements; ours are small in any case.
        assert bar["is_met"] or "beside torch" in bar["name"], bar
    for row in report["errors"]:
        assert row["gradient_ours"] <= (1.0 if row["data_type"] == "float64" else 0.5001), row


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kernel_measures_what_the_issue_asks_for() -> None:
    report = _run("bench.kernel", "--quick", "--rounds", "1", "--json")
    assert [row["elements"] for row in report["sizes"]] == [1_000, 100_000]
    assert {"float16", "bfloat16", "float64", "none", "four losses"} <= {row["variant"] for row in report["variants"]}
    assert len(report["batches"]) == 3
    for rows in (report["sizes"], report["variants"], report["batches"]):
        for row in rows:
            assert all(value > 0 for value in row.values() if isinstance(value, float))
    assert any("1,000 elements, over torch eager" in bar["name"] for bar in report["bars"])


@pytest.mark.parametrize(
    ("data_type", "value", "ulp"),
    [
        (DataType.FLOAT32, 1.0, 2.0**-23),
        (DataType.FLOAT32, 1.5, 2.0**-23),
        (DataType.FLOAT32, 1e-45, 2.0**-149),
        (DataType.FLOAT16, 1e-7, 2.0**-24),
        (DataType.BFLOAT16, 300.0, 2.0),
        (DataType.FLOAT64, 0.0, 2.0**-1074),
    ],
)
def test_an_ulp_is_the_distance_to_the_next_number(data_type: DataType, value: float, ulp: float) -> None:
    assert float(spacing(value, data_type)) == ulp
    assert MOST_ULPS[data_type] in (1.0, 2.0)
