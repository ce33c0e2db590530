"""`lossgrad evaluate --workers N`: the slices of a data set shared among processes, each with its own connections.

This process hands out blocks of slices, merges what comes back, and alone writes the checkpoint; a worker evaluates a block
and returns its exact totals. So nothing depends on the number of workers, and a checkpoint can be gone on from with another.
A worker ends when its pipe does: with this process, however that ends.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Final

from lossgrad.accumulation import Accumulation
from lossgrad.checkpoint import CheckpointFile, DoneBatches, SavedState
from lossgrad.cli.evaluation_task import EvaluationTask, connect, evaluate_part
from lossgrad.errors import ServerError
from lossgrad.evaluating import DEFAULT_PATIENCE_SECONDS
from lossgrad.progress import OnProgress, Progress
from lossgrad.report import BatchError, BatchResult, EvaluationReport, EvaluationServer, Throughput

# A worker waits for its last answers at the end of a block, so blocks are not small; what a crash loses is one for each.
_BLOCK_SLICES: Final = 24
_PROGRESS_SECONDS: Final = 0.1


@dataclass
class _State:
    """What has been done so far, by all workers and in the run before."""

    accumulation: Accumulation
    done: DoneBatches
    batches: list[BatchResult]
    resumed: int = 0
    errors: list[BatchError] = field(default_factory=list)
    servers: tuple[EvaluationServer, ...] = ()
    slices: int = 0
    elements: int = 0
    bytes: int = 0

    def add(self, start: int, report: EvaluationReport) -> None:
        """Count in a block."""
        self.accumulation = self.accumulation.merge(report.accumulation)
        failed = {start + error.index for error in report.errors}
        length = (report.throughput.batch_count if report.throughput else 0) + len(failed)
        for index in range(start, start + length):
            if index not in failed:
                self.done.add(index)
        self.batches += [replace(batch, index=start + batch.index) for batch in report.batches]
        self.errors += [replace(error, index=start + error.index) for error in report.errors]
        self.servers = report.servers or self.servers
        if report.throughput is not None:
            self.slices += report.throughput.slice_count
            self.elements += report.throughput.element_count
            self.bytes += report.throughput.byte_count


def evaluate_with_workers(
    task: EvaluationTask,
    count: int,
    slice_count: int,
    *,
    saved: SavedState | None,
    file: CheckpointFile | None,
    on_progress: OnProgress | None,
) -> EvaluationReport:
    """Evaluate all slices that are not done with `count` processes. Raises what a worker raises."""
    state = _State(Accumulation(task.losses), DoneBatches(), [])
    if saved is not None:
        state = _State(saved.accumulation, saved.done, saved.batches or [], resumed=len(saved.done))
    start = time.perf_counter()

    def progress(now: dict[int, Progress], *, finished: bool = False) -> None:
        if on_progress is None:
            return
        on_progress(
            Progress(
                batch_count=len(state.done) + sum(each.batch_count for each in now.values()),
                total_batches=slice_count,
                failed_batch_count=len(state.errors),
                element_count=state.elements + sum(each.element_count for each in now.values()),
                byte_count=state.bytes + sum(each.byte_count for each in now.values()),
                seconds=time.perf_counter() - start,
                resumed_batch_count=state.resumed,
                is_finished=finished,
            )
        )

    def save() -> None:
        if file is not None and len(state.done) > state.resumed:
            file.write(state.accumulation, state.done, state.batches)

    try:
        with _Pool(task, count) as pool:
            for first, report in pool.evaluate(_blocks(state.done, slice_count), progress):
                state.add(first, report)
                if file is not None and file.is_due:
                    save()
    finally:
        save()
    progress({}, finished=True)
    return EvaluationReport(
        state.accumulation,
        batches=tuple(sorted(state.batches, key=lambda batch: batch.index)),
        errors=tuple(sorted(state.errors, key=lambda error: error.index)),
        throughput=Throughput(
            time.perf_counter() - start,
            len(state.done) - state.resumed,
            state.slices,
            state.elements,
            state.bytes,
        ),
        resumed_batch_count=state.resumed,
        servers=state.servers,
    )


def _blocks(done: DoneBatches, slice_count: int) -> Iterator[range]:
    """Give what is not done, in blocks."""
    position = 0
    for start, stop in [*done.ranges(), (slice_count, slice_count)]:
        for first in range(position, start, _BLOCK_SLICES):
            yield range(first, min(start, first + _BLOCK_SLICES))
        position = stop


class _Pool:
    """The worker processes, each at one end of a pipe."""

    def __init__(self, task: EvaluationTask, count: int) -> None:
        # Not forked: gRPC does not survive that, and a fork would take this process' memory along.
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        self._task = task
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, task), name="lossgrad evaluate", daemon=True)
            # Blocked while it starts, and from then on in the worker: ctrl-C reaches the whole group, and one that is still
            # importing would write a traceback. The parent gets it as soon as it is unblocked.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                worker.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
            self._workers.append((worker, ours))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *ending: object) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()

    def evaluate(
        self, blocks: Iterator[range], progress: Callable[[dict[int, Progress]], None]
    ) -> Iterator[tuple[int, EvaluationReport]]:
        """Hand out the blocks; give each one's first slice and report, in any order."""
        numbers: dict[Any, int] = {pipe: number for number, (_, pipe) in enumerate(self._workers)}
        under_way: dict[int, range] = {}
        now: dict[int, Progress] = {}
        waiting = deque(blocks)
        for number in numbers.values():
            self._hand_out(number, waiting, under_way)
        while under_way:
            for pipe in multiprocessing.connection.wait(list(numbers)):
                number = numbers[pipe]
                try:
                    message = self._workers[number][1].recv()
                except (EOFError, OSError):
                    raise self._died(number) from None
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Progress):
                    now[number] = message
                else:
                    now.pop(number, None)
                    yield under_way.pop(number).start, message
                    self._hand_out(number, waiting, under_way)
            progress(now)

    def _hand_out(self, number: int, waiting: deque[range], under_way: dict[int, range]) -> None:
        if waiting:
            under_way[number] = waiting.popleft()
            try:
                self._workers[number][1].send(under_way[number])
            except OSError:
                raise self._died(number) from None

    def _died(self, number: int) -> ServerError:
        worker = self._workers[number][0]
        worker.join(5)
        return ServerError(
            f"worker process {number + 1} of {len(self._workers)} ended with code {worker.exitcode}; if the machine is "
            "short of memory, use fewer --workers"
        )


def _work(pipe: Connection, task: EvaluationTask) -> None:
    """Evaluate blocks until the pipe ends. What goes wrong is sent; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent ends its workers
    try:
        with task.open_data() as data, connect(task) as client:
            gradients = task.gradient_files(data)
            if gradients is not None:
                gradients.reopen()
            patience = task.options.patience
            while True:
                block = pipe.recv()
                sender = _ProgressSender(pipe)
                pipe.send(evaluate_part(client, task, data, block, gradients, patience=patience, progress=sender))
                if patience is None:  # for the first connection; from here on the server has been there
                    patience = DEFAULT_PATIENCE_SECONDS
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has gone, or needs no more
    except Exception as error:
        pipe.send(error)


class _ProgressSender:
    """Sends how far a block is, now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._next_at = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, progress: Progress) -> None:
        """Send it, unless that was done a moment ago, or the block's report comes next."""
        now = time.monotonic()
        if now >= self._next_at and not progress.is_finished:
            self._next_at = now + _PROGRESS_SECONDS
            self._pipe.send(progress)
