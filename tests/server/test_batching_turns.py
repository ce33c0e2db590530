"""Whose turn it is: callers one after the other, bulk after the rest but not for ever, and what is late."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_server.batching.forming import BatchLimits, ClosedBy, form_batch
from lossgrad_server.batching.job import Job, KnownOrigin
from lossgrad_server.batching.line import AGED_SECONDS, FairLine, Line, work_of
from lossgrad_server.batching.schedule import Pace, Schedule
from lossgrad_server.errors import Code, DeadlinePassed, Reason
from lossgrad_server.work import BatchResult, WorkItem, WorkResult
from tests.server.batching import PLENTY, Answers, FakeWorker, Observed, batcher


def job(name: str, caller: str = "", *, is_bulk: bool = False, queued_ns: int = 0, elements: int = 1) -> Job:
    made = Answers().job(name, elements)
    made.origin = KnownOrigin(caller, is_bulk)
    made.queued_ns = queued_ns
    return made


def name_of(one: Job) -> str:
    return one.item.header.decode()


def drained(line: FairLine | Line) -> list[str]:
    return [name_of(line.popleft()) for _ in range(len(line))]


def test_a_caller_with_one_job_does_not_wait_for_one_with_a_thousand() -> None:
    line = FairLine()
    for index in range(1000):
        line.append(job(f"greedy {index}", "greedy"))
    line.append(job("modest 0", "modest"))
    assert drained(line)[:3] == ["greedy 0", "modest 0", "greedy 1"]


@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_every_job_comes_once_in_its_callers_order_and_nobody_is_two_turns_ahead(callers: list[str]) -> None:
    line = FairLine()
    for index, caller in enumerate(callers):
        line.append(job(f"{caller}{index}", caller))
    assert line.work == sum(map(work_of, line))
    order = drained(line)
    assert sorted(order) == sorted(f"{caller}{index}" for index, caller in enumerate(callers))
    for caller in "abcd":
        own = [int(name[1:]) for name in order if name[0] == caller]
        assert own == sorted(own)
    taken: Counter[str] = Counter()
    total = Counter(callers)
    for name in order:
        taken[name[0]] += 1
        for other in total:  # one who still waits has had at most one turn less
            assert taken[other] == total[other] or taken[name[0]] - taken[other] <= 1
    assert (len(line), line.work) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=40))
def test_jobs_can_be_taken_from_anywhere(jobs: list[tuple[str, bool]]) -> None:
    line = FairLine()
    made = [job(f"{caller}{index}", caller) for index, (caller, _) in enumerate(jobs)]
    wanted = {id(one) for one, (_, is_wanted) in zip(made, jobs, strict=True) if is_wanted}
    for one in made:
        line.append(one)
    assert {id(one) for one in line.take(lambda one: id(one) in wanted)} == wanted
    assert len(line) == len(made) - len(wanted)
    assert line.work == sum(map(work_of, line))
    assert len(drained(line)) == len(made) - len(wanted)


def test_bulk_goes_after_all_others_until_it_has_waited_long() -> None:
    now = [0]
    line = Line(lambda: now[0])
    line.append(job("bulk", "b", is_bulk=True, queued_ns=0))
    line.append(job("prompt 0", "p", queued_ns=1))
    line.append(job("prompt 1", "p", queued_ns=2))
    assert line.work_before(job("", "p")) == 2 * work_of(job("", "p"))
    assert line.work_before(job("", "p", is_bulk=True)) == 3 * work_of(job("", "p"))
    assert name_of(line.popleft()) == "prompt 0"
    now[0] = int(AGED_SECONDS * 1e9) + 1
    assert drained(line) == ["bulk", "prompt 1"]


def test_neither_kind_of_caller_starves_the_other_however_much_waits() -> None:
    now = [0]
    line = Line(lambda: now[0])
    for index in range(100):
        line.append(job(f"bulk {index}", "b", is_bulk=True, queued_ns=0))
    now[0] = int(AGED_SECONDS * 1e9) + 1
    for index in range(60):
        line.append(job(f"prompt {index}", "p", queued_ns=now[0]))
    assert line.work_before(job("", "p")) == 60 * work_of(job("")) * 4 // 3
    order = [name.split()[0] for name in drained(line)]
    assert order[:80] == ["bulk", "prompt", "prompt", "prompt"] * 20  # a turn in four, and no more, while both wait
    assert order[80:] == ["bulk"] * 80


# ---- Pace and schedule ----


def test_the_pace_is_not_known_before_some_batches_and_follows_a_change() -> None:
    pace = Pace()
    for _ in range(9):
        pace.note(100, 0.001)
    assert pace.seconds(100) == 0
    pace.note(100, 0.001)
    assert pace.seconds(100) == pytest.approx(0.001)
    assert pace.seconds(50) == pytest.approx(0.0005)
    for _ in range(60):
        pace.note(100, 0.003)
    assert pace.seconds(100) == pytest.approx(0.003, rel=0.01)


def test_of_a_slow_device_the_pace_is_known_after_two_batches() -> None:
    pace = Pace()
    pace.note(100, 0.06)
    assert pace.seconds(100) == 0
    pace.note(100, 0.06)
    assert pace.seconds(100) == pytest.approx(0.06)


def test_one_batch_that_was_held_up_for_long_does_not_change_the_pace_for_long() -> None:
    pace = Pace()
    for _ in range(30):
        pace.note(100, 0.01)
    pace.note(100, 3600.0)  # the process was stopped meanwhile
    assert pace.seconds(100) < 0.015


def test_a_pace_that_nothing_confirms_keeps_no_job_from_a_device_that_is_free() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for _ in range(2):
        pace.note(work_of(Answers().job("x")), 10.0)
    answers = Answers()

    def names() -> list[str]:
        line = FairLine()
        for name in ("a", "b"):
            line.append(answers.job(name, deadline=time.monotonic() + 5))
        return [name_of(one) for one in form_batch(line, BatchLimits(256, PLENTY, PLENTY), pace).jobs]

    assert names() == []
    now[0] += 2
    assert names() == ["a"]  # and what becomes of it will show


def test_a_schedule_adds_what_is_begun_and_does_not_let_small_wait_for_large() -> None:
    now = [100.0]
    schedule = Schedule(lambda: now[0])
    for _ in range(10):
        schedule.note(1000, 0.1, is_large=False)
        schedule.note(1000, 1.0, is_large=True)
    assert schedule.seconds_until_done(1000, 0) == pytest.approx(0.1)
    schedule.begin(5000, is_large=False)
    schedule.begin(5000, is_large=True)
    assert schedule.seconds_until_done(1000, 0) == pytest.approx(0.6)
    assert schedule.seconds_until_done(0, 1000) == pytest.approx(6.0)
    now[0] += 0.3
    assert schedule.seconds_until_done(1000, 0) == pytest.approx(0.3)
    now[0] += 100  # a device that hangs is no reason to refuse for ever
    assert schedule.seconds_until_done(1000, 0) == pytest.approx(0.1)
    schedule.end(5000, is_large=False)
    for _ in range(100):  # one that is faster than was thought must not be thought the busier for it
        schedule.begin(5000, is_large=False)
        schedule.end(5000, is_large=False)
    assert schedule.seconds_until_done(1000, 0) == pytest.approx(0.1)


def test_a_batch_takes_no_more_than_its_most_urgent_job_can_wait_for() -> None:
    pace = Pace()
    for _ in range(10):
        pace.note(work_of(Answers().job("x")), 0.1)  # a tenth of a second each
    answers = Answers()
    line = FairLine()
    for name, seconds in (("a", 5.0), ("urgent", 0.35), ("b", 5.0), ("c", None)):
        line.append(answers.job(name, deadline=None if seconds is None else time.monotonic() + seconds))
    batch = form_batch(line, BatchLimits(256, PLENTY, PLENTY), pace)
    assert [name_of(one) for one in batch.jobs] == ["a", "urgent", "b"]
    assert batch.closed_by is ClosedBy.DEADLINE
    assert not batch.dropped
    assert [name_of(one) for one in form_batch(line, BatchLimits(256, PLENTY, PLENTY), pace).jobs] == ["c"]


def test_a_job_that_would_be_late_with_its_batch_is_dropped_and_the_batch_goes_on() -> None:
    pace = Pace()
    one = work_of(Answers().job("x"))
    for _ in range(10):
        pace.note(one, 0.1)  # a tenth of a second each
    answers = Answers()
    line = FairLine()
    for name, seconds in (("a", None), ("late", 0.15), ("b", 5.0)):
        line.append(answers.job(name, deadline=None if seconds is None else time.monotonic() + seconds))
    batch = form_batch(line, BatchLimits(256, PLENTY, PLENTY), pace)
    assert [name_of(one) for one in batch.jobs] == ["a", "b"]
    ((dropped, error),) = batch.dropped
    assert name_of(dropped) == "late"
    assert isinstance(error, DeadlinePassed)
    assert "takes about 200.0 ms" in error.message


# ---- The batcher ----


class SlowWorker(FakeWorker):
    """Takes a hundredth of a second for each job."""

    def run(self, items: Sequence[WorkItem]) -> BatchResult:
        time.sleep(0.01 * len(items))
        return super().run(items)


def test_a_job_that_would_be_late_is_refused_at_once_and_one_that_would_not_is_taken() -> None:
    worker, answers = SlowWorker(), Answers()
    tested = batcher(worker, requests=1)
    tested.start()
    tested.wait_until_warm()
    for index in range(12):
        assert not tested.submit([answers.job(f"first {index}")])
        answers.wait_for(1)
    worker.hold()
    assert not tested.submit([answers.job(f"ahead {index}") for index in range(20)])
    worker.wait_for_batch()
    now = time.monotonic()
    late, fine = answers.job("late", deadline=now + 0.05), answers.job("fine", deadline=now + 20)
    ((refused, error),) = tested.submit([late, fine])
    assert refused is late
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.PREDICTED_LATE)
    assert error.retry_after_seconds is not None
    assert "deadline is" in error.message
    worker.release()
    answers.wait_for(21)
    assert answers.computed("fine")
    tested.close(5)


def test_nobody_waits_longer_than_their_deadline_for_a_device_that_is_busy() -> None:
    worker, answers = FakeWorker(), Answers()
    tested = batcher(worker, requests=1)
    tested.start()
    tested.wait_until_warm()
    worker.hold()
    now = time.monotonic()
    tested.submit([answers.job("running", deadline=now + 0.05), answers.job("waiting", deadline=now + 0.05)])
    tested.submit([answers.job("patient", deadline=now + 60)])
    worker.wait_for_batch()
    tested.expire()
    assert not answers.order  # nothing is late yet
    time.sleep(0.2)
    tested.expire()
    tested.expire()
    answers.wait_for(2)
    assert sorted(answers.order) == ["running", "waiting"]
    for name in ("running", "waiting"):
        assert answers.error(name).code == Code.DEADLINE_EXCEEDED
    assert tested.admitted_requests == 2  # one's memory is still in use on the device
    worker.release()
    answers.wait_for(1)
    assert answers.computed("patient").result == WorkResult(b"patient", ())
    assert sorted(answers.order) == ["patient", "running", "waiting"]  # each exactly once
    assert tested.admitted_requests == 0
    tested.close(5)


def test_expired_and_cancelled_jobs_leave_the_queue_before_their_turn() -> None:
    worker, answers = FakeWorker(), Answers()
    observed = Observed()
    tested = batcher(worker, requests=1, observer=observed)
    tested.start()
    tested.wait_until_warm()
    worker.hold()
    tested.submit([answers.job("running")])
    worker.wait_for_batch()
    gone = answers.job("gone")
    tested.submit([gone, answers.job("next")])
    gone.cancelled = True
    tested.expire()
    answers.wait_for(1)
    assert answers.error("gone").code == Code.CANCELLED
    assert tested.waiting_requests == 1
    worker.release()
    answers.wait_for(2)
    assert [name for batch in worker.batches for name in batch] == ["running", "next"]
    tested.close(5)
