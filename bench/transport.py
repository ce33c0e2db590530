"""What the transport costs: lossgrad-server against an echo of identity bytes on the same kind of server, side by side.

    python -m bench.transport [--quick] [--json] [--sizes 1KiB 8MiB] [--only packed memory]

Servers and load are in separate processes. "floor" is the echo called by a raw gRPC client; "server" is ours called by the
same; "idle" ours with an engine that does nothing; "sdk" is LossClient with NumPy arrays, whose small calls share a kept
stream; "sdk/floor" is LossClient with a call for each, against the echo.
The bars are issue 4's. The full run takes about six minutes, --quick under one.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, Final, NoReturn

from bench.measuring import KIB, MIB, bars_table, machine, number, parse_size, progress, to_json
from bench.transport_cells import cells_table, rates_table
from bench.transport_sections import Bench, Settings, many_callers, one_caller, packed, streams, unix_sockets
from bench.transport_service import flatness, loop_lag, memory, mixed
from lossgrad_api.allocator import keep_large_blocks

# In this order. Those that compare rates take at most this share of the time that is left; the others are short.
SECTIONS: Final[dict[str, tuple[Callable[[Bench, float], None], float]]] = {
    "packed": (packed, 0.10),
    "one-caller": (one_caller, 0.30),
    "memory": (memory, 1.0),
    "mixed": (mixed, 1.0),
    "lag": (loop_lag, 1.0),
    "unix": (unix_sockets, 0.15),
    "streams": (streams, 0.45),
    "many-callers": (many_callers, 1.0),
    "flatness": (flatness, 1.0),
}

FULL: Final = Settings(
    sizes=(KIB, 64 * KIB, MIB, 8 * MIB, 64 * MIB),
    sections=tuple(SECTIONS),
    rounds=7,
    burst_seconds=0.3,
    outstanding=(1, 16, 64),
    budget_seconds=250.0,
)
QUICK: Final = dataclasses.replace(
    FULL,
    sizes=(KIB, MIB, 8 * MIB),
    large_bytes=16 * MIB,
    rounds=3,
    burst_seconds=0.1,
    outstanding=(16,),
    sections=("packed", "one-caller", "memory", "mixed", "lag", "flatness"),
    budget_seconds=25.0,
    large_calls=1,
    flat_calls=2_000,
    mixed_rounds=1,
    mixed_seconds=1.0,
    lag_seconds=0.8,
    flat_seconds=5.0,
    idle_seconds=0.0,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0 however the bars came out; 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.transport", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rough picture in under a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--no-computing", dest="computing", action="store_false", help="leave the engine out: the transport by itself"
    )
    parser.add_argument("--sizes", type=parse_size, nargs="+", metavar="SIZE", help="sizes of a tensor, such as 64KiB")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    for name, kind, help_text in (
        ("rounds", int, "how often everything takes its turn"),
        ("burst-seconds", float, "how long a turn lasts"),
        ("large-bytes", parse_size, "size of the tensors in memory, mixed and lag"),
        ("flat-calls", int, "how many calls memory must stay flat over"),
        ("many", int, "how many calls compute_many and asyncio.gather are given at once"),
        ("mixed-seconds", float, "how long a turn of mixed lasts"),
        ("idle-seconds", float, "how long the server may take to give memory back"),
        ("lag-seconds", float, "how long the event loop is watched"),
        ("budget-seconds", float, "no rates are compared after this long"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=help_text)
    given = vars(parser.parse_args(arguments))
    settings = QUICK if given.pop("quick") else FULL
    as_json = given.pop("json")
    given["sections"] = given.pop("only")
    settings = dataclasses.replace(
        settings, **{name: _tuple(value) for name, value in given.items() if value is not None}
    )
    signal.signal(signal.SIGTERM, _end)
    keep_large_blocks()  # what a client may do too (docs/protocol.md)
    with ExitStack() as parts:
        bench = Bench(settings, parts)
        bench.report.machine = machine()
        for name, (section, share) in SECTIONS.items():
            if name in settings.sections:
                section(bench, share)
    print(to_json(bench.report) if as_json else _text(bench))
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # leaves every context, so that the servers end too


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(bench: Bench) -> str:
    parts = [", ".join(f"{name} {value}" for name, value in bench.report.machine.items())]
    if not bench.settings.computing:
        parts.append("The servers compute nothing: all that follows is the transport by itself.")
    for title, rows, has_latencies in bench.tables:
        parts.append(f"{title}\n{(cells_table if has_latencies else rates_table)(rows)}")
    if bench.report.server:
        parts.append("\n".join(_lines(bench.report.server)))
    if bench.report.skipped:
        parts.append("\n".join(["Skipped:", *(f"  {what}" for what in bench.report.skipped)]))
    if bench.report.bars:
        parts.append(bars_table(bench.report.bars))
    return "\n\n".join(parts)


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            shown = [number(item) if isinstance(item, float) else str(item) for item in _listed(value)]
            lines.append(f"{indent}{name}: {' '.join(shown)}")
    return lines


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        progress("interrupted")
        sys.exit(130)
