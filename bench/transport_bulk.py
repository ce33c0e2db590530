"""Large calls from a process of their own, so that they share neither the GIL nor the allocator with what is measured.

Each line of standard input is a task in JSON, the fields of `Task`; answered with "started" once a call has been answered,
and at its end with a line of JSON, the fields of `Done`. Ends with its standard input.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from bench import transport_messages as messages
from bench.transport_loads import CHANNEL_OPTIONS
from lossgrad_api import codec
from lossgrad_api.allocator import keep_large_blocks, release_free_memory

# As the server tells refused callers.
_RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Task:
    """Call `target` from so many threads for so long, at least `least_calls` times from each."""

    target: str
    tensor_bytes: int
    callers: int
    seconds: float
    least_calls: int = 1


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a task. `refused` calls, which found the server's queue full, were made again."""

    calls: int
    refused: int
    seconds: float


def run(task: Task, on_started: Callable[[], None]) -> Done:
    """Do a task."""
    request = messages.request(task.tensor_bytes)
    counts: list[tuple[int, int]] = []
    errors: list[Exception] = []
    started = threading.Event()

    def work(call: Any, end: float) -> None:
        calls = refused = 0
        while calls < task.least_calls or time.perf_counter() < end:
            try:
                call(request, timeout=300.0)
                calls += 1
                started.set()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    errors.append(error)
                    started.set()
                    return
                refused += 1
                time.sleep(_RETRY_SECONDS)
        counts.append((calls, refused))

    with grpc.insecure_channel(task.target, options=CHANNEL_OPTIONS) as channel:
        call: Any = channel.unary_unary(codec.COMPUTE_LOSS)
        begin = time.perf_counter()
        threads = [
            threading.Thread(target=work, args=(call, begin + task.seconds), daemon=True) for _ in range(task.callers)
        ]
        for thread in threads:
            thread.start()
        started.wait(300.0)
        on_started()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
    if errors:
        raise errors[0]
    release_free_memory()
    return Done(sum(calls for calls, _ in counts), sum(refused for _, refused in counts), seconds)


def main() -> None:
    """Do the tasks that come."""
    keep_large_blocks()
    for line in sys.stdin:
        done = run(Task(**json.loads(line)), lambda: print("started", flush=True))
        print(json.dumps(dataclasses.asdict(done)), flush=True)


if __name__ == "__main__":
    main()
