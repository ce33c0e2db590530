"""Outputs that are wanted somewhere: the CPU worker writes them there, to the bit, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.jobs import MAX_SPECS, DataType, LossKind, Reduction
from lossgrad_server.work import WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, job, result_bytes, run, spec

SMALL, LARGE = (5, 31), (7, 100_003)
EVERYTHING = [spec(kind, 0.5, reduction) for kind in LossKind for reduction in Reduction][:MAX_SPECS]


@pytest.fixture(scope="module")
def worker() -> Iterator[CpuWorker]:
    worker = CpuWorker(2)
    worker.warm_up()
    yield worker
    worker.close()


def pair(shape: tuple[int, ...], data_type: DataType = DataType.FLOAT32, *, special: bool = False) -> Job:
    x, y = np.random.default_rng(3).normal(size=(2, *shape))
    if special:
        x[0, :5] = [np.nan, np.inf, -np.inf, 0.0, 1e300]
    return job(EVERYTHING if shape is SMALL else EVERYTHING[::5], x, y, data_type)


class Wanted:
    """Memory for a job's outputs, one behind the other and a little apart, with a mark in every byte around them."""

    MARK = 0xA5

    def __init__(self, one: Job, *, shift: int = 0) -> None:
        sizes = [output.tensor.byte_count for output in one.plan.outputs]
        self.memory = np.full(sum(sizes) + 128 * len(sizes) + 128, self.MARK, np.uint8)
        self.spans: list[tuple[int, int]] = []
        end = -self.memory.ctypes.data % 64 + shift
        for size in sizes:
            begin = end + 64
            end = begin + -(-size // 64) * 64
            self.spans.append((begin, begin + size))

    @property
    def destinations(self) -> tuple[memoryview, ...]:
        return tuple(self.memory.data[begin:end] for begin, end in self.spans)

    def item(self, one: Job) -> WorkItem:
        return WorkItem(one.plan.header, one.operands, self.destinations)

    def is_untouched_around(self) -> bool:
        around = np.ones(len(self.memory), bool)
        for begin, end in self.spans:
            around[begin:end] = False
        return bool((self.memory[around] == self.MARK).all())


def outcome(worker: CpuWorker, item: WorkItem) -> WorkResult:
    (only,) = worker.submit([item]).result().outcomes
    assert isinstance(only, WorkResult)
    return only


@pytest.mark.parametrize("data_type", FLOATS, ids=lambda data_type: data_type.name.lower())
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "in pieces"])
@pytest.mark.parametrize("special", [False, True], ids=["finite", "with NaN and infinity"])
def test_outputs_are_written_where_they_are_wanted(
    worker: CpuWorker, data_type: DataType, shape: tuple[int, ...], special: bool
) -> None:
    one = pair(shape, data_type, special=special)
    expected = result_bytes(run(worker, one))
    wanted = Wanted(one)
    item = wanted.item(one)
    result = outcome(worker, item)
    assert all(part is there for part, there in zip(result.outputs, item.destinations, strict=True))
    assert result_bytes(result) == expected
    assert wanted.is_untouched_around()


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "in pieces"])
def test_some_outputs_may_be_wanted_and_others_not(worker: CpuWorker, shape: tuple[int, ...]) -> None:
    one = pair(shape)
    expected = result_bytes(run(worker, one))
    wanted = Wanted(one)
    destinations = tuple(there if place % 2 else None for place, there in enumerate(wanted.destinations))
    result = outcome(worker, WorkItem(one.plan.header, one.operands, destinations))
    assert result_bytes(result) == expected
    for part, there in zip(result.outputs, destinations, strict=True):
        assert there is None or part is there
    for (begin, end), there in zip(wanted.spans, destinations, strict=True):
        assert there is not None or (wanted.memory[begin:end] == Wanted.MARK).all()


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "in pieces"])
@pytest.mark.parametrize("special", [False, True], ids=["finite", "with NaN and infinity"])
def test_an_operand_is_never_overwritten(worker: CpuWorker, shape: tuple[int, ...], special: bool) -> None:
    """Several losses read an operand several times, and so does a chunk with NaN in it."""
    one = pair(shape, special=special)
    expected = result_bytes(run(worker, one))
    gradient = next(place for place, output in enumerate(one.plan.outputs) if output.role == 7)
    memory = bytearray(one.operands[0])
    for first in (0, 8):
        room = bytearray(8) + memory + bytearray(8)
        operand = memoryview(room)[8 : 8 + len(memory)]
        destination = memoryview(room)[first : first + len(memory)]
        destinations = [None] * len(one.plan.outputs)
        result = outcome(
            worker,
            WorkItem(
                one.plan.header,
                (operand, one.operands[1]),
                (*destinations[:gradient], destination, *destinations[gradient + 1 :]),
            ),
        )
        assert result_bytes(result) == expected
        assert bytes(operand) == one.operands[0]


