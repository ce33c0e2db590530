"""The sections of bench.transport that compare rates: one caller, many callers, unix sockets, streams, packed streams."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from bench import transport_messages as messages
from bench.measuring import KIB, MIB, Bar, interleave, paired_ratio, percentile, progress, size_name
from bench.transport_cells import Cell, Path, cells
from bench.transport_loads import Burst, Loads
from bench.transport_servers import ServerProcess, echo_server, loss_server

T = TypeVar("T")

# More in flight is skipped: the server refuses it by default (max_queued_bytes), and client, server and echo must fit.
_MOST_BYTES_IN_FLIGHT: Final = 1024 * MIB
# How many requests the messages of the packed streams hold.
PACKED: Final = {16: 8, 64: 32, 128: 64}
_MOST_PACKED_TENSOR_BYTES: Final = 64 * KIB
# What a client's stream has in flight by default.
_DEFAULT_IN_FLIGHT: Final = 256
# How many requests the SDK puts into a message.
_PACKED: Final = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured. Times are in seconds."""

    sizes: tuple[int, ...]
    sections: tuple[str, ...]
    rounds: int
    burst_seconds: float
    outstanding: tuple[int, ...]
    budget_seconds: float
    computing: bool = True
    large_bytes: int = 64 * MIB
    large_callers: int = 8
    large_calls: int = 3
    flat_calls: int = 50_000
    flat_seconds: float = 45.0
    many: int = 1024
    idle_seconds: float = 12.0
    mixed_rounds: int = 3
    mixed_seconds: float = 2.0
    lag_seconds: float = 2.0


@dataclass(slots=True)
class Report:
    """What a run found."""

    benchmark: str = "transport"
    machine: dict[str, Any] = field(default_factory=dict)
    settings: Settings | None = None
    bars: list[Bar] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    server: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Bench:
    """The servers and loads that sections share, and what they have found."""

    def __init__(self, settings: Settings, open_parts: ExitStack) -> None:
        self.settings = settings
        self.report = Report(settings=settings)
        self.tables: list[
            tuple[str, Sequence[Mapping[str, Cell]], bool]
        ] = []  # title, rows, whether they have latencies
        self.loop = asyncio.new_event_loop()
        open_parts.callback(self.loop.close)
        self._open_parts = open_parts
        self.floor, self.server, self.idle = self.start(
            lambda: self.echo("tcp"), lambda: self.ours("tcp"), lambda: loss_server("tcp", computing=False)
        )
        self.floor_loads, self.server_loads, self.idle_loads = map(self.loads, (self.floor, self.server, self.idle))
        self._end = time.monotonic() + settings.budget_seconds

    def start(self, *servers: Callable[[], ServerProcess], until: ExitStack | None = None) -> list[ServerProcess]:
        """Start servers at the same time; they live until the bench ends, or until `until` does."""
        stack = self._open_parts if until is None else until
        started = [stack.enter_context(server()) for server in servers]
        for server in started:
            server.wait_until_ready()
        return started

    def echo(self, address: str, *, probe: bool = False) -> ServerProcess:
        """Return an echo server that knows all sizes."""
        sizes = sorted({*self.settings.sizes, self.settings.large_bytes, KIB})
        return echo_server(address, sizes, [1, *PACKED.values()], probe=probe)

    def ours(self, address: str, *, probe: bool = False) -> ServerProcess:
        """Return a server of ours."""
        return loss_server(address, probe=probe, computing=self.settings.computing)

    def loads(self, server: ServerProcess, until: ExitStack | None = None) -> Loads:
        """Return the loads for a server."""
        stack = self._open_parts if until is None else until
        return stack.enter_context(Loads(server, self.loop, self.settings.burst_seconds))

    def share_time(self, points: Sequence[T], share: float, name: str) -> Iterator[tuple[T, float]]:
        """Give each point with the time until which it may be measured; `share` of what is left is for all of them."""
        now = time.monotonic()
        end = now + share * max(0.0, self._end - now)
        for index, point in enumerate(points):
            now = time.monotonic()
            if now > end:
                self.report.skipped.append(f"{name}: {len(points) - index} of {len(points)} points, out of time")
                return
            yield point, now + max(0.0, end - now) / (len(points) - index)

    def compare(
        self, cases: Mapping[str, Callable[[], Burst]], rounds: int, until: float, loads: Sequence[Loads] = ()
    ) -> dict[str, list[Burst]]:
        """Run the cases in turns, after one short burst each that warms them up."""
        used = loads or (self.floor_loads, self.server_loads, self.idle_loads)
        for load in used:
            load.seconds = self.settings.burst_seconds / 10
        for case in cases.values():
            case()
        for load in used:
            load.seconds = self.settings.burst_seconds
        return interleave(cases, rounds, until=until)

    def show(self, title: str, rows: Sequence[Mapping[str, Cell]], *, has_latencies: bool = True) -> None:
        """Add a table."""
        if rows:
            self.tables.append((title, rows, has_latencies))
            self.report.cells += [cell for row in rows for cell in row.values()]

    def fits(self, tensor_bytes: int, outstanding: int, what: str) -> bool:
        """Whether so much may be in flight; says so where not."""
        in_flight = messages.bytes_in_flight(tensor_bytes, outstanding)
        if in_flight <= _MOST_BYTES_IN_FLIGHT:
            return True
        self.report.skipped.append(
            f"{what}, {size_name(tensor_bytes)} x {outstanding}: {in_flight / MIB:.0f} MiB in flight, "
            f"at most {_MOST_BYTES_IN_FLIGHT // MIB} MiB are measured"
        )
        return False


