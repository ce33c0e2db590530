"""The CUDA worker in a process of its own: several batches under way, large ones in pieces; a simulated device."""

from __future__ import annotations

import pytest

from tests.server.engine.cuda_simulation import needs_interpreter  # isort: skip

from lossgrad_server.isolation.keeper import ProcessSettings
from lossgrad_server.isolation.memory import why_impossible
from lossgrad_server.isolation.worker import IsolatedWorker
from tests.server.engine.cuda_building import jobs_of_every_path, make_worker, outcome_bytes
from tests.server.isolation.simulated_nursery import PROGRAM

pytestmark = [needs_interpreter, pytest.mark.skipif(bool(why_impossible()), reason=why_impossible() or "possible")]


def test_batches_under_way_together_have_the_bits_of_the_thread_s_worker() -> None:
    jobs = jobs_of_every_path()
    thread_worker = make_worker()
    expected = [outcome_bytes(outcome) for outcome in thread_worker.run([one.item for one in jobs]).outcomes]
    worker = IsolatedWorker(ProcessSettings("cuda:7", 1, "fused", "warning", program=PROGRAM), 60.0)
    try:
        worker.warm_up()
        assert (worker.device, worker.facts.gpu_uuid, worker.facts.determinism) == ("cuda:7", "GPU-0", "simulated")
        assert worker.slots == thread_worker.slots + 1
        assert [worker.is_large(one.plan) for one in jobs] == [thread_worker.is_large(one.plan) for one in jobs]
        under_way = [worker.submit([one.item for one in jobs[start::3]]) for start in range(3)]
        under_way.append(worker.submit([jobs[0].item, jobs[1].item]))
        while sum(one.advance() for one in under_way):  # each, every time
            pass
        results = [one.result().outcomes for one in under_way]
        for start in range(3):
            assert [outcome_bytes(outcome) for outcome in results[start]] == expected[start::3]
        assert [outcome_bytes(outcome) for outcome in results[3]] == expected[:2]
    finally:
        worker.close()