@pytest.mark.parametrize("what", ["misaligned", "too short", "too long", "read-only", "too few"])
def test_what_cannot_be_written_to_is_left_alone(worker: CpuWorker, what: str) -> None:
    one = pair(SMALL)
    expected = result_bytes(run(worker, one))
    wanted = Wanted(one, shift=4 if what == "misaligned" else 0)
    destinations = wanted.destinations
    if what == "too short":
        destinations = tuple(there[:-1] for there in destinations)
    elif what == "too long":
        destinations = tuple(wanted.memory.data[begin : end + 1] for begin, end in wanted.spans)
    elif what == "read-only":
        destinations = tuple(there.toreadonly() for there in destinations)
    elif what == "too few":
        destinations = destinations[1:]
    result = outcome(worker, WorkItem(one.plan.header, one.operands, destinations))
    assert result_bytes(result) == expected
    assert (wanted.memory == Wanted.MARK).all()


def test_neighbours_in_a_batch_notice_nothing(worker: CpuWorker) -> None:
    jobs = [pair(SMALL, data_type) for data_type in FLOATS]
    expected = [result_bytes(run(worker, one)) for one in jobs]
    wanted = Wanted(jobs[2])
    items = [one.item for one in jobs]
    items[2] = wanted.item(jobs[2])
    bad = WorkItem(items[1].header, (b"",), (memoryview(bytearray(4)),))
    outcomes = worker.submit([*items, bad]).result().outcomes
    assert [result_bytes(one) for one in outcomes[:-1] if isinstance(one, WorkResult)] == expected
    assert not isinstance(outcomes[-1], WorkResult)
    assert wanted.is_untouched_around()


MEDIUM = (33, 1000)  # of enough work to be computed without the GIL, and in one piece


@pytest.mark.parametrize("data_type", FLOATS, ids=lambda data_type: data_type.name.lower())
@pytest.mark.parametrize("special", [False, True], ids=["finite", "with NaN and infinity"])
def test_an_only_output_is_written_where_it_is_wanted(worker: CpuWorker, data_type: DataType, special: bool) -> None:
    x, y = np.random.default_rng(4).normal(size=(2, *MEDIUM))
    if special:
        x[0, :5] = [np.nan, np.inf, -np.inf, 0.0, 1e300]
    one = job(spec(), x, y, data_type)
    expected = result_bytes(run(worker, one))
    wanted = Wanted(one)
    item = wanted.item(one)
    result = outcome(worker, item)
    assert result.outputs[0] is item.destinations[0]
    assert result_bytes(result) == expected
    assert wanted.is_untouched_around()


@pytest.mark.parametrize("shift", [0, 8, -8, 4], ids=["over it", "behind", "before", "misaligned"])
@pytest.mark.parametrize("operand", [0, 1], ids=["input", "target"])
def test_an_only_output_never_overwrites_an_operand(worker: CpuWorker, operand: int, shift: int) -> None:
    x, y = np.random.default_rng(4).normal(size=(2, *MEDIUM))
    x[0, 0] = np.nan
    one = job(spec(), x, y)
    expected = result_bytes(run(worker, one))
    size = len(one.operands[operand])
    room = np.zeros(size + 128, np.uint8)
    first = -room.ctypes.data % 64 + 64
    room[first : first + size] = np.frombuffer(one.operands[operand], np.uint8)
    operands = list(one.operands)
    operands[operand] = room.data[first : first + size].toreadonly()  # type: ignore[call-overload]
    destination = room.data[first + shift : first + shift + size]
    result = outcome(worker, WorkItem(one.plan.header, tuple(operands), (destination,)))
    assert result_bytes(result) == expected
    assert bytes(operands[operand]) == one.operands[operand]
