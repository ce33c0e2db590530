"""Processes that die, hang, or lose their device: each is replaced, no request goes without an answer, none is wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lossgrad_server.isolation import keeper as keepers
from lossgrad_server.isolation.keeper import ProcessSettings
from lossgrad_server.isolation.link import Link
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.isolation.worker import IsolatedWorker
from lossgrad_server.jobs import DataType, JobPlan, TensorPlan
from lossgrad_server.work import FailureKind, Retry, WorkFailure, WorkResult
from tests.server.engine.building import Job, check, job, result_bytes, spec
from tests.server.isolation.failing_nursery import (
    EXITS_AT,
    FAULTS_AT,
    HANGS_AT,
    IS_SLOW_AT,
    IS_SPLIT_AT,
    LOSES_DEVICE_AT,
    PROGRAM,
)
from tests.server.serving import PATIENCE_SECONDS, eventually


class Noted:
    """A KeeperObserver that notes what it is told."""

    def __init__(self) -> None:
        self.losses: list[Loss] = []
        self.seconds: list[float] = []
        self.has_given_up = threading.Event()

    def worker_lost(self, loss: Loss) -> None:
        self.losses.append(loss)

    def worker_replaced(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def worker_given_up(self) -> None:
        self.has_given_up.set()


@pytest.fixture
def noted(isolated: IsolatedWorker) -> Noted:
    link(isolated)
    observer = Noted()
    isolated.watch(observer)
    return observer


def link(worker: IsolatedWorker) -> Link:
    """Wait until there is a process."""
    there = worker.keeper.wait_for_link(PATIENCE_SECONDS)
    assert there is not None
    return there


def of_size(count: int) -> Job:
    return job(spec(), np.full(count, 3.0), np.zeros(count))


NEIGHBOURS = [of_size(count) for count in (1, 2, 300, 5000, 70_000)]


def assert_right(worker: IsolatedWorker) -> None:
    for one in NEIGHBOURS[:3]:
        check(worker, one)


def test_a_process_that_is_killed_while_idle_is_replaced(isolated: IsolatedWorker, noted: Noted) -> None:
    first = link(isolated)
    os.kill(first.process_id, signal.SIGKILL)
    eventually(lambda: noted.seconds)
    assert noted.losses == [Loss.KILLED]
    assert link(isolated).process_id != first.process_id
    assert_right(isolated)


def test_what_a_killed_process_held_is_computed_by_the_next(isolated: IsolatedWorker, noted: Noted) -> None:
    slow, other = of_size(IS_SLOW_AT), of_size(40)
    expected = [result_bytes(isolated.submit([one.item]).result().outcomes[0]) for one in (slow, other)]  # type: ignore[arg-type]
    under_way = [isolated.submit([slow.item, other.item]), isolated.submit([other.item])]
    os.kill(link(isolated).process_id, signal.SIGKILL)
    outcomes = [outcome for one in under_way for outcome in one.result().outcomes]
    assert [result_bytes(one) for one in outcomes if isinstance(one, WorkResult)] == [*expected, expected[1]]
    assert noted.losses == [Loss.KILLED]


def test_a_large_request_goes_on_in_the_next_process(isolated: IsolatedWorker, noted: Noted) -> None:
    large = of_size(3 << 20)
    under_way = isolated.submit([large.item])
    assert under_way.advance()
    os.kill(link(isolated).process_id, signal.SIGKILL)
    while under_way.advance():
        pass
    (outcome,) = under_way.result().outcomes
    assert isinstance(outcome, WorkResult)
    (again,) = isolated.submit([large.item]).result().outcomes
    assert isinstance(again, WorkResult)
    assert result_bytes(outcome) == result_bytes(again)
    assert noted.losses == [Loss.KILLED]


def test_the_memory_that_the_process_has_is_told_with_a_batch_now_and_then(isolated: IsolatedWorker) -> None:
    first = link(isolated)
    os.kill(first.process_id, signal.SIGKILL)
    eventually(lambda: isolated.keeper.link not in (None, first))
    assert isolated.memory == {}
    seen = []

    def has_more() -> bool:
        check(isolated, NEIGHBOURS[0])
        seen.append(isolated.memory["allocated"])
        return seen[-1] > 1

    eventually(has_more)
    assert isolated.memory == {"allocated": 2, "reserved": 4, "pinned": 3}
    assert seen.count(1) > 1  # not with every batch


def test_what_the_process_computed_once_more_is_told(isolated: IsolatedWorker) -> None:
    result = isolated.submit([of_size(IS_SPLIT_AT).item, NEIGHBOURS[0].item]).result()
    assert all(isinstance(outcome, WorkResult) for outcome in result.outcomes)
    assert sorted(result.retries) == [Retry.ERROR, Retry.OUT_OF_MEMORY, Retry.OUT_OF_MEMORY]


def test_a_process_that_is_given_up_as_soon_as_it_is_there_is_replaced_too(isolated: IsolatedWorker) -> None:
    """The batcher may lose a process before the keeper's thread, which has just put it there, looks at it again."""

    class GivesUpOnce(Noted):
        def worker_replaced(self, seconds: float) -> None:
            super().worker_replaced(seconds)
            there = isolated.keeper.link
            if len(self.seconds) == 1 and there is not None:
                isolated.keeper.lose(there, Loss.DEVICE)

    observer = GivesUpOnce()
    first = link(isolated)
    isolated.watch(observer)
    os.kill(first.process_id, signal.SIGKILL)
    eventually(lambda: len(observer.seconds) == 2)
    assert observer.losses == [Loss.KILLED, Loss.DEVICE]
    assert_right(isolated)


