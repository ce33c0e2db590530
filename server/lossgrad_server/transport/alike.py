"""Requests that are counted together, because all that metrics tell apart is equal in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossgrad_server.batching.job import Computed
from lossgrad_server.metrics import Metrics

if TYPE_CHECKING:
    from lossgrad_server.transport.pipeline import PendingRequest


class AlikeRequests:
    """Answered requests that are equal in all that metrics tell apart."""

    __slots__ = ("_api", "_computed", "_plan", "_queued_ns", "_started_ns", "nonfinite", "times")

    def __init__(self, request: PendingRequest, computed: Computed) -> None:
        self._plan = request.plan
        self._api = request.api
        self._started_ns = request.started_ns
        self._queued_ns = request.queued_ns
        self._computed = computed
        self.times = self.nonfinite = 0

    def takes(self, request: PendingRequest, computed: Computed) -> bool:
        """Whether a request is another of these."""
        return (
            request.plan is self._plan
            and computed.batch is self._computed.batch
            and request.started_ns == self._started_ns
            and request.queued_ns == self._queued_ns
            and request.api == self._api
        )

    def count(self, metrics: Metrics, now_ns: int) -> None:
        """Count them as answered now, and where the time went: the stages, with the batch's own, add up to the duration."""
        queue_ns, batch = self._computed.queue_ns, self._computed.batch
        picked_ns = self._queued_ns + queue_ns
        ran_ns = batch.pack_ns + batch.compute_ns + batch.unpack_ns
        # What the worker does not account for is waiting too: for another batch on the device, between the pieces of a job.
        done_ns = max(batch.done_ns, picked_ns + ran_ns)
        metrics.stage("decode", self._queued_ns - self._started_ns, self.times)
        metrics.stage("queue", done_ns - ran_ns - self._queued_ns, self.times)
        metrics.stage("encode", now_ns - done_ns, self.times)
        seconds = (now_ns - self._started_ns) * 1e-9
        plan = self._plan
        metrics.of_request(plan, self._api).done(seconds, plan.element_count, self.times, self.nonfinite)
