"""The batcher: greedy, without a timer, one outcome for each job whatever the worker, the callers and the close do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.forming import ClosedBy
from lossgrad_server.batching.job import BatchFacts, Job
from lossgrad_server.batching.line import Priority
from lossgrad_server.errors import Code, Reason
from lossgrad_server.work import FailureKind, WorkFailure, WorkResult
from tests.server.batching import PATIENCE_SECONDS, Answers, FakeWorker, Observed, batcher


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def start(worker: FakeWorker) -> Iterator[Callable[[Batcher], Batcher]]:
    """Give a function that starts a batcher, closed at the test's end."""
    started: list[Batcher] = []

    def run(one: Batcher) -> Batcher:
        started.append(one)
        one.start()
        one.wait_until_warm()
        return one

    yield run
    worker.release()
    for one in started:
        one.close(PATIENCE_SECONDS)


Start = Callable[[Batcher], Batcher]


def submit(one: Batcher, *jobs: Job) -> None:
    assert one.submit(jobs) == []


# ---- Batches ----


def test_a_lone_job_runs_at_once_and_alone(worker: FakeWorker, answers: Answers, start: Start) -> None:
    """No timer: nothing but the job itself makes it run."""
    one = start(batcher(worker))
    for name in ("a", "b", "c"):
        submit(one, answers.job(name))
        answers.wait_for(1)
    assert worker.batches == [["a"], ["b"], ["c"]]


