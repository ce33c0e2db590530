"""A batcher whose worker is being replaced: it refuses at once, with an error of its own for each job, and then goes on."""

from __future__ import annotations

from lossgrad_server.errors import Code, Reason, RequestError, Unavailable
from lossgrad_server.work import FailureKind, WorkFailure
from tests.server.batching import PATIENCE_SECONDS, Answers, FakeWorker, batcher


def restarting() -> RequestError:
    return Unavailable("another is starting", reason=Reason.WORKER_RESTARTING, retry_after_seconds=0.25)


def test_what_waits_and_what_comes_is_refused_until_it_resumes_and_what_runs_is_answered() -> None:
    worker, answers = FakeWorker(), Answers()
    one = batcher(worker)
    one.start()
    one.wait_until_warm()
    worker.hold()
    assert one.submit([answers.job("running")]) == []
    worker.wait_for_batch()
    assert one.submit([answers.job("waits"), answers.job("waits too")]) == []
    one.suspend(restarting)
    answers.wait_for(2)
    (first, second) = (answers.error(name) for name in ("waits", "waits too"))
    assert first is not second  # a transport adds to the one that it sends
    assert (first.code, first.reason) == (Code.UNAVAILABLE, Reason.WORKER_RESTARTING)
    assert first.retry_after_seconds == 0.25
    ((_, refused),) = one.submit([answers.job("comes")])
    assert refused.reason == Reason.WORKER_RESTARTING
    worker.release()
    answers.wait_for(1)
    assert answers.computed("running").result.scalars == b"running"
    assert one.admitted_requests == 0
    one.resume()
    assert one.submit([answers.job("later")]) == []
    answers.wait_for(1)
    assert answers.computed("later").result.scalars == b"later"
    one.close(PATIENCE_SECONDS)


def test_a_request_that_crashes_its_worker_is_internal_and_not_to_be_tried_again() -> None:
    worker, answers = FakeWorker(), Answers()
    worker.outcome = lambda _: WorkFailure(FailureKind.WORKER_CRASHED, "it died of this, twice")
    one = batcher(worker)
    one.start()
    one.wait_until_warm()
    assert one.submit([answers.job("poison")]) == []
    answers.wait_for(1)
    error = answers.error("poison")
    assert (error.code, error.reason, error.retry_after_seconds) == (Code.INTERNAL, Reason.WORKER_CRASHED, None)
    assert error.message == "it died of this, twice"
    one.close(PATIENCE_SECONDS)
