"""Large jobs run in pieces with small ones between them; a device with slots has several batches under way; a lost one."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence

import pytest

from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.errors import Code, DeadlinePassed, InternalError, Reason, RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import BatchResult, FailureKind, Pending, WorkFailure, WorkItem, WorkResult
from tests.server.batching import PATIENCE_SECONDS, Answers, Observed, batcher

LARGE = 1000  # elements


class Steps:
    """A batch under way: its test takes it through its pieces."""

    def __init__(self, worker: StepWorker, names: list[str], pieces: int) -> None:
        self._worker = worker
        self._names = names
        self._pieces = pieces

    def advance(self) -> bool:
        if self._pieces == 0:
            return False
        self._worker.step(f"piece of {self._names[0]}")
        if self._worker.fails_in_piece == self._names[0]:
            raise RuntimeError("a bug of the worker's")
        self._pieces -= 1
        return self._pieces > 0

    def is_done(self) -> bool:
        return self._pieces == 0 and not self._worker.is_slow

    def result(self) -> BatchResult:
        if self._worker.is_slow:
            self._worker.step(f"wait for {self._names[0]}")
        return BatchResult([self._worker.outcome(name) for name in self._names], 1, 2, 3)


class StepWorker:
    """A worker of which each step is seen by the test, and done when the test allows it."""

    device = "cpu"
    inline_work = 0

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.is_lost = False
        self.is_slow = False  # whether results are not there before they are waited for
        self.fails_in_piece = ""
        self.outcome: Callable[[str], WorkResult | WorkFailure] = lambda name: WorkResult(name.encode(), ())
        self.log: list[str] = []
        self._allowed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[str] = queue.SimpleQueue()

    def is_large(self, plan: JobPlan) -> bool:
        return plan.element_count >= LARGE

    def warm_up(self) -> None: ...

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        names = [item.header.decode() for item in items]
        self.log.append(f"submit {' '.join(names)}")
        return Steps(self, names, 3 if names[0].startswith("large") else 0)

    def step(self, what: str) -> None:
        """Called by the worker's thread: say what begins and wait until the test allows it."""
        self._begun.put(what)
        self._allowed.get(timeout=PATIENCE_SECONDS)
        self.log.append(what)

    def wait_for_step(self) -> str:
        return self._begun.get(timeout=PATIENCE_SECONDS)

    def allow(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._allowed.put(None)

    def close(self) -> None: ...


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def start() -> Iterator[Callable[[Batcher, StepWorker], Batcher]]:
    started: list[tuple[Batcher, StepWorker]] = []

    def run(one: Batcher, worker: StepWorker) -> Batcher:
        started.append((one, worker))
        one.start()
        one.wait_until_warm()
        return one

    yield run
    for one, worker in started:
        worker.allow(100)
        one.close(PATIENCE_SECONDS)


Start = Callable[[Batcher, StepWorker], Batcher]


def test_a_small_job_behind_a_large_one_waits_for_one_piece_only(answers: Answers, start: Start) -> None:
    worker = StepWorker()
    observer = Observed()
    one = start(batcher(worker, observer=observer), worker)
    one.submit([answers.job("large", LARGE)])
    assert worker.wait_for_step() == "piece of large"
    one.submit([answers.job("a"), answers.job("b")])
    worker.allow()
    answers.wait_for(2)
    assert answers.order == ["a", "b"]
    assert worker.wait_for_step() == "piece of large"
    worker.allow(2)
    answers.wait_for(1)
    assert answers.order == ["a", "b", "large"]
    assert worker.log == ["submit large", "piece of large", "submit a b", "piece of large", "piece of large"]
    assert [batch.closed_by for batch in observer.batches] == ["idle", "alone"]
    assert answers.computed("large").batch.request_count == 1


def test_large_jobs_run_one_after_another_and_small_ones_cannot_starve_them(answers: Answers, start: Start) -> None:
    worker = StepWorker()
    one = start(batcher(worker), worker)
    one.submit([answers.job("large 1", LARGE), answers.job("large 2", LARGE)])
    for index in range(6):
        assert worker.wait_for_step() == f"piece of large {1 + index // 3}"
        one.submit([answers.job(f"small {index}")])
        worker.allow()
    answers.wait_for(8)
    pieces = [line for line in worker.log if line.startswith("piece")]
    assert pieces == ["piece of large 1"] * 3 + ["piece of large 2"] * 3
    assert answers.order.index("large 1") < answers.order.index("large 2")


def test_a_small_job_never_joins_a_large_ones_batch(answers: Answers, start: Start) -> None:
    worker = StepWorker()
    one = start(batcher(worker), worker)
    worker.allow(3)
    one.submit([answers.job("a"), answers.job("large", LARGE), answers.job("b")])
    answers.wait_for(3)
    submitted = [line for line in worker.log if line.startswith("submit")]
    assert submitted == ["submit a b", "submit large"]


def test_a_large_job_whose_deadline_passed_is_not_begun(answers: Answers, start: Start) -> None:
    worker = StepWorker()
    one = start(batcher(worker), worker)
    one.submit([answers.job("large", LARGE, deadline=0.0), answers.job("a")])
    answers.wait_for(2)
    assert isinstance(answers.error("large"), DeadlinePassed)
    assert worker.log == ["submit a"]


def test_a_large_job_that_fails_in_a_piece_fails_alone(
    answers: Answers, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = StepWorker()
    worker.fails_in_piece = "large bad"
    one = start(batcher(worker), worker)
    worker.allow(10)
    one.submit([answers.job("large bad", LARGE), answers.job("large good", LARGE), answers.job("a")])
    answers.wait_for(3)
    assert isinstance(answers.error("large bad"), InternalError)
    assert answers.computed("large good")
    assert answers.computed("a")
    assert one.admitted_requests == 0
    assert "a bug of the worker's" in caplog.text


def test_a_device_with_slots_is_given_the_next_batch_before_the_last_is_done(answers: Answers, start: Start) -> None:
    worker = StepWorker(slots=2)
    worker.is_slow = True
    one = start(batcher(worker, requests=1), worker)
    one.submit([answers.job("a"), answers.job("b"), answers.job("c")])
    assert worker.wait_for_step() == "wait for a"
    assert worker.log == ["submit a", "submit b"]
    worker.allow(3)
    answers.wait_for(3)
    assert answers.order == ["a", "b", "c"]
    assert worker.log == ["submit a", "submit b", "wait for a", "submit c", "wait for b", "wait for c"]


def test_a_lost_device_is_told_of_once_and_every_job_is_answered(answers: Answers, start: Start) -> None:
    worker = StepWorker()
    lost: list[str] = []
    one = start(batcher(worker, on_lost=lambda: lost.append(worker.device)), worker)
    worker.is_lost = True
    worker.outcome = lambda name: WorkFailure(FailureKind.DEVICE_LOST, f"the device failed while it held {name}")
    for name in ("a", "b"):
        one.submit([answers.job(name)])
        answers.wait_for(1)
    one.close(PATIENCE_SECONDS)
    assert lost == ["cpu"]
    error = answers.error("a")
    assert isinstance(error, RequestError)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.DEVICE_FAILED)
    assert error.retry_after_seconds is not None
