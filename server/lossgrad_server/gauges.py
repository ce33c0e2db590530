"""The gauges that are read anew at every scrape: the queue with its limits, the device's memory, shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lossgrad_server.batching.forming import Batch
from lossgrad_server.batching.line import Priority
from lossgrad_server.batching.waiting import QueueSummary


class QueueState(Protocol):
    """What the gauges read at every scrape: the batcher."""

    def waiting(self, priority: Priority) -> QueueSummary:
        """Return what waits with a priority."""

    @property
    def admitted_requests(self) -> int:
        """How many jobs are inside."""

    @property
    def admitted_bytes(self) -> int:
        """The bytes of all jobs inside."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the queue and the batches."""

    queue_requests: float = math.inf
    queue_bytes: float = math.inf
    batch_requests: float = math.inf
    batch_elements: float = math.inf
    batch_bytes: float = math.inf

    def fill_of(self, batch: Batch) -> float:
        """Return how full a batch is, by the cap that it came nearest to. Above 1: one job that exceeds a cap by itself."""
        return max(
            len(batch.jobs) / self.batch_requests,
            batch.element_count / self.batch_elements,
            batch.byte_count / self.batch_bytes,
        )


class QueueCollector(Collector):
    """The queue, what bounds it, and how busy the device is."""

    def __init__(self, queue: QueueState, utilization: Callable[[], float], limits: Limits, device: str) -> None:
        self._limits = limits
        self._queue = queue
        self._utilization = utilization
        self._device = device

    def collect(self) -> list[GaugeMetricFamily]:
        """Read it."""
        gauges = (
            (
                "lossgrad_inflight_bytes",
                "Bytes of all requests inside and their answers.",
                self._queue.admitted_bytes,
            ),
            (
                "lossgrad_queue_limit_bytes",
                "The most bytes that may be inside: --max-queued-bytes.",
                self._limits.queue_bytes,
            ),
            (
                "lossgrad_queue_limit_requests",
                "The most requests that may be inside: --max-queued-requests.",
                self._limits.queue_requests,
            ),
            (
                "lossgrad_inflight_requests",
                "Requests inside: waiting, running, or on their way back.",
                self._queue.admitted_requests,
            ),
            (
                "lossgrad_batch_cap_requests",
                "The most requests in a batch: --max-batch-requests.",
                self._limits.batch_requests,
            ),
            (
                "lossgrad_batch_cap_elements",
                "The most elements in a batch: --max-batch-elements.",
                self._limits.batch_elements,
            ),
            (
                "lossgrad_batch_cap_bytes",
                "The most bytes in a batch, answers included: --max-batch-bytes.",
                self._limits.batch_bytes,
            ),
            (
                "lossgrad_device_utilization_ratio",
                "Share of the last ten seconds that the device was busy.",
                self._utilization(),
            ),
        )
        families = self._waiting()
        for name, documentation, value in gauges:
            family = GaugeMetricFamily(name, documentation, labels=("device",))
            family.add_metric((self._device,), value)
            families.append(family)
        return families

    def _waiting(self) -> list[GaugeMetricFamily]:
        """Return what waits, by priority."""
        labels = ("device", "priority")
        requests = GaugeMetricFamily("lossgrad_queue_requests", "Requests that wait to be picked.", labels=labels)
        sizes = GaugeMetricFamily(
            "lossgrad_queue_bytes", "Bytes of the requests that wait and of their answers.", labels=labels
        )
        ages = GaugeMetricFamily(
            "lossgrad_queue_oldest_seconds",
            "How long the request that has waited longest has waited; 0 where none waits.",
            labels=labels,
        )
        for priority in Priority:
            waiting = self._queue.waiting(priority)
            for family, value in zip((requests, sizes, ages), waiting, strict=True):
                family.add_metric((self._device, priority), value)
        return [requests, sizes, ages]


class DeviceMemoryCollector(Collector):
    """The memory of a device."""

    def __init__(self, memory: Callable[[], Mapping[str, int]], device: str) -> None:
        self._memory = memory
        self._device = device

    def collect(self) -> list[GaugeMetricFamily]:
        """Read it."""
        family = GaugeMetricFamily(
            "lossgrad_device_memory_bytes", "The device's memory, by what it is.", labels=("device", "kind")
        )
        for kind, byte_count in self._memory().items():
            family.add_metric((self._device, kind), byte_count)
        return [family]


class SharedMemoryCollector(Collector):
    """What is shared with callers."""

    def __init__(self, state: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        self._state = state

    def collect(self) -> list[GaugeMetricFamily]:
        """Read it."""
        regions = GaugeMetricFamily("lossgrad_shm_regions", "Regions of shared memory.", labels=("kind",))
        sizes = GaugeMetricFamily("lossgrad_shm_bytes", "Bytes of shared memory.", labels=("kind",))
        for kind, count, byte_count in self._state():
            regions.add_metric((kind,), count)
            sizes.add_metric((kind,), byte_count)
        return [regions, sizes]
