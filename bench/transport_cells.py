"""What bench.transport measures at one point, and how a row of such points becomes a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.measuring import number, paired_ratio, percentile, size_name, table
from bench.transport_loads import Burst


class Path(StrEnum):
    """Which client calls which server."""

    FLOOR = "floor"  # raw client, echo server
    IDLE = "idle"  # raw client, our server with an engine that does nothing
    SERVER = "server"  # raw client, our server
    SDK = "sdk"  # the SDK, our server
    SDK_FLOOR = "sdk/floor"  # the SDK, echo server


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: medians over the rounds; the ratio to the floor is the median of the rounds' ratios."""

    address: str
    mode: str
    tensor_bytes: int
    outstanding: int
    path: str
    rounds: int
    calls: int
    calls_per_second: float
    ratio: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    server_faults: float
    client_cpu_us: float


def cells(
    address: str,
    mode: str,
    tensor_bytes: int,
    outstanding: int,
    bursts: Mapping[str, Sequence[Burst]],
    floor: str = Path.FLOOR,
) -> dict[str, Cell]:
    """Return the cells of cases that were measured side by side, by path. `floor` names what the ratios are to."""
    floor_rates = [burst.rate for burst in bursts[floor]]
    result: dict[str, Cell] = {}
    for path, rounds in bursts.items():
        rates = [burst.rate for burst in rounds]
        calls = sum(burst.calls for burst in rounds)
        latencies = [latency for burst in rounds for latency in burst.latencies]
        result[path] = Cell(
            address=address,
            mode=mode,
            tensor_bytes=tensor_bytes,
            outstanding=outstanding,
            path=path,
            rounds=len(rounds),
            calls=calls,
            calls_per_second=statistics.median(rates),
            ratio=paired_ratio(rates, floor_rates),
            p50_ms=percentile(latencies, 50) * 1e3,
            p99_ms=percentile(latencies, 99) * 1e3,
            server_cpu_us=sum(burst.server_cpu_seconds for burst in rounds) / calls * 1e6,
            server_faults=sum(burst.server_faults for burst in rounds) / calls,
            client_cpu_us=sum(burst.client_cpu_seconds for burst in rounds) / calls * 1e6,
        )
    return result


def cells_table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Return rows of cells, each row's side by side: rates relative to the floor, latencies in ms, processor time in us."""

    def measured(*paths: Path) -> list[Path]:
        return [path for path in paths if any(path in row for row in rows)]

    relative = measured(Path.IDLE, Path.SERVER, Path.SDK, Path.SDK_FLOOR)
    main = measured(Path.FLOOR, Path.SERVER, Path.SDK)
    servers = measured(Path.FLOOR, Path.IDLE, Path.SERVER)
    groups = [
        ("ratio", "x", relative),
        ("p50_ms", "p50", main),
        ("p99_ms", "p99", main),
        ("server_cpu_us", "cpu", servers),
        ("server_faults", "faults", servers),
        ("client_cpu_us", "client", measured(Path.FLOOR, Path.SDK)),
    ]
    heads = ["", "out", "floor/s"]
    for _, label, of in groups:
        heads += ["|", *(f"{label} {path}" for path in of)]
    lines = []
    for row in rows:
        floor = row[Path.FLOOR]
        line = [size_name(floor.tensor_bytes), str(floor.outstanding), number(floor.calls_per_second)]
        for field, _, of in groups:
            line += ["|", *(number(getattr(row[path], field)) if path in row else "" for path in of)]
        lines.append(line)
    return table(heads, lines)


def rates_table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Return rows of cells one under the other, for cases that have no latencies of their own."""
    heads = ("", "out", "", "", "calls/s", "x floor", "server cpu us", "client cpu us")
    lines = [
        (
            size_name(cell.tensor_bytes),
            str(cell.outstanding),
            cell.mode,
            cell.path,
            number(cell.calls_per_second),
            number(cell.ratio),
            number(cell.server_cpu_us),
            number(cell.client_cpu_us),
        )
        for row in rows
        for cell in row.values()
    ]
    return table(heads, lines, left=(0, 2, 3))
