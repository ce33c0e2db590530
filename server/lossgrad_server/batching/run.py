"""A batch that the worker has been given."""

from __future__ import annotations

import itertools

from lossgrad_server.batching.forming import Batch
from lossgrad_server.work import Pending


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
