"""A nursery whose processes fail at requests of certain numbers of elements: for tests, in place of the server's own.

The failures are real: the process exits, gets a segmentation fault, sleeps for ever, or has a device that is lost for good.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Sequence

from lossgrad_server.engine.cpu_worker import CpuWorker
from lossgrad_server.isolation import nursery
from lossgrad_server.jobs import unpack_header
from lossgrad_server.work import BatchResult, DeviceWorker, Done, FailureKind, Pending, Retry, WorkFailure, WorkItem

EXITS_AT = 10_013
FAULTS_AT = 10_017
HANGS_AT = 10_019
LOSES_DEVICE_AT = 10_023
IS_SLOW_AT = 10_029
IS_SPLIT_AT = 10_037
SLOW_SECONDS = 0.2
PROGRAM = ("-m", "tests.server.isolation.failing_nursery")


class FailingWorker(CpuWorker):
    """The CPU's worker, with requests that are its end."""

    _has_lost = False

    @property
    def is_lost(self) -> bool:
        return self._has_lost

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        counts = {unpack_header(item.header).element_count for item in items}
        if EXITS_AT in counts:
            os._exit(7)
        if FAULTS_AT in counts:
            ctypes.string_at(8)
        if HANGS_AT in counts:
            time.sleep(600)
        if IS_SLOW_AT in counts:
            time.sleep(SLOW_SECONDS)
        self._has_lost |= LOSES_DEVICE_AT in counts
        if self._has_lost:
            failed = WorkFailure(FailureKind.DEVICE_LOST, "the device cpu failed while it held this request")
            return Done(BatchResult([failed] * len(items), 0, 0, 0))
        if IS_SPLIT_AT in counts:
            retries = (Retry.OUT_OF_MEMORY, Retry.ERROR, Retry.OUT_OF_MEMORY)
            return Done(dataclasses.replace(self.run(items), retries=retries))
        return super().submit(items)


def create(options: argparse.Namespace) -> FailingWorker:
    return FailingWorker(options.threads or 1)


def memory(worker: DeviceWorker) -> dict[str, int]:
    """Return what a GPU's worker would tell; more at each time."""
    told = next(_TOLD)
    return {"allocated": told, "reserved": 2 * told, "pinned": 3}


_TOLD = itertools.count(1)

if __name__ == "__main__":
    sys.exit(nursery.main(create=create, tell_memory=memory))
