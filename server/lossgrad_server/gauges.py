"""The gauges that are read anew at every scrape: the queue with its limits, the device's memory, shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lossgrad_server.batching.forming import Batch


class QueueState(Protocol):
    """What the gauges read at every scrape: the batcher."""

    @property
    def waiting_requests(self) -> int:
        """How many jobs wait to be picked."""

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the jobs that wait."""

    @property
    def admitted_requests(self) -> int:
        """How many jobs are inside."""

    @property
    def admitted_bytes(self) -> int:
        """The bytes of all jobs inside."""

    @property
    def oldest_wait_seconds(self) -> float:
        """How long the job that has waited longest has waited."""


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
            ("lossgrad_queue_requests", "Requests that wait to be picked.", self._queue.waiting_requests),
            (
                "lossgrad_queue_bytes",
                "Bytes of those requests and their answers.",
                self._queue.waiting_bytes,
            ),
            (
                "lossgrad_queue_oldest_seconds",
                "How long the request that has waited longest has waited; 0 where none waits.",
                self._queue.oldest_wait_seconds,
            ),
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
                "lossgrad_device_utilization_ratio",
                "Share of the last ten seconds that the device was busy.",
                self._utilization(),
            ),
        )
        families: list[GaugeMetricFamily] = []
        for name, documentation, value in gauges:
            family = GaugeMetricFamily(name, documentation, labels=("device",))
            family.add_metric((self._device,), value)
            families.append(family)
        return families


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
