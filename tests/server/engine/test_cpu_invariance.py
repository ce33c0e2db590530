"""The CPU engine's promise: an item's bits depend on it alone; not on company, addresses, threads or pieces."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import DataType, LossKind, Reduction, SpecPlan
from lossgrad_server.work import WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, job, result_bytes, spec, with_totals

# Lengths around where the engine changes what it does: rows of lanes, blocks, chunks.
LENGTHS = [0, 1, 2, 3, 63, 64, 65, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097, 9001]
SPECIALS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 65504.0, 1e30]


@pytest.fixture(scope="module")
def workers() -> Iterator[list[CpuWorker]]:
    """Workers that differ in threads and in the size of a piece; to the first, nothing in these tests is large."""
    several = [CpuWorker(1), CpuWorker(1, piece_work=1), CpuWorker(2, piece_work=4096), CpuWorker(3, piece_work=8192)]
    for worker in several:
        worker.warm_up()
    yield several
    for worker in several:
        worker.close()


def shapes() -> st.SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return shapes of input and target: mostly equal, otherwise one broadcast to the other or both to a third."""
    flat = st.sampled_from(LENGTHS).map(lambda n: ((n,), (n,)))
    pairs = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4, 63, 64, 65, 600, 4097]))
    matrices = pairs.map(lambda s: (s, s))
    broadcast = st.tuples(pairs, st.sampled_from(["row", "column", "scalar", "vector", "outer", "input"])).map(
        _broadcast
    )
    cubes = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70)).flatmap(
        lambda s: st.tuples(*[st.sampled_from([extent, 1]) for extent in s]).map(lambda t: (s, t))
    )
    return st.one_of(flat, matrices, broadcast, cubes)


def _broadcast(drawn: tuple[tuple[int, int], str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (rows, columns), how = drawn
    return {
        "row": ((rows, columns), (1, columns)),
        "column": ((rows, columns), (rows, 1)),
        "scalar": ((rows, columns), ()),
        "vector": ((rows, columns), (columns,)),
        "outer": ((rows, 1), (1, columns)),
        "input": ((columns,), (rows, columns)),
    }[how]


def specs() -> st.SearchStrategy[list[SpecPlan]]:
    one = st.builds(
        lambda kind, parameter, reduction, gradient, scale, denominator: spec(
            kind,
            max(parameter, 1e-3) if kind == LossKind.HUBER else parameter,
            reduction,
            gradient=gradient,
            scale=scale,
            denominator=denominator if reduction.is_mean else None,
        ),
        st.sampled_from(LossKind),
        st.sampled_from([0.0, 0.11, 1.0, 1e30, math.inf]),
        st.sampled_from(Reduction),
        st.booleans(),
        st.sampled_from([1.0, -0.3, 32768.0]),
        st.sampled_from([None, 7.0]),
    )
    return st.lists(one, min_size=1, max_size=3)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    own, other = draw(shapes())
    shape = np.broadcast_shapes(own, other)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    data_type = draw(st.sampled_from(FLOATS))
    target_type = draw(st.sampled_from([data_type] * 3 + list(DataType)))
    x, y = np.array(random.normal(size=own)), np.array(random.normal(scale=3, size=other))
    if x.size and draw(st.booleans()):
        x.flat[random.integers(0, x.size, 3)] = draw(st.sampled_from(SPECIALS))
    weight = random.uniform(-1, 2, size=shape) if draw(st.booleans()) else None
    mask = random.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.99])) if draw(st.booleans()) else None
    own_specs = draw(specs())
    can_have_totals = not any(one.reduction.is_per_sample for one in own_specs)
    finish = with_totals if can_have_totals and draw(st.booleans()) else _as_it_is
    made = job(
        own_specs,
        x,
        y if target_type.is_floating_point else np.clip(np.rint(y), 0, 1),
        data_type,
        target_type=target_type,
        weight=weight,
        weight_type=draw(st.sampled_from(FLOATS)),
        mask=mask,
    )
    return finish(made)


def _as_it_is(one: Job) -> Job:
    return one


def company() -> list[WorkItem]:
    """Return items to be computed beside others: with NaN, empty, large, and some that fail."""
    nan = job(spec(), [math.nan] * 700, [0.0] * 700)
    return [
        nan.item,
        job(
            [spec(kind, 0.5, Reduction.NONE) for kind in LossKind], np.ones((40, 50)), np.ones(50), DataType.BFLOAT16
        ).item,
        job(spec(), [], [], DataType.FLOAT64).item,
        job(spec(reduction=Reduction.SAMPLE_MEAN), np.ones((300, 3)), np.zeros((300, 1)), DataType.FLOAT16).item,
        with_totals(job(spec(LossKind.MSE), np.ones(20_000), np.zeros(20_000))).item,
        WorkItem(b"", ()),
        WorkItem(nan.plan.header, (b"\x00" * 2800,)),
        WorkItem(nan.plan.header, (b"\x00" * 2800, b"\x00" * 2804)),
        WorkItem(nan.plan.header, (b"\x00" * 2800, memoryview(bytes(5600))[::2])),
    ]