def one_caller(bench: Bench, share: float) -> None:
    """Unary calls, one after another, from a blocking client: the bars of large and of small calls."""
    floor, server, idle = bench.floor_loads, bench.server_loads, bench.idle_loads
    rows = []
    for size, until in bench.share_time(bench.settings.sizes, share, "one caller"):
        progress(f"one caller, {size_name(size)}")
        bursts = bench.compare(
            {
                Path.FLOOR: floor.raw_unary(size, 1),
                Path.SERVER: server.raw_unary(size, 1),
                Path.SDK: server.sdk_unary(size, 1),
                Path.IDLE: idle.raw_unary(size, 1),
                Path.SDK_FLOOR: floor.sdk_unary(size, 1, coalesce=False),
            },
            bench.settings.rounds,
            until,
        )
        row = cells("tcp", "unary", size, 1, bursts)
        rows.append(row)
        bench.report.server[f"compute_ms {size_name(size)}"] = server.compute_seconds(size) * 1e3
        bar = {MIB: 0.80, 8 * MIB: 0.80, 64 * MIB: 0.75, KIB: 0.75}.get(size)
        for path in (Path.SERVER, Path.SDK):
            if bar is not None:
                name = f"{size_name(size)} unary, one caller, {path}: throughput to the floor's"
                bench.report.bars.append(Bar(name, row[path].ratio, bar, unit="x"))
        if size == KIB:
            for path in (Path.SERVER, Path.SDK):
                ratio = paired_ratio(
                    [percentile(burst.latencies, 50) for burst in bursts[path]],
                    [percentile(burst.latencies, 50) for burst in bursts[Path.FLOOR]],
                )
                bench.report.bars.append(
                    Bar(f"1 KiB unary, one caller, {path}: p50 to the floor's", ratio, 1.35, is_least=False, unit="x")
                )
    bench.show("Unary, one blocking caller, 127.0.0.1", rows)


