"""Requests that are counted together, because all that metrics tell apart is equal in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossgrad_server.batching.job import Computed

if TYPE_CHECKING:
    from lossgrad_server.transport.pipeline import PendingRequest


class AlikeRequests:
    """Answered requests that are equal in all that metrics tell apart."""

    __slots__ = ("api", "nonfinite", "plan", "queue_ns", "started_ns", "times")

    def __init__(self, request: PendingRequest, computed: Computed) -> None:
        self.plan = request.plan
        self.api = request.api
        self.started_ns = request.started_ns
        self.queue_ns = computed.queue_ns
        self.times = self.nonfinite = 0

    def takes(self, request: PendingRequest, computed: Computed) -> bool:
        """Whether a request is another of these."""
        return (
            request.plan is self.plan
            and request.started_ns == self.started_ns
            and computed.queue_ns == self.queue_ns
            and request.api == self.api
        )
