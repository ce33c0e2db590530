"""`evaluate` as a method of both clients: its arguments and documentation, and its loop. What it does: evaluation.py."""

# ruff: noqa: ASYNC109 - the timeout is not the whole call's
from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, Self

from lossgrad.batches import Selector, count_of, enumerate_batches
from lossgrad.calls import Losses, deadline_seconds
from lossgrad.channel import ChannelSettings
from lossgrad.checkpoint import Checkpoint
from lossgrad.errors import DeadlineExceeded, LossgradError, Unavailable
from lossgrad.evaluation import Evaluation, EvaluationOptions, OnError
from lossgrad.exchange import backoff_seconds
from lossgrad.losses import SmoothL1
from lossgrad.progress import OnProgress
from lossgrad.report import BatchResult, EvaluationReport, EvaluationServer
from lossgrad.results import ServerInfo
from lossgrad.slice_window import SliceWindow
from lossgrad.task_lanes import TaskLanes
from lossgrad.thread_lanes import ThreadLanes

DEFAULT_IN_FLIGHT_BYTES: Final = 64 * 1024 * 1024
DEFAULT_SLICE_BYTES: Final = 4 * 1024 * 1024
DEFAULT_PATIENCE_SECONDS: Final = 60.0
_SMOOTH_L1: Final = SmoothL1()
# A batch that took longer than this to come: do not wait for more of them to fill a message.
_SLOW_PULL_SECONDS: Final = 0.001