def unix_sockets(bench: Bench, share: float) -> None:
    """The same over unix sockets."""
    rows = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        echo, ours = bench.start(
            lambda: bench.echo(f"unix:{folder}/echo"), lambda: bench.ours(f"unix:{folder}/ours"), until=stack
        )
        floor, server = bench.loads(echo, stack), bench.loads(ours, stack)
        for size, until in bench.share_time(bench.settings.sizes, share, "unix socket"):
            progress(f"unix socket, {size_name(size)}")
            bursts = bench.compare(
                {
                    Path.FLOOR: floor.raw_unary(size, 1),
                    Path.SERVER: server.raw_unary(size, 1),
                    Path.SDK: server.sdk_unary(size, 1),
                    "floor tcp": bench.floor_loads.raw_unary(size, 1),
                },
                max(1, bench.settings.rounds // 2),
                until,
                (floor, server),
            )
            rows.append(cells("unix", "unary", size, 1, bursts))
    bench.show("Unary, one blocking caller, unix socket (the ratio is to the echo on a unix socket)", rows)
    for row in rows:
        size, tcp = row[Path.FLOOR].tensor_bytes, row["floor tcp"].ratio
        bench.report.server[f"echo over tcp to echo over unix socket, {size_name(size)}"] = tcp


def many_callers(bench: Bench, share: float) -> None:
    """Unary calls from many threads, and from asyncio."""
    floor, server = bench.floor_loads, bench.server_loads
    points = [
        (mode, size, outstanding)
        for mode in ("threads", "asyncio")
        for size in bench.settings.sizes
        for outstanding in bench.settings.outstanding
        if (mode == "asyncio" or outstanding > 1) and bench.fits(size, outstanding, f"unary, {mode}")
    ]
    rows: dict[str, list[dict[str, Cell]]] = {"threads": [], "asyncio": []}
    for (mode, size, outstanding), until in bench.share_time(points, share, "many callers"):
        progress(f"unary, {mode}, {size_name(size)} x {outstanding}")
        cases: dict[str, Callable[[], Burst]]
        if mode == "threads":
            cases = {
                Path.FLOOR: floor.raw_unary(size, outstanding),
                Path.SERVER: server.raw_unary(size, outstanding),
                Path.SDK: server.sdk_unary(size, outstanding),
            }
        else:
            cases = {
                Path.FLOOR: floor.raw_aio(size, outstanding),
                Path.SERVER: server.raw_aio(size, outstanding),
                Path.SDK: server.sdk_aio(size, outstanding),
            }
        bursts = bench.compare(cases, max(1, bench.settings.rounds // 2), until)
        rows[mode].append(cells("tcp", f"unary, {mode}", size, outstanding, bursts))
    bench.show("Unary, a thread for each outstanding call", rows["threads"])
    bench.show("Unary, asyncio", rows["asyncio"])


def streams(bench: Bench, share: float) -> None:
    """Bidirectional streams: a request to a message, and packed."""
    floor, server = bench.floor_loads, bench.server_loads
    points = [
        (per_message, size, outstanding)
        for size in bench.settings.sizes
        for outstanding, per_message in PACKED.items()
        if size <= _MOST_PACKED_TENSOR_BYTES
    ]
    points += [
        (1, size, outstanding)
        for size in bench.settings.sizes
        for outstanding in bench.settings.outstanding
        if bench.fits(size, outstanding, "stream")
    ]
    rows = []
    for (per_message, size, outstanding), until in bench.share_time(points, share, "streams"):
        progress(f"stream, {size_name(size)} x {outstanding}, {per_message} to a message")
        cases: dict[str, Callable[[], Burst]] = {
            Path.FLOOR: floor.raw_stream(size, outstanding, per_message),
            Path.SERVER: server.raw_stream(size, outstanding, per_message),
            Path.IDLE: bench.idle_loads.raw_stream(size, outstanding, per_message),
        }
        if per_message > 1:
            cases[Path.SDK] = server.sdk_stream(size, outstanding)
        bursts = bench.compare(cases, max(1, bench.settings.rounds // 2), until)
        rows.append(cells("tcp", f"stream, {per_message} to a message", size, outstanding, bursts))
    bench.show("Streams of a blocking client, packed; then one request to a message", rows, has_latencies=False)


def packed(bench: Bench, share: float) -> None:
    """1 KiB requests by every way of the SDK that packs, beside its unary calls."""
    server = bench.server_loads
    many = bench.settings.many
    unary, unary_aio, gather = "client.smooth_l1", "await client.smooth_l1", f"asyncio.gather of {many}"
    for _, until in bench.share_time([KIB], share, "packed"):
        progress("packed, 1 KiB")
        cases: dict[str, Callable[[], Burst]] = {
            Path.FLOOR: bench.floor_loads.raw_stream(KIB, _DEFAULT_IN_FLIGHT, _PACKED),
            Path.SERVER: server.raw_stream(KIB, _DEFAULT_IN_FLIGHT, _PACKED),
            unary: server.sdk_unary(KIB, 1),
            "client.stream": server.sdk_stream(KIB, _DEFAULT_IN_FLIGHT),
            "client.compute_many": server.sdk_compute_many(KIB, many),
            unary_aio: server.sdk_aio(KIB, 1),
            "async client.stream": server.sdk_aio_stream(KIB, _DEFAULT_IN_FLIGHT),
            "asyncio.gather of 16": server.sdk_gather(KIB, 16),
            gather: server.sdk_gather(KIB, many),
        }
        bursts = bench.compare(cases, bench.settings.rounds, until)
        bench.show("1 KiB, packed", [cells("tcp", "packed", KIB, _DEFAULT_IN_FLIGHT, bursts)], has_latencies=False)
        rates = {name: [burst.rate for burst in rounds] for name, rounds in bursts.items()}
        for name, alone in (
            ("client.stream", unary),
            ("client.compute_many", unary),
            ("async client.stream", unary_aio),
            (gather, unary_aio),
        ):
            ratio = paired_ratio(rates[name], rates[alone])
            bench.report.bars.append(Bar(f"1 KiB, {name}: calls/s to one unary caller's", ratio, 15.0, unit="x"))
            rate = sorted(rates[name])[len(rates[name]) // 2]
            bench.report.bars.append(Bar(f"1 KiB, {name}: calls/s", rate, 20_000.0, unit="/s"))
