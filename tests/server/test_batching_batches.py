"""Which jobs make a batch: all that wait, in order, up to the caps; and who may wait at all."""

from __future__ import annotations

import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_server.batching.admission import Admission, AdmissionLimits
from lossgrad_server.batching.forming import Batch, BatchLimits, ClosedBy, InOrder, form_batch
from lossgrad_server.batching.job import Job
from lossgrad_server.batching.schedule import Pace
from lossgrad_server.errors import Cancelled, Code, DeadlinePassed, Reason, RequestError, Unavailable
from tests.server.batching import PLENTY, Answers

JOB_BYTES = 8  # of an element: four of input, four of target, and a sum as the answer


def waiting(*sizes: int) -> deque[Job]:
    """Return jobs named 0, 1, ... of so many elements each."""
    answers = Answers()
    return deque(answers.job(str(number), size) for number, size in enumerate(sizes))


def batch_of(jobs: deque[Job], limits: BatchLimits) -> Batch:
    """Return the next batch of jobs that came together, of a device whose pace is not known."""
    return form_batch(InOrder(jobs), limits, Pace())


def names(jobs: deque[Job] | list[Job]) -> list[str]:
    return [job.item.header.decode() for job in jobs]


def test_a_batch_takes_all_that_waits_in_order() -> None:
    jobs = waiting(*[3] * 20)
    batch = batch_of(jobs, BatchLimits(256, PLENTY, PLENTY))
    assert names(batch.jobs) == [str(number) for number in range(20)]
    assert not jobs
    assert (batch.element_count, batch.byte_count, batch.closed_by) == (60, 60 * JOB_BYTES, ClosedBy.IDLE)


@pytest.mark.parametrize(
    ("limits", "taken", "closed_by"),
    [
        (BatchLimits(3, PLENTY, PLENTY), 3, ClosedBy.MAX_REQUESTS),
        (BatchLimits(5, PLENTY, PLENTY), 5, ClosedBy.IDLE),
        (BatchLimits(256, 40, PLENTY), 4, ClosedBy.MAX_ELEMENTS),
        (BatchLimits(256, 39, PLENTY), 3, ClosedBy.MAX_ELEMENTS),
        (BatchLimits(256, PLENTY, 30 * JOB_BYTES), 3, ClosedBy.MAX_BYTES),
        (BatchLimits(256, PLENTY, 30 * JOB_BYTES - 1), 2, ClosedBy.MAX_BYTES),
        (BatchLimits(256, 10, PLENTY), 1, ClosedBy.ALONE),
        (BatchLimits(256, PLENTY, 10 * JOB_BYTES), 1, ClosedBy.ALONE),
        (BatchLimits(1, PLENTY, PLENTY), 1, ClosedBy.MAX_REQUESTS),
    ],
)
def test_a_cap_closes_a_batch_and_the_rest_waits_for_the_next(
    limits: BatchLimits, taken: int, closed_by: ClosedBy
) -> None:
    jobs = waiting(*[10] * 5)
    batch = batch_of(jobs, limits)
    assert names(batch.jobs) == [str(number) for number in range(taken)]
    assert names(jobs) == [str(number) for number in range(taken, 5)]
    assert batch.closed_by == closed_by


def test_a_job_over_a_cap_is_computed_alone_and_does_not_pull_small_ones_into_its_batch() -> None:
    jobs = waiting(1, 1000, 1)
    limits = BatchLimits(256, 100, PLENTY)
    batches = [batch_of(jobs, limits) for _ in range(3)]
    assert [names(batch.jobs) for batch in batches] == [["0"], ["1"], ["2"]]
    assert [batch.closed_by for batch in batches] == [ClosedBy.MAX_ELEMENTS, ClosedBy.ALONE, ClosedBy.IDLE]


def test_empty_jobs_fill_a_batch_by_their_number_only() -> None:
    batch = batch_of(waiting(*[0] * 10), BatchLimits(8, 1, 1))
    assert (len(batch.jobs), batch.closed_by) == (8, ClosedBy.MAX_REQUESTS)


def test_jobs_that_nobody_waits_for_are_dropped_and_take_no_room() -> None:
    answers = Answers()
    now = time.monotonic()
    late = answers.job("late", 10, deadline=now - 2.5)
    gone = answers.job("gone", 10)
    gone.cancelled = True
    both = answers.job("both", 10, deadline=now - 1)
    both.cancelled = True
    jobs = deque([late, answers.job("good", 10, deadline=now + 3600), gone, answers.job("other", 10), both])
    batch = batch_of(jobs, BatchLimits(2, 20, PLENTY))
    assert names(batch.jobs) == ["good", "other"]
    assert batch.closed_by == ClosedBy.IDLE
    dropped = {job.item.header.decode(): error for job, error in batch.dropped}
    assert isinstance(dropped["late"], DeadlinePassed)
    assert "passed 25" in dropped["late"].message
    assert isinstance(dropped["gone"], Cancelled)
    assert isinstance(dropped["both"], DeadlinePassed)  # gRPC cancels a call whose deadline passes: it was late


