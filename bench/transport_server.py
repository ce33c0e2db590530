"""lossgrad-server for bench.transport: with a probe in its event loop, or without computing anything.

`python -m bench.transport_server [--probe] [--no-computing] -- FLAGS` takes lossgrad-server's flags. Without computing, the
answers have the right sizes and arbitrary values: what is left is what the transport costs by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.transport_probe import with_probe
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server.config import from_command_line
from lossgrad_server.jobs import JobPlan, unpack_header
from lossgrad_server.work import SPEC_RESULT, BatchResult, DeviceWorker, Done, Pending, WorkItem, WorkResult


class IdleWorker:
    """Answers every item with memory of the right sizes. Implements lossgrad_server.work.DeviceWorker."""

    device = "cpu"
    slots = 1
    inline_work = 1 << 16  # as the CPU's worker
    is_lost = False

    def is_large(self, plan: JobPlan) -> bool:
        """Return False: nothing takes long."""
        return False

    def warm_up(self) -> None:
        """Do nothing."""

    def submit(self, items: Sequence[WorkItem]) -> Pending:
        """Return an answer for each item."""
        return Done(BatchResult([_answer(item) for item in items], 0, 0, 0))

    def close(self) -> None:
        """Do nothing."""


def _answer(item: WorkItem) -> WorkResult:
    plan = unpack_header(item.header)
    scalars = SPEC_RESULT.pack(0.0, plan.element_count, float(plan.element_count), 0) * len(plan.specs)
    wanted = item.destinations or (None,) * len(plan.outputs)
    return WorkResult(
        scalars,
        tuple(
            np.empty(output.tensor.byte_count, np.uint8).data if destination is None else destination
            for output, destination in zip(plan.outputs, wanted, strict=True)
        ),
    )


def main() -> None:
    """Serve as lossgrad-server does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probe", action="store_true", help="report the event loop's lag on SIGUSR1")
    parser.add_argument("--no-computing", action="store_true", help="answer at once, with arbitrary values")
    parser.add_argument("flags", nargs="*", help="lossgrad-server's flags")
    arguments = parser.parse_args()
    config = from_command_line(arguments.flags)
    logging.basicConfig(level=config.log_level.upper())
    keep_large_blocks()
    from lossgrad_server import app, engine

    if arguments.no_computing:

        def create_worker(*arguments: Any, **options: Any) -> DeviceWorker:
            return IdleWorker()

        engine.create_worker = create_worker
    serving = app.run(config)
    asyncio.run(with_probe(serving) if arguments.probe else serving)


if __name__ == "__main__":
    main()