def moved(data: bytes, offset: int) -> memoryview:
    """Return the same bytes at an address that is `offset` beyond a multiple of 64."""
    memory = np.full(len(data) + 128, 0xA5, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    memory[first : first + len(data)] = np.frombuffer(data, np.uint8)
    return memoryview(memory)[first : first + len(data)]  # type: ignore[arg-type]


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(one=jobs(), data=st.data())
def test_an_items_bits_depend_on_nothing_else(workers: list[CpuWorker], one: Job, data: st.DataObject) -> None:
    (alone,) = workers[0].run([one.item]).outcomes
    assert isinstance(alone, WorkResult)
    expected = result_bytes(alone)
    others = company()
    for worker in workers:  # 250 examples of four comparisons each: 1,000 cases
        around = data.draw(st.lists(st.sampled_from(range(len(others))), max_size=4))
        place = data.draw(st.integers(0, len(around)))
        offsets = data.draw(st.tuples(*[st.integers(0, 63) for _ in one.operands]))
        item = WorkItem(one.plan.header, tuple(map(moved, one.operands, offsets)))
        batch = [others[index] for index in around]
        outcome = worker.run([*batch[:place], item, *batch[place:]]).outcomes[place]
        assert isinstance(outcome, WorkResult)
        assert result_bytes(outcome) == expected


def test_neighbours_that_fail_say_so_and_the_others_are_computed(workers: list[CpuWorker]) -> None:
    for worker in workers:
        outcomes = worker.run(company()).outcomes
        assert [isinstance(outcome, WorkFailure) for outcome in outcomes] == [False] * 5 + [True] * 4


def test_other_requests_between_two_pieces_change_no_bits(workers: list[CpuWorker]) -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(2, 9, 3001))
    wide = [spec(reduction=reduction) for reduction in Reduction]
    large = [
        job(wide, x, y, DataType.FLOAT64, weight=random.uniform(size=x.shape), mask=random.random(x.shape) < 0.5),
        job(wide, x, y[:1], DataType.FLOAT16),
        job(wide, x[:, :1], y, DataType.BFLOAT16),
        with_totals(job(wide[:3], x, y, DataType.BFLOAT16, weight=random.normal(size=x.shape))),
    ]
    for worker in workers[1:]:
        expected = workers[0].run([one.item for one in large]).outcomes
        # Several large ones at once, in turn, and small ones in between.
        open_jobs = [worker.begin(one.item) for one in large]
        left = list(range(len(large)))
        while left:
            for index in list(left):
                if open_jobs[index].advance():
                    left.remove(index)
                worker.run(company()[:4])
        for one, outcome in zip(open_jobs, expected, strict=True):
            assert isinstance(outcome, WorkResult)
            assert result_bytes(one.result()) == result_bytes(outcome)


_PRINT_DIGEST = """
import hashlib, numpy as np
from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import LossKind, Reduction
from tests.server.engine.building import FLOATS, job, spec, with_totals
worker, digest, random = CpuWorker(), hashlib.sha256(), np.random.default_rng(5)
worker.warm_up()
specs = [spec(kind, 0.3, reduction, scale=1.7) for kind in LossKind for reduction in Reduction][:16]
for data_type in FLOATS:
    for own, other in [((9001,), (9001,)), ((40, 300), (300,)), ((300, 4), (300, 1)), ((2, 9000), (1,))]:
        for weighted in (False, True):
            x, y, w = random.normal(size=own), random.normal(size=other), random.uniform(-1, 2, size=own)
            x.flat[0] = np.nan if weighted else 1.0
            one = job(specs, x, y, data_type, weight=w if weighted else None, mask=w > 0 if weighted else None)
            (outcome,) = worker.run([one.item]).outcomes
            digest.update(outcome.scalars)
            for output in outcome.outputs:
                digest.update(output)
            one = with_totals(job([one for one in specs if not one.reduction.is_per_sample], x, y, data_type))
            (outcome,) = worker.run([one.item]).outcomes
            digest.update(outcome.totals)
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_old_and_new_processors_give_the_same_bits(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    path = os.pathsep.join(str(root / part) for part in ("proto", "server", "."))
    processors: list[dict[str, str]] = [{}]
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        # No fused multiply-add, and vectors of two float64; then those of 2013.
        processors.append({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""})
        processors.append({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"})
    digests: list[Any] = []
    for index, processor in enumerate(processors):
        environment = {**os.environ, **processor, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / str(index))}
        if index == 0:
            del environment["NUMBA_CACHE_DIR"]
        done = subprocess.run(
            [sys.executable, "-c", _PRINT_DIGEST], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert len(set(digests)) == 1
