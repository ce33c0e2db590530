"""The Open Inference benchmark runs, far too shortly to measure anything, and asks both protocols for the same thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from bench import open_inference, transport_messages
from lossgrad_api.v1 import loss_service_pb2 as pb

_ROOT = Path(__file__).resolve().parent.parent
messages: Any = service_pb2  # it has no types


def test_every_way_is_measured_beside_its_native_one() -> None:
    command = [sys.executable, "-m", "bench.open_inference", "--json", "--sizes", "1KiB"]
    tiny = ["--rounds", "1", "--burst-seconds", "0.02"]
    done = subprocess.run([*command, *tiny], cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    ways = {row["way"]: row for row in report["rows"]}
    assert set(ways) == set(open_inference.PAIRS) | set(open_inference.PAIRS.values())
    assert all(row["calls_per_second"] > 0 and row["server_cpu_us"] >= 0 for row in ways.values())
    assert {way for way, row in ways.items() if row["ratio"] is not None} == set(open_inference.PAIRS)
    assert len(report["bars"]) == 2


def test_both_protocols_are_asked_for_the_loss_and_gradient_of_the_same_tensors() -> None:
    native = pb.ComputeLossRequest.FromString(transport_messages.request(1024))
    theirs = messages.ModelInferRequest.FromString(open_inference.infer_request(*transport_messages.tensors(1024)))
    assert list(theirs.raw_input_contents) == [native.input.data, native.target.data]
    assert [list(one.shape) for one in theirs.inputs] == [[1, 256]] * 2
    assert [one.name for one in theirs.outputs] == ["LOSS", "GRAD"]
    assert native.specs[0].include_gradient
    assert np.frombuffer(native.input.data, np.float32).shape == (256,)
