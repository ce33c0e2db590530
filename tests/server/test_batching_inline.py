"""Little work that finds the device free is computed at once, in the thread that submits it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.job import Job, Outcome
from lossgrad_server.errors import DeadlinePassed, InternalError
from lossgrad_server.work import BatchResult, WorkItem, WorkResult
from tests.server.batching import PATIENCE_SECONDS, Answers, FakeWorker, Observed, batcher
from tests.server.serving import eventually

LITTLE = 10  # elements


class InlineWorker(FakeWorker):
    """A worker whose small batches are cheaper than a hand-over."""

    inline_work = LITTLE


@pytest.fixture
def worker() -> InlineWorker:
    return InlineWorker()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def start(worker: InlineWorker) -> Iterator[Callable[[Batcher], Batcher]]:
    started: list[Batcher] = []

    def run(one: Batcher) -> Batcher:
        started.append(one)
        one.start()
        one.wait_until_warm()
        # Only a thread that sleeps leaves the device to others.
        deadline = threading.Event()
        while not one.is_idle:
            assert not deadline.wait(0.001)
        return one

    yield run
    worker.release()
    for one in started:
        one.close(PATIENCE_SECONDS)


Start = Callable[[Batcher], Batcher]


def test_little_work_on_a_free_device_is_done_when_submit_returns(
    worker: InlineWorker, answers: Answers, start: Start
) -> None:
    observer = Observed()
    one = start(batcher(worker, observer=observer))
    assert one.submit([answers.job("a", LITTLE // 2), answers.job("b", LITTLE // 2)]) == []
    assert answers.order == ["a", "b"]
    assert worker.batches == [["a", "b"]]
    assert threading.current_thread() in worker.threads
    assert [batch.closed_by for batch in observer.batches] == ["inline"]
    assert one.admitted_requests == 0


def test_more_work_goes_to_the_worker_s_thread(worker: InlineWorker, answers: Answers, start: Start) -> None:
    one = start(batcher(worker))
    one.submit([answers.job("a", LITTLE + 1)])
    answers.wait_for(1)
    assert threading.current_thread() not in worker.threads


def test_while_the_device_is_busy_little_work_waits_for_it(
    worker: InlineWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    worker.hold()
    one.submit([answers.job("large", LITTLE + 1)])
    assert worker.wait_for_batch() == ["large"]
    one.submit([answers.job("a")])
    assert answers.order == []
    worker.release()
    answers.wait_for(2)
    assert worker.batches == [["large"], ["a"]]
    assert threading.current_thread() not in worker.threads


def test_an_expired_job_is_not_computed_inline(worker: InlineWorker, answers: Answers, start: Start) -> None:
    one = start(batcher(worker))
    one.submit([answers.job("late", deadline=0.0), answers.job("a")])
    assert isinstance(answers.error("late"), DeadlinePassed)
    assert answers.computed("a")
    assert worker.batches == [["a"]]


def test_a_worker_that_fails_inline_fails_its_jobs_and_nothing_else(
    worker: InlineWorker, answers: Answers, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one = start(batcher(worker))
    worker.outcome_count = 0
    one.submit([answers.job("a")])
    assert isinstance(answers.error("a"), InternalError)
    worker.outcome_count = None
    one.submit([answers.job("b")])
    assert answers.computed("b")
    assert "failed 1 jobs" in caplog.text


def test_many_threads_that_submit_little_work_get_every_answer_once(
    worker: InlineWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    jobs = [[answers.job(f"{thread} {index}", 1 + index % (LITTLE + 1)) for index in range(200)] for thread in range(8)]

    def submit(own: int) -> None:
        for job in jobs[own]:
            assert one.submit([job]) == []

    threads = [threading.Thread(target=submit, args=(own,)) for own in range(len(jobs))]
    for thread in threads:
        thread.start()
    answers.wait_for(8 * 200)
    for thread in threads:
        thread.join()
    assert all(len(outcomes) == 1 for outcomes in answers.outcomes.values())
    assert one.admitted_requests == 0


def test_the_jobs_of_a_batch_with_one_receiver_are_handed_back_together(
    worker: InlineWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    handed_back: list[list[str]] = []

    def on_done(outcomes: list[tuple[Job, Outcome]]) -> None:
        handed_back.append([job.item.header.decode() for job, _ in outcomes])

    a, b, c, d = (answers.job(name) for name in "abcd")
    for job in (a, b, d):
        job.on_done = on_done
    assert one.submit([a, b, c, d]) == []
    assert handed_back == [["a", "b"], ["d"]]
    assert answers.order == ["c"]


class _Elsewhere:
    """A pending of a worker elsewhere, which is done when the test says so."""

    def __init__(self, result: BatchResult) -> None:
        self._result = result
        self.may_end = threading.Event()
        self.threads: list[threading.Thread] = []

    def advance(self) -> bool:
        return not self.may_end.is_set()

    def is_done(self) -> bool:
        return self.may_end.is_set()

    def result(self) -> BatchResult:
        assert self.may_end.wait(PATIENCE_SECONDS)
        self.threads.append(threading.current_thread())
        return self._result


class _WorkerElsewhere(FakeWorker):
    """A worker that takes little inline, and may then take longer."""

    inline_work = 10

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[_Elsewhere] = []

    def submit(self, items: Sequence[WorkItem]) -> _Elsewhere:  # type: ignore[override]
        self.pending.append(_Elsewhere(BatchResult([WorkResult(item.header, ()) for item in items], 1, 2, 3)))
        return self.pending[-1]


def test_inline_work_that_takes_longer_is_left_to_the_workers_thread() -> None:
    worker, answers = _WorkerElsewhere(), Answers()
    one = batcher(worker)
    one.start()
    one.wait_until_warm()
    eventually(lambda: one.is_idle)
    assert one.submit([answers.job("a")]) == []  # returns, though it is not done
    assert answers.outcomes["a"] == []
    assert one.admitted_requests == 1
    assert one.submit([answers.job("b")]) == []  # the device is not free
    worker.pending[0].may_end.set()
    answers.wait_for(1)
    eventually(lambda: len(worker.pending) == 2)
    worker.pending[1].may_end.set()
    answers.wait_for(1)
    assert [answers.computed(name).result.scalars for name in "ab"] == [b"a", b"b"]
    assert threading.current_thread() not in worker.pending[0].threads
    assert one.admitted_requests == 0
    one.close(PATIENCE_SECONDS)
