"""`lossgrad bench`: how fast a server answers, and how much it takes. What is sent, and what is shown; load.py sends."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final

import numpy as np

from lossgrad.aio import AsyncLossClient
from lossgrad.cli.connecting import token_of
from lossgrad.cli.latencies import PERCENTILES, duration
from lossgrad.cli.load import Load, Run, apply_load, run_loop
from lossgrad.cli.losses import label_of, read_loss
from lossgrad.cli.outcome import CheckFailed, ExitCode, UsageError
from lossgrad.losses import Loss
from lossgrad.results import ServerInfo

_DTYPES: Final = ("float16", "float32", "float64")
_DEFAULT_IN_FLIGHT: Final = (1, 8, 64)
# From here on this process may be what is slow.
_BUSY_SHARE: Final = 0.85
_SEED: Final = 20240229


def run(options: argparse.Namespace) -> ExitCode:
    """Apply one load after the other, and show what came of each."""
    loads = [Load(rate=_positive(rate, "--rate"), evenly=options.arrivals == "even") for rate in options.rate]
    loads += [Load(in_flight=int(_positive(number, "--in-flight"))) for number in options.in_flight]
    bench = _Bench(options)
    runs = run_loop(_run(bench, loads or [Load(in_flight=number) for number in _DEFAULT_IN_FLIGHT], options.json))
    if options.json:
        print(json.dumps(bench.to_dict(runs), indent=2))
    failed = sum(sum(run.errors.values()) for run in runs)
    if failed:
        raise CheckFailed(f"{failed:,} of {sum(run.request_count for run in runs):,} requests failed: {_errors(runs)}")
    return ExitCode.DONE


async def _run(bench: _Bench, loads: list[Load], quiet: bool) -> list[Run]:
    runs: list[Run] = []
    async for result in bench.runs(loads):
        if not runs and not quiet:
            print(f"{bench.description}\n\n{_HEAD}")
        runs.append(result)
        if not quiet:
            print(_row(result), flush=True)
    if not quiet:
        for result in runs:
            print("\n" + "\n".join(_details(result)))
    return runs


class _Bench:
    """What is sent, and to whom."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.losses: list[Loss] = [read_loss(text, gradient=options.gradient) for text in options.loss or ["smooth_l1"]]
        self.shape = _shape(options.shape)
        if options.dtype not in _DTYPES:
            raise UsageError(f"--dtype is {options.dtype!r}; give one of {', '.join(_DTYPES)}")
        self.seconds = _positive(options.seconds, "--seconds")
        if not options.warm_up >= 0:
            raise UsageError(f"--warm-up is {options.warm_up}; give seconds, at least 0")
        self.connections = int(_positive(options.connections, "--connections"))
        rng = np.random.default_rng(_SEED)
        self.input = rng.standard_normal(self.shape).astype(options.dtype)
        self.target = rng.standard_normal(self.shape).astype(options.dtype)
        self.info: ServerInfo  # set once connected

    @property
    def description(self) -> str:
        """What is sent, and to whom, in one line."""
        shape = "x".join(map(str, self.shape)) or "0-d"
        gradient = " with gradient" if self._options.gradient else ""
        losses = ", ".join(map(label_of, self.losses))
        info = self.info
        return (
            f"{losses}{gradient} of {shape} {self.input.dtype}, {self.connections} connection"
            f"{'s' if self.connections > 1 else ''}, {self.seconds:g} s each; server {info.server_version} on {info.device}"
        )

    async def runs(self, loads: list[Load]) -> AsyncIterator[Run]:
        """Apply the loads; give what came of each."""
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._client()) for _ in range(self.connections)]
            for client in clients:
                await client.ping()
            self.info = await clients[0].info()
            turns = itertools.cycle(clients)
            await clients[0].compute(self.input, self.target, self.losses)  # what the server refuses, it refuses now

            async def send() -> Any:
                return await next(turns).compute(self.input, self.target, self.losses)

            for load in loads:
                yield await apply_load(load, send, warm_up=self._options.warm_up, seconds=self.seconds, seed=_SEED)

    def _client(self) -> AsyncLossClient:
        options = self._options
        try:
            return AsyncLossClient(
                options.target,
                token=token_of(options),
                tls=options.tls,
                ca=options.ca,
                cert=options.cert,
                key=options.key,
                timeout=options.timeout,
                retries=0,  # what the server refuses is to be seen
                coalesce=not options.unary,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error

    def to_dict(self, runs: list[Run]) -> dict[str, Any]:
        """Return everything as JSON has it; times in seconds."""
        info = self.info
        return {
            "server": {"version": info.server_version, "device": info.device, "determinism": info.determinism},
            "request": {
                "losses": [label_of(loss) for loss in self.losses],
                "gradient": self._options.gradient,
                "shape": list(self.shape),
                "dtype": str(self.input.dtype),
                "unary": self._options.unary,
                "connections": self.connections,
            },
            "runs": [self._run_dict(run) for run in runs],
        }

    def _run_dict(self, run: Run) -> dict[str, Any]:
        return {
            "rate": run.load.rate,
            "in_flight": run.load.in_flight,
            "seconds": run.seconds,
            "requests": run.request_count,
            "errors": dict(run.errors),
            "answered_per_second": run.answered_per_second,
            "sent_bytes_per_second": run.answered_per_second * (self.input.nbytes + self.target.nbytes),
            "latency": run.latencies.to_dict(),
            "lateness": run.lateness.to_dict() if run.load.rate is not None else None,
            "mean_stages": run.mean_stages(),
            "mean_batch_requests": run.batch_requests / max(1, len(run.latencies)),
            "client_busy_share": run.busy_share,
        }


_COLUMNS: Final = (
    "load",
    "answers/s",
    *(f"p{percent:g}" for percent in PERCENTILES),
    "max",
    "batch",
    "client busy",
    "errors",
)
_WIDTHS: Final = (14, 10, *(9 for _ in PERCENTILES), 9, 7, 12, 7)
_HEAD: Final = "".join(
    name.ljust(width) if not position else name.rjust(width)
    for position, (name, width) in enumerate(zip(_COLUMNS, _WIDTHS, strict=True))
)


def _row(run: Run) -> str:
    cells = (
        str(run.load),
        f"{run.answered_per_second:,.0f}",
        *(duration(run.latencies.percentile(percent)) for percent in PERCENTILES),
        duration(run.latencies.max),
        f"{run.batch_requests / max(1, len(run.latencies)):.1f}",
        f"{run.busy_share:.0%}",
        f"{sum(run.errors.values()):,}",
    )
    return "".join(
        cell.ljust(width) if not position else cell.rjust(width)
        for position, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )


def _details(run: Run) -> list[str]:
    lines = [f"{run.load}: {run.request_count:,} requests" + (f", {_errors([run])}" if run.errors else "")]
    stages = run.mean_stages()
    if stages:
        lines.append("  mean  " + ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages.items()))
    lines += [f"  {line}" for line in run.latencies.histogram()]
    lines += [f"  note: {note}" for note in _notes(run)]
    return lines


def _notes(run: Run) -> list[str]:
    """Say what makes the figures worth less."""
    notes = []
    if run.busy_share > _BUSY_SHARE:
        notes.append(
            f"this process was busy for {run.busy_share:.0%} of one core: the figures may show it and not the server; "
            "run several at once, or from another machine"
        )
    late = run.lateness.percentile(99)
    if run.load.rate is not None and late > 0.2 * run.latencies.percentile(99):
        notes.append(f"99% were sent within {duration(late)} of their moment, which is part of their latency")
    return notes


def _errors(runs: list[Run]) -> str:
    counts = sum((run.errors for run in runs), start=type(runs[0].errors)())
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(extent) for extent in text.replace(",", "x").split("x"))
    except ValueError:
        shape = (-1,)
    if min(shape) < 0:
        raise UsageError(f"--shape is {text!r}; give extents such as 4096 or 64x3x32x32")
    return shape


def _positive(value: float, flag: str) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise UsageError(f"{flag} is {value:g}; it must be above 0")
    return value
