"""Requests that are counted together, because all that metrics tell apart is equal in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossgrad_server.batching.job import Computed
from lossgrad_server.metrics import Metrics

if TYPE_CHECKING:
    from lossgrad_server.transport.pipeline import PendingRequest


def count_alike(metrics: Metrics, request: PendingRequest, computed: Computed, now_ns: int, times: int) -> None:
    """Count so many requests, all as this one, as answered now; and where the time went: the stages add up to it.

    The batch has counted its own stages.
    """
    batch = computed.batch
    picked_ns = request.queued_ns + computed.queue_ns
    ran_ns = batch.pack_ns + batch.compute_ns + batch.unpack_ns
    # What the worker does not account for is waiting too: for another batch on the device, between the pieces of a job.
    done_ns = max(batch.done_ns, picked_ns + ran_ns)
    metrics.stage("decode", request.queued_ns - request.started_ns, times)
    metrics.stage("queue", done_ns - ran_ns - request.queued_ns, times)
    metrics.stage("encode", now_ns - done_ns, times)
    seconds = (now_ns - request.started_ns) * 1e-9
    plan = request.plan
    metrics.of_request(plan, request.api).done(seconds, plan.element_count, times)
