"""A batch that the worker has been given, and who watches batches."""

from __future__ import annotations

import itertools
from typing import Protocol

from lossgrad_server.batching.forming import Batch
from lossgrad_server.work import BatchResult, Pending


class BatchObserver(Protocol):
    """What watches the batcher: metrics.py. Called from the batcher's thread, once per batch."""

    def batch_done(self, batch: Batch, result: BatchResult, busy_ns: int) -> None:
        """Take note of a batch that ran; the device was busy with it for `busy_ns`."""


class Run:
    """A batch under way. `pending` is there once the worker has taken it."""

    __slots__ = ("batch", "is_large", "number", "pending", "started_ns")

    pending: Pending
    _numbers = itertools.count(1)

    def __init__(self, batch: Batch, started_ns: int, is_large: bool) -> None:
        self.batch = batch
        self.started_ns = started_ns
        self.is_large = is_large
        self.number = next(self._numbers)