@pytest.mark.parametrize(
    ("count", "loss"), [(EXITS_AT, Loss.EXITED), (FAULTS_AT, Loss.KILLED), (LOSES_DEVICE_AT, Loss.DEVICE)]
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_poison_request_is_refused_alone(
    isolated: IsolatedWorker, noted: Noted, count: int, loss: Loss, place: int
) -> None:
    crashes = []
    isolated.on_crash = lambda: crashes.append(1)
    jobs = [*NEIGHBOURS[:place], of_size(count), *NEIGHBOURS[place:]]
    result = isolated.submit([one.item for one in jobs]).result()
    assert result.retries == (Retry.WORKER_LOST,) * len(jobs)
    outcomes = result.outcomes
    refused = outcomes.pop(place)
    assert isinstance(refused, WorkFailure)
    assert refused.kind == FailureKind.WORKER_CRASHED
    assert len(crashes) == 1
    for one, outcome in zip(NEIGHBOURS, outcomes, strict=True):
        (alone,) = isolated.submit([one.item]).result().outcomes
        assert isinstance(outcome, WorkResult)
        assert isinstance(alone, WorkResult)
        assert result_bytes(outcome) == result_bytes(alone)
    eventually(lambda: len(noted.seconds) == 2)
    assert noted.losses == [loss, loss]  # each costs a process, and there were two
    assert_right(isolated)


def test_two_poison_requests_are_refused_and_the_others_are_not(isolated: IsolatedWorker, noted: Noted) -> None:
    jobs = [NEIGHBOURS[0], of_size(EXITS_AT), NEIGHBOURS[1], of_size(LOSES_DEVICE_AT), NEIGHBOURS[2]]
    outcomes = isolated.submit([one.item for one in jobs]).result().outcomes
    kinds = [outcome.kind if isinstance(outcome, WorkFailure) else None for outcome in outcomes]
    assert kinds == [None, FailureKind.WORKER_CRASHED, None, FailureKind.WORKER_CRASHED, None]
    eventually(lambda: len(noted.seconds) == 3)
    assert_right(isolated)


def test_a_batch_that_hangs_is_ended_and_its_neighbours_are_answered(
    isolated: IsolatedWorker, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_limit_seconds", 1.0)
    outcomes = isolated.submit([NEIGHBOURS[1].item, of_size(HANGS_AT).item]).result().outcomes
    assert isinstance(outcomes[0], WorkResult)
    assert isinstance(outcomes[1], WorkFailure)
    assert outcomes[1].kind == FailureKind.WORKER_CRASHED
    eventually(lambda: len(noted.seconds) == 2)
    assert noted.losses == [Loss.HUNG, Loss.HUNG]


def test_a_process_that_is_stopped_is_replaced_and_its_batch_is_answered(
    isolated: IsolatedWorker, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_limit_seconds", 1.0)
    os.kill(link(isolated).process_id, signal.SIGSTOP)
    check(isolated, NEIGHBOURS[2])
    eventually(lambda: noted.seconds)
    assert noted.losses == [Loss.HUNG]


def test_work_that_goes_on_for_longer_than_the_limit_is_no_hang(
    isolated: IsolatedWorker, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for one batch: those that wait behind others are not counted the time of those."""
    slow = of_size(IS_SLOW_AT)
    monkeypatch.setattr(isolated, "_limit_seconds", 1.0)
    under_way = [isolated.submit([slow.item]) for _ in range(isolated.slots)] + [
        isolated.submit([slow.item]) for _ in range(4)
    ]
    for one in under_way:
        assert isinstance(one.result().outcomes[0], WorkResult)
    assert noted.losses == []


def test_where_no_process_comes_what_was_lost_is_to_be_tried_again(
    isolated: IsolatedWorker, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = threading.Event()
    start = isolated.keeper._start

    def late() -> Link:
        may_start.wait(PATIENCE_SECONDS)
        return start()

    monkeypatch.setattr(isolated.keeper, "_start", late)
    monkeypatch.setattr("lossgrad_server.isolation.worker._REPLACEMENT_SECONDS", 0.05)
    usual = isolated.retry_after_seconds
    os.kill(link(isolated).process_id, signal.SIGKILL)
    eventually(lambda: noted.losses)
    began, first = time.monotonic(), isolated.retry_after_seconds
    assert first >= usual >= 0.15
    # Who is told so by and by, and comes back then, has waited for long enough: the longer it takes, the longer they wait.
    eventually(lambda: isolated.retry_after_seconds > 2 * first)
    assert time.monotonic() - began < isolated.retry_after_seconds
    result = isolated.submit([NEIGHBOURS[0].item]).result()
    (outcome,) = result.outcomes
    assert isinstance(outcome, WorkFailure)
    assert outcome.kind == FailureKind.DEVICE_LOST
    assert result.retries == ()
    may_start.set()
    eventually(lambda: noted.seconds)
    assert isolated.keeper.seconds_without == 0
    assert_right(isolated)


def test_memory_that_cannot_be_had_fails_the_batch_and_not_the_process(
    isolated: IsolatedWorker, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(byte_count: int) -> int:
        raise OSError(28, "No space left on device")

    tensor = TensorPlan(DataType.FLOAT32, (40 << 20,))
    large = Job(JobPlan((spec(),), tensor, tensor), (bytes(tensor.byte_count),) * 2)
    monkeypatch.setattr("lossgrad_server.isolation.link.sealed_file", refuse)
    (outcome,) = isolated.submit([large.item]).result().outcomes
    assert isinstance(outcome, WorkFailure)
    assert outcome.kind == FailureKind.OUT_OF_MEMORY
    assert "bytes of shared memory" in outcome.message
    assert_right(isolated)
    assert noted.losses == []


# ---- Processes of the test's own ----


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there, and not only waiting for init to take note of its end, as an orphan may."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start() -> IsolatedWorker:
    worker = IsolatedWorker(ProcessSettings("cpu", 1, "fused", "error", program=PROGRAM), 30.0)
    worker.warm_up()
    return worker


def test_it_leaves_nothing_behind_and_replaces_a_nursery_too() -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    worker = start()
    observer = Noted()
    worker.watch(observer)
    nursery = worker.keeper._nursery
    assert nursery is not None
    first, nursery_id = link(worker).process_id, nursery._program.pid
    assert children_of(nursery_id) == [first]
    os.kill(nursery_id, signal.SIGKILL)  # its process dies with it
    eventually(lambda: observer.seconds)
    assert_right(worker)
    processes = [first, nursery_id]
    for count in (2, 3, 4):
        processes.append(link(worker).process_id)
        os.kill(processes[-1], signal.SIGKILL)
        eventually(lambda count=count: len(observer.seconds) == count)  # type: ignore[misc]
    assert_right(worker)
    processes.append(link(worker).process_id)
    worker.close()
    assert not any(map(runs, processes))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_no_such_device_is_told_and_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="cuda:99"):
        IsolatedWorker(ProcessSettings("cuda:99", 1, "plain", "error"), 1.0)


def test_a_program_that_does_not_start_is_told() -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        IsolatedWorker(ProcessSettings("cpu", 1, "fused", program=("-c", "pass")), 1.0)


def test_after_long_without_a_process_the_device_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(keepers, "_FIRST_DELAY_SECONDS", 0.001)
    worker = start()
    observer = Noted()
    worker.watch(observer)

    def fail() -> Link:
        raise RuntimeError("there is none")

    monkeypatch.setattr(worker.keeper, "_start", fail)
    os.kill(link(worker).process_id, signal.SIGKILL)
    assert observer.has_given_up.wait(PATIENCE_SECONDS)
    assert worker.is_lost
    (outcome,) = worker.submit([NEIGHBOURS[0].item]).result().outcomes
    assert isinstance(outcome, WorkFailure)
    assert outcome.kind == FailureKind.DEVICE_LOST
    worker.close()