def test_the_pick_is_timed_for_every_job_of_a_batch() -> None:
    jobs = waiting(1, 1)
    before = time.perf_counter_ns()
    batch = batch_of(jobs, BatchLimits(256, PLENTY, PLENTY))
    assert all(before <= job.picked_ns <= time.perf_counter_ns() for job in batch.jobs)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["good", "late", "gone"])), max_size=30),
    st.integers(1, 6),
    st.integers(1, 60),
    st.integers(1, 60 * JOB_BYTES),
)
def test_every_job_leaves_the_queue_once_in_order_and_within_the_caps(
    jobs: list[tuple[int, str]], requests: int, elements: int, byte_count: int
) -> None:
    answers = Answers()
    queue: deque[Job] = deque()
    for number, (size, fate) in enumerate(jobs):
        job = answers.job(str(number), size, deadline=0.0 if fate == "late" else None)
        job.cancelled = fate == "gone"
        queue.append(job)
    computed: list[str] = []
    dropped: list[str] = []
    while queue:
        batch = batch_of(queue, BatchLimits(requests, elements, byte_count))
        assert batch.jobs or batch.dropped  # it always comes on
        assert len(batch.jobs) <= requests
        if len(batch.jobs) > 1:
            assert batch.element_count <= elements
            assert batch.byte_count <= byte_count
        assert batch.element_count == sum(job.plan.element_count for job in batch.jobs)
        assert batch.byte_count == sum(job.byte_count for job in batch.jobs)
        computed += names(batch.jobs)
        dropped += names([job for job, _ in batch.dropped])
    assert computed == [str(number) for number, (_, fate) in enumerate(jobs) if fate == "good"]
    assert dropped == [str(number) for number, (_, fate) in enumerate(jobs) if fate != "good"]


# ---- Admission ----


def refusal(admission: Admission, job: Job) -> RequestError:
    with pytest.raises(Unavailable) as caught:
        admission.admit(job)
    return caught.value


def test_admission_refuses_beyond_its_requests_and_says_when_to_come_back() -> None:
    admission = Admission(AdmissionLimits(2, PLENTY))
    first, second, third = waiting(1, 1, 1)
    admission.admit(first)
    admission.admit(second)
    error = refusal(admission, third)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.QUEUE_FULL)
    assert "holds 2 requests, its limit is 2" in error.message
    assert error.retry_after_seconds
    admission.release(first)
    admission.admit(third)
    assert (admission.requests, admission.bytes, admission.total) == (2, 2 * JOB_BYTES, 3)


def test_admission_refuses_beyond_its_bytes_with_both_values() -> None:
    admission = Admission(AdmissionLimits(10, 100))
    first, second, small = waiting(10, 4, 2)
    admission.admit(first)
    error = refusal(admission, second)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.QUEUE_BYTES_FULL)
    assert "needs 32 bytes, 80 of the server's 100 are taken" in error.message
    assert error.retry_after_seconds
    admission.admit(small)
    assert admission.bytes == 96


def test_a_giant_is_admitted_when_nothing_else_is_inside_and_holds_everyone_else_off() -> None:
    admission = Admission(AdmissionLimits(10, 100))
    giant, small = waiting(1000, 1)
    admission.admit(giant)
    assert refusal(admission, small).reason == Reason.QUEUE_BYTES_FULL
    admission.release(giant)
    admission.admit(small)
    assert refusal(admission, giant).reason == Reason.QUEUE_BYTES_FULL
    assert (admission.requests, admission.bytes) == (1, JOB_BYTES)


def test_refusals_are_logged_once_in_ten_seconds_however_often_they_begin_and_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    admission = Admission(AdmissionLimits(1, PLENTY), lambda: now[0])
    first, second = waiting(1, 1)
    for seconds in (0.0, 0.0, 9.9):
        admission.admit(first)
        now[0] += seconds
        refusal(admission, second)
        admission.release(first)
        assert len(caplog.records) == 1
    now[0] += 0.2
    admission.admit(first)
    refusal(admission, second)
    assert len(caplog.records) == 2