class EvaluateMethods:
    """What LossClient has for whole data sets."""

    _settings: ChannelSettings

    @abstractmethod
    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server what it is."""

    @abstractmethod
    def _open_stream(self, messages: Iterator[bytes], *, bulk: bool = False) -> Any:
        """Open a StreamComputeLoss call. `bulk`: the requests of others go first."""

    @abstractmethod
    def _at(self, target: str) -> Self:
        """Return a client like this one of another server, not connected yet."""

    @abstractmethod
    def close(self) -> None:
        """End the connection."""

    def evaluate(
        self,
        batches: Iterable[Any],
        losses: Losses = _SMOOTH_L1,
        *,
        input: Selector | None = None,
        target: Selector | None = None,
        weight: Selector | None = None,
        mask: Selector | None = None,
        group: Selector | None = None,
        allow_broadcast: bool = False,
        element_count: int | None = None,
        per_batch: bool = False,
        on_batch: Callable[[BatchResult], None] | None = None,
        on_error: OnError = "raise",
        progress: bool | OnProgress = False,
        checkpoint: str | Path | Checkpoint | None = None,
        endpoints: Sequence[str] | None = None,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        timeout: float | None = None,
        patience: float | None = None,
        bulk: bool = True,
    ) -> EvaluationReport:
        """Compute losses over a whole data set, exactly, and return the report. docs/evaluation.md has the long version.

        A batch is (input, target), (input, target, {"weight": ..., "mask": ..., "group": ...}), or a mapping with these
        names as keys; `input`, `target`, `weight`, `mask` and `group` say where else they are, each as a key, an index
        or a function of the batch. A group is a text or number for the batch, or one for each of its rows. Losses have
        reduction "mean" or "sum"; those with gradient=True give each batch's gradient to `on_batch`, for which a mean
        needs `element_count` or its own denominator.

        `batches` is read in the caller's thread, about `in_flight_bytes` ahead; batches above `slice_bytes` are cut.
        `endpoints` are gRPC targets to share the work among, in the place of the client's own. A connection from which
        nothing comes for `timeout` seconds (the client's timeout) counts as broken; what is unanswered is sent again,
        until nothing has worked for `patience` seconds (60). Servers that cannot be reached at the start are an error at
        once, or waited for where `patience` is given. With on_error="collect" a batch that cannot be evaluated is left
        out and listed in the report. `checkpoint` is a file to write now and then, and to go on from. The requests of
        other callers go first, unless `bulk` is False.
        Raises LossgradError; what the callables raise passes through.
        """
        options = EvaluationOptions(
            input=input,
            target=target,
            weight=weight,
            mask=mask,
            group=group,
            allow_broadcast=allow_broadcast,
            element_count=element_count,
            per_batch=per_batch,
            on_batch=on_batch,
            on_error=on_error,
            progress=progress,
            checkpoint=checkpoint,
            slice_bytes=slice_bytes,
        )
        evaluation = Evaluation(losses, options)
        evaluation.expect(count_of(batches))
        numbered = enumerate_batches(batches, evaluation.is_done)
        lanes: ThreadLanes | None = None
        with ExitStack() as stack:
            # A checkpoint is written whatever ends this, and after all else.
            stack.callback(evaluation.save)
            start = time.perf_counter()
            for index, batch in numbered:
                is_slow = time.perf_counter() - start > _SLOW_PULL_SECONDS
                if (
                    lanes is None
                ):  # not before the first batch: data loaders fork, and had better do so before gRPC has threads
                    lanes = self._lanes(evaluation, endpoints, in_flight_bytes, timeout, patience, bulk, stack)
                for request in evaluation.slices(index, batch):
                    lanes.send(request)
                lanes.poll(flush=is_slow)
                start = time.perf_counter()
            if lanes is not None:
                lanes.drain()
        return evaluation.report()

    def _lanes(
        self,
        evaluation: Evaluation,
        endpoints: Sequence[str] | None,
        in_flight_bytes: int,
        timeout: float | None,
        patience: float | None,
        bulk: bool,
        stack: ExitStack,
    ) -> ThreadLanes:
        """Connect to the servers; return the lanes to them, closed with the stack."""
        clients: list[EvaluateMethods] = [self]
        if endpoints is not None:
            clients = [self._at(each) for each in check_endpoints(endpoints)]
            for client in clients:
                stack.callback(client.close)
        waiting = _FirstConnection(patience)
        infos = [_info_of(client, waiting) for client in clients]
        evaluation.connect(*_described(clients, infos))
        window = window_for(clients, infos, in_flight_bytes, timeout, patience)
        targets = [client._settings.target for client in clients]
        lanes = ThreadLanes(window, [partial(client._open_stream, bulk=bulk) for client in clients], targets)
        stack.callback(lanes.close)
        return lanes


class AsyncEvaluateMethods:
    """What AsyncLossClient has for whole data sets."""

    _settings: ChannelSettings

    @abstractmethod
    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server what it is."""

    @abstractmethod
    def _open_stream(self, *, bulk: bool = False) -> Any:
        """Open a StreamComputeLoss call. `bulk`: the requests of others go first."""

    @abstractmethod
    def _at(self, target: str) -> Self:
        """Return a client like this one of another server, not connected yet."""

    @abstractmethod
    async def close(self) -> None:
        """End the connection."""

    async def evaluate(
        self,
        batches: Iterable[Any] | AsyncIterable[Any],
        losses: Losses = _SMOOTH_L1,
        *,
        input: Selector | None = None,
        target: Selector | None = None,
        weight: Selector | None = None,
        mask: Selector | None = None,
        group: Selector | None = None,
        allow_broadcast: bool = False,
        element_count: int | None = None,
        per_batch: bool = False,
        on_batch: Callable[[BatchResult], None] | None = None,
        on_error: OnError = "raise",
        progress: bool | OnProgress = False,
        checkpoint: str | Path | Checkpoint | None = None,
        endpoints: Sequence[str] | None = None,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        timeout: float | None = None,
        patience: float | None = None,
        bulk: bool = True,
    ) -> EvaluationReport:
        """Compute losses over a whole data set, as LossClient.evaluate. `batches` may be an async iterable."""
        options = EvaluationOptions(
            input=input,
            target=target,
            weight=weight,
            mask=mask,
            group=group,
            allow_broadcast=allow_broadcast,
            element_count=element_count,
            per_batch=per_batch,
            on_batch=on_batch,
            on_error=on_error,
            progress=progress,
            checkpoint=checkpoint,
            slice_bytes=slice_bytes,
        )
        evaluation = Evaluation(losses, options)
        evaluation.expect(count_of(batches))
        lanes: TaskLanes | None = None
        async with AsyncExitStack() as stack:
            # A checkpoint is written whatever ends this, and after all else.
            stack.callback(evaluation.save)
            start = time.perf_counter()
            async for index, batch in _numbered(batches, evaluation.is_done):
                is_slow = time.perf_counter() - start > _SLOW_PULL_SECONDS
                if lanes is None:
                    lanes = await self._lanes(evaluation, endpoints, in_flight_bytes, timeout, patience, bulk, stack)
                for request in evaluation.slices(index, batch):
                    await lanes.send(request)
                await lanes.poll(flush=is_slow)
                start = time.perf_counter()
            if lanes is not None:
                await lanes.drain()
        return evaluation.report()

    async def _lanes(
        self,
        evaluation: Evaluation,
        endpoints: Sequence[str] | None,
        in_flight_bytes: int,
        timeout: float | None,
        patience: float | None,
        bulk: bool,
        stack: AsyncExitStack,
    ) -> TaskLanes:
        """Connect to the servers; return the lanes to them, closed with the stack."""
        clients: list[AsyncEvaluateMethods] = [self]
        if endpoints is not None:
            clients = [self._at(each) for each in check_endpoints(endpoints)]
            for client in clients:
                stack.push_async_callback(client.close)
        waiting = _FirstConnection(patience)
        infos = [await _awaited_info_of(client, waiting) for client in clients]
        evaluation.connect(*_described(clients, infos))
        window = window_for(clients, infos, in_flight_bytes, timeout, patience)
        targets = [client._settings.target for client in clients]
        lanes = TaskLanes(window, [partial(client._open_stream, bulk=bulk) for client in clients], targets)
        stack.push_async_callback(lanes.close)
        return lanes


class _FirstConnection:
    """How long to wait for servers that cannot be reached yet: not at all, unless the caller gave `patience`."""

    def __init__(self, patience: float | None) -> None:
        if patience is not None and not patience >= 0:
            raise ValueError(f"patience is {patience!r} seconds; it must be at least 0")
        self._until = None if patience is None else time.monotonic() + patience
        self._attempts = 0

    def seconds_after(self, error: LossgradError) -> float:
        """Return how long to wait before trying again. Raises the error where there is no more time for it."""
        self._attempts += 1
        seconds = backoff_seconds(self._attempts, error.retry_after)
        if self._until is None or time.monotonic() + seconds > self._until:
            raise error
        return seconds


def _info_of(client: EvaluateMethods, waiting: _FirstConnection) -> ServerInfo:
    while True:
        try:
            return client.info()
        except (Unavailable, DeadlineExceeded) as error:
            time.sleep(waiting.seconds_after(error))


async def _awaited_info_of(client: AsyncEvaluateMethods, waiting: _FirstConnection) -> ServerInfo:
    while True:
        try:
            return await client.info()
        except (Unavailable, DeadlineExceeded) as error:
            await asyncio.sleep(waiting.seconds_after(error))


class _HasSettings(Protocol):
    @property
    def _settings(self) -> ChannelSettings: ...


_Clients = Sequence[_HasSettings]


def check_endpoints(endpoints: Sequence[str]) -> list[str]:
    """Return the targets. Raises ValueError where there is none, or one that comes twice; TypeError for a text."""
    if isinstance(endpoints, str):
        raise TypeError(f"endpoints is the text {endpoints!r}; give a list of gRPC targets")
    targets = list(endpoints)
    if not targets or len(set(targets)) < len(targets):
        raise ValueError(f"endpoints is {targets!r}; give at least one gRPC target, and each once")
    return targets


def largest_message(clients: _Clients, infos: Sequence[ServerInfo]) -> int:
    """Return the size of the largest message that these clients and their servers take."""
    limits = [info.limits.max_message_bytes for info in infos]
    return min([client._settings.max_message_bytes for client in clients] + [limit for limit in limits if limit > 0])


def window_for(
    clients: _Clients, infos: Sequence[ServerInfo], in_flight_bytes: int, timeout: float | None, patience: float | None
) -> SliceWindow:
    """Return the window of an evaluation. Raises ValueError and InvalidRequest for numbers that are out of range."""
    if in_flight_bytes < 1:
        raise ValueError(f"in_flight_bytes is {in_flight_bytes}; it must be at least 1")
    silence_seconds = deadline_seconds(timeout, clients[0]._settings.timeout)
    return SliceWindow(
        len(clients),
        max_bytes=in_flight_bytes,
        max_message_bytes=largest_message(clients, infos),
        silence_seconds=float("inf") if silence_seconds is None else silence_seconds,
        patience_seconds=DEFAULT_PATIENCE_SECONDS if patience is None else patience,
        clock=time.perf_counter,
        metrics=clients[0]._settings.metrics_of("evaluate"),
    )


def _described(clients: _Clients, infos: Sequence[ServerInfo]) -> tuple[list[EvaluationServer], int]:
    servers = [
        EvaluationServer(client._settings.target, info.device, info.determinism)
        for client, info in zip(clients, infos, strict=True)
    ]
    return servers, largest_message(clients, infos)


async def _numbered(
    batches: Iterable[Any] | AsyncIterable[Any], is_done: Callable[[int], bool]
) -> AsyncIterator[tuple[int, Any]]:
    if isinstance(batches, AsyncIterable):
        index = 0
        async for batch in batches:
            if not is_done(index):
                yield index, batch
            index += 1
        return
    for index, batch in enumerate_batches(batches, is_done):
        yield index, batch
