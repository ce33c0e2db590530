"""The CUDA kernels as machine code, without a GPU: Triton compiles for any. What the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossgrad_server.engine.cuda_builder import template_of
from lossgrad_server.engine.cuda_template import Kernel, Stage
from lossgrad_server.jobs import DataType
from tests.server.engine.test_cuda_layout import random_plan

# Not imported in this process: cuda_simulation.py has its say in how.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, dict[str, int]]:
    """Compile all kernels that are warmed up; return the interesting instructions of each, counted."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = Path(__file__).with_name("cuda_compiling.py")
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    kernels: dict[Kernel, dict[str, int]] = {}
    for one in report["kernels"]:
        stage, has_rows, is_selected, operand, output = one["kernel"]
        kernels[Kernel(Stage(stage), bool(has_rows), bool(is_selected), operand, output)] = one["instructions"]
    return kernels


def test_every_kernel_compiles_for_hopper_and_keeps_to_ieee_754(code: dict[Kernel, dict[str, int]]) -> None:
    # 5 pairs of types; plain, selected and by rows; weights whole and by rows; two folds.
    assert len(code) == 5 * 3 + 2 + 2
    for kernel, instructions in code.items():
        wrong = [name for name in instructions if "fma" in name or "mad" in name or "ftz" in name or "approx" in name]
        assert wrong == [], kernel
        # Division is rounded to nearest; the only atomics add integers.
        assert {name for name in instructions if name.startswith("div")} <= {"div.rn.f64"}, kernel
        assert {name for name in instructions if name.startswith("atom")} <= {"atom.global.gpu.relaxed.add.u64"}, kernel


@pytest.mark.parametrize("data_type", [DataType.FLOAT16, DataType.BFLOAT16, DataType.FLOAT32, DataType.FLOAT64])
def test_the_common_case_loads_and_stores_sixteen_bytes_at_a_time(
    code: dict[Kernel, dict[str, int]], data_type: DataType
) -> None:
    instructions = code[Kernel(Stage.LOSSES, operand=data_type, output=data_type)]
    wide = "v2.b64" if data_type == DataType.FLOAT64 else "v4.b32"
    # A thread has 8 of a block's 1024 elements: of input and target, and of loss and gradient.
    vectors = 2 * 8 * data_type.itemsize // 16
    assert instructions[f"ld.global.{wide}"] == vectors
    assert instructions[f"st.global.{wide}"] == vectors
    # What else is loaded are the records' int64 fields, and what else is stored one partial sum.
    assert {name for name in instructions if name.startswith("ld.global")} == {f"ld.global.{wide}", "ld.global.b64"}
    assert instructions["st.global.b64"] == 1


def test_no_job_needs_a_kernel_that_was_not_warmed_up(code: dict[Kernel, dict[str, int]]) -> None:
    random = np.random.default_rng(70)
    for _ in range(500):
        programs = template_of(random_plan(random).header).programs
        assert {Kernel.of_code(number) for number in programs[:, 0].tolist()} <= code.keys()