def test_what_waits_when_the_device_is_free_goes_in_one_batch_in_order(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    observer = Observed()
    one = start(batcher(worker, observer=observer))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    names = [f"job {number}" for number in range(50)]
    for name in names[:10]:
        submit(one, answers.job(name, 2))
    submit(one, *(answers.job(name, 2) for name in names[10:]))
    assert (one.waiting_requests, one.admitted_requests) == (50, 51)
    assert (one.waiting(Priority.NORMAL).bytes, one.admitted_bytes) == (50 * 16, 50 * 16 + 8)
    worker.release()
    answers.wait_for(51)
    assert worker.batches == [["first"], names]
    assert answers.order == ["first", *names]
    assert [batch.closed_by for batch in observer.batches] == [ClosedBy.IDLE] * 2
    assert (one.waiting_requests, one.admitted_requests, one.admitted_bytes, one.total_admitted) == (0, 0, 0, 51)


def test_outcomes_tell_the_batch_and_where_the_time_went(worker: FakeWorker, answers: Answers, start: Start) -> None:
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    before = time.perf_counter_ns()
    submit(one, answers.job("a", 5), answers.job("b", 7))
    worker.release()
    answers.wait_for(3)
    for name in ("a", "b"):
        computed = answers.computed(name)
        assert computed.result == WorkResult(name.encode(), ())
        assert computed.batch == BatchFacts(
            10, 20, 30, request_count=2, element_count=12, number=computed.batch.number, done_ns=computed.batch.done_ns
        )
        assert 0 < computed.queue_ns <= time.perf_counter_ns() - before


def test_caps_split_what_waits_into_batches(worker: FakeWorker, answers: Answers, start: Start) -> None:
    observer = Observed()
    one = start(batcher(worker, requests=3, elements=100, observer=observer))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    submit(one, *(answers.job(name, size) for name, size in zip("abcdefg", (1, 1, 1, 60, 60, 100, 1), strict=True)))
    worker.release()
    answers.wait_for(8)
    assert worker.batches == [["first"], ["a", "b", "c"], ["d"], ["e"], ["f"], ["g"]]
    assert [str(batch.closed_by) for batch in observer.batches[1:]] == [
        "max_requests",
        "max_elements",
        "max_elements",
        "alone",
        "idle",
    ]


def test_the_worker_is_touched_by_one_thread_of_the_batchers_own(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    submit(one, answers.job("a"))
    answers.wait_for(1)
    one.close(PATIENCE_SECONDS)
    assert len(worker.threads) == 1
    assert threading.current_thread() not in worker.threads


def test_a_batch_is_handed_back_in_one_go(worker: FakeWorker, answers: Answers, start: Start) -> None:
    """The transport's thread is woken once for each batch, not once for each job."""
    posted: list[Callable[[], None]] = []
    arrived = threading.Semaphore(0)

    def post(callback: Callable[[], None]) -> None:
        posted.append(callback)
        arrived.release()

    one = start(batcher(worker, post=post))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    submit(one, *(answers.job(str(number)) for number in range(20)))
    worker.release()
    for _ in range(2):
        assert arrived.acquire(timeout=PATIENCE_SECONDS)
    assert answers.order == []
    for callback in posted:
        callback()
    assert len(posted) == 2
    assert len(answers.order) == 21


# ---- Dropped ----


def test_the_expired_and_the_cancelled_are_answered_and_not_computed(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    gone = answers.job("gone")
    submit(one, answers.job("late", deadline=time.monotonic()), gone, answers.job("good"))
    gone.cancelled = True
    worker.release()
    answers.wait_for(4)
    assert worker.batches == [["first"], ["good"]]
    assert answers.error("late").code == Code.DEADLINE_EXCEEDED
    assert answers.error("gone").code == Code.CANCELLED
    answers.computed("good")
    assert (one.admitted_requests, one.admitted_bytes) == (0, 0)


def test_where_all_are_dropped_the_worker_is_left_alone(worker: FakeWorker, answers: Answers, start: Start) -> None:
    observer = Observed()
    one = start(batcher(worker, observer=observer))
    submit(one, *(answers.job(name, deadline=0.0) for name in "abc"))
    answers.wait_for(3)
    assert worker.batches == []
    assert observer.batches == []
    assert one.admitted_requests == 0


# ---- Refused ----


def test_a_full_queue_refuses_at_once_and_only_what_is_too_much(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker, admitted_requests=3))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    jobs = [answers.job(name) for name in "abcd"]
    refused = one.submit(jobs)
    assert [(job, error.reason) for job, error in refused] == [(job, Reason.QUEUE_FULL) for job in jobs[2:]]
    worker.release()
    answers.wait_for(3)
    assert worker.batches == [["first"], ["a", "b"]]
    assert answers.outcomes["c"] == answers.outcomes["d"] == []  # told by the return value, and only there
    submit(one, answers.job("again"))
    answers.wait_for(1)


def test_a_job_too_large_beside_others_is_refused_and_a_smaller_one_behind_it_is_not(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker, admitted_bytes=100))
    worker.hold()
    submit(one, answers.job("giant", 1000))
    worker.wait_for_batch()
    ((_, error),) = one.submit([answers.job("small")])
    assert error.reason == Reason.QUEUE_BYTES_FULL
    worker.release()
    answers.wait_for(1)
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    large, small = answers.job("large", 12), answers.job("small", 11)
    assert [job for job, _ in one.submit([large, small])] == [large]


# ---- Failures ----


def test_an_item_that_fails_fails_alone(worker: FakeWorker, answers: Answers, start: Start) -> None:
    failures = {
        "memory": WorkFailure(FailureKind.OUT_OF_MEMORY, "takes 9 bytes, 8 are free"),
        "device": WorkFailure(FailureKind.DEVICE_LOST, "the device is gone"),
        "bug": WorkFailure(FailureKind.INTERNAL, "secret"),
    }
    worker.outcome = lambda name: failures.get(name, WorkResult(name.encode(), ()))
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    submit(one, *(answers.job(name) for name in ("a", "memory", "b", "device", "c", "bug", "d")))
    worker.release()
    answers.wait_for(8)
    for name in "abcd":
        assert answers.computed(name).result.scalars == name.encode()
    memory, device, bug = (answers.error(name) for name in ("memory", "device", "bug"))
    assert (memory.code, memory.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OUT_OF_DEVICE_MEMORY)
    assert memory.message == "takes 9 bytes, 8 are free"
    assert memory.retry_after_seconds is None
    assert (device.code, device.reason) == (Code.UNAVAILABLE, Reason.DEVICE_FAILED)
    assert device.retry_after_seconds
    assert bug.code == Code.INTERNAL
    assert "secret" not in bug.message


def test_a_worker_that_raises_fails_its_batch_and_not_the_next(
    worker: FakeWorker, answers: Answers, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def outcome(name: str) -> WorkResult:
        if name == "poison":
            raise RuntimeError("secret")
        return WorkResult(name.encode(), ())

    worker.outcome = outcome
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()
    submit(one, answers.job("neighbour"), answers.job("poison"))
    worker.release()
    answers.wait_for(3)
    for name in ("neighbour", "poison"):
        assert answers.error(name).code == Code.INTERNAL
        assert "secret" not in answers.error(name).message
    assert "secret" in caplog.text  # the log says why
    submit(one, answers.job("next"))
    answers.wait_for(1)
    answers.computed("next")
    assert one.admitted_requests == 0


def test_a_worker_that_loses_an_outcome_fails_its_batch_and_not_the_next(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    worker.outcome_count = 0
    one = start(batcher(worker))
    submit(one, answers.job("a"))
    answers.wait_for(1)
    assert answers.error("a").code == Code.INTERNAL
    worker.outcome_count = None
    submit(one, answers.job("b"))
    answers.wait_for(1)
    answers.computed("b")


def test_a_caller_whose_callback_fails_costs_the_others_nothing(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("first"))
    worker.wait_for_batch()

    def fail(outcomes: object) -> None:
        raise RuntimeError("the caller's own trouble")

    broken = answers.job("broken")
    broken.on_done = fail
    submit(one, answers.job("a"), broken, answers.job("b"))
    worker.release()
    answers.wait_for(3)
    answers.computed("a")
    answers.computed("b")
    assert one.admitted_requests == 0


def test_a_failed_warm_up_is_told_to_whoever_waits_for_it(worker: FakeWorker) -> None:
    worker.warm_up_error = RuntimeError("no such device")
    one = batcher(worker)
    one.start()
    with pytest.raises(RuntimeError, match="no such device"):
        one.wait_until_warm()
    one.close(PATIENCE_SECONDS)


# ---- Closing ----


def test_close_refuses_what_waits_lets_the_running_batch_finish_and_closes_the_worker(
    worker: FakeWorker, answers: Answers, start: Start
) -> None:
    one = start(batcher(worker))
    worker.hold()
    submit(one, answers.job("running"))
    worker.wait_for_batch()
    submit(one, answers.job("a"), answers.job("b"))
    closing = threading.Thread(target=one.close, args=(PATIENCE_SECONDS,))
    closing.start()
    answers.wait_for(2)
    assert [name for name, outcomes in answers.outcomes.items() if outcomes] == ["a", "b"]
    for name in ("a", "b"):
        error = answers.error(name)
        assert (error.code, error.reason, error.retry_after_seconds) == (Code.UNAVAILABLE, Reason.DRAINING, 0.0)
    ((_, refused),) = one.submit([answers.job("new")])
    assert refused.reason == Reason.DRAINING
    assert not worker.closed.is_set()
    worker.release()
    closing.join(PATIENCE_SECONDS)
    answers.wait_for(1)
    answers.computed("running")
    assert worker.closed.is_set()
    assert one.admitted_requests == 0
    one.close(PATIENCE_SECONDS)  # once more does nothing
    assert all(len(outcomes) == 1 for name, outcomes in answers.outcomes.items() if name != "new")


def test_close_wakes_a_worker_that_sleeps(worker: FakeWorker, answers: Answers) -> None:
    one = batcher(worker)
    one.start()
    one.wait_until_warm()
    submit(one, answers.job("a"))
    answers.wait_for(1)
    one.close(PATIENCE_SECONDS)
    assert worker.closed.is_set()


# ---- Many threads at once ----


def test_whatever_eight_threads_submit_each_job_has_exactly_one_outcome(worker: FakeWorker, start: Start) -> None:
    """Callers that cancel, deadlines that pass, refusals, failing items, a close in between: nothing is lost or doubled."""

    def outcome(name: str) -> WorkResult | WorkFailure:
        if name.endswith("7"):
            return WorkFailure(FailureKind.OUT_OF_MEMORY, "too large")
        return WorkResult(name.encode(), ())

    worker.outcome = outcome
    one = start(batcher(worker, requests=16, elements=64, admitted_requests=40, admitted_bytes=2000))
    answers = [Answers() for _ in range(8)]
    refused: list[set[str]] = [set() for _ in range(8)]
    together = threading.Barrier(9)

    def call(number: int) -> None:
        together.wait(PATIENCE_SECONDS)
        own = answers[number]
        for turn in range(200):
            jobs = [
                own.job(f"{number}/{turn}/{index}", 1 + (turn + index) % 90, deadline=0.0 if index == 3 else None)
                for index in range(1 + turn % 5)
            ]
            for job, _ in one.submit(jobs):
                refused[number].add(job.item.header.decode())
            if turn % 3 == 0:
                jobs[0].cancelled = True

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    together.wait(PATIENCE_SECONDS)
    for thread in threads[:4]:
        thread.join(PATIENCE_SECONDS)
    one.close(PATIENCE_SECONDS)
    for thread in threads[4:]:
        thread.join(PATIENCE_SECONDS)

    for own, own_refused in zip(answers, refused, strict=True):
        assert len(own.outcomes) == 600
        for name, outcomes in own.outcomes.items():
            assert len(outcomes) == (0 if name in own_refused else 1), name
    computed = [name for batch in worker.batches for name in batch]
    assert len(computed) == len(set(computed))
    assert (one.waiting_requests, one.admitted_requests, one.admitted_bytes) == (0, 0, 0)
