"""The sections of bench.transport about the server itself: memory, leaks, fairness between sizes, the event loop's lag."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from bench import transport_messages as messages
from bench.measuring import KIB, MIB, Bar, interleave, paired_ratio, percentile, progress, size_name
from bench.transport_bulk import Done, Task
from bench.transport_loads import Burst, Loads
from bench.transport_sections import Bench
from bench.transport_servers import ChildProcess, ServerProcess

_LONG_SECONDS: Final = 600.0
_FLAT_OUTSTANDING: Final = 16
_LAG_ROUNDS: Final = 3


@dataclasses.dataclass(frozen=True, slots=True)
class _Lag:
    """What the probe in a server's event loop saw during so many large calls."""

    calls: int
    seen: dict[str, Any]

    def ms_per_call(self, name: str) -> float:
        """Return a time that the probe added up, in ms of a call."""
        seconds: float = self.seen[f"{name}_seconds"]
        return seconds * 1e3 / self.calls


class Bulk:
    """The process that makes large calls (transport_bulk.py)."""

    def __init__(self, process: ChildProcess) -> None:
        self._process = process

    @contextmanager
    def calling(self, task: Task) -> Iterator[list[Done]]:
        """Make large calls while the context lasts, or until the task ends; what came of it is then in the list."""
        self._process.tell(json.dumps(dataclasses.asdict(task)))
        self._process.read_line(_LONG_SECONDS)
        done: list[Done] = []
        yield done
        done.append(Done(**json.loads(self._process.read_line(_LONG_SECONDS))))

    def run(self, task: Task) -> Done:
        """Do a task to its end."""
        with self.calling(task) as done:
            pass
        return done[0]


@contextmanager
def _bulk() -> Iterator[Bulk]:
    with ChildProcess("bench.transport_bulk") as process:
        yield Bulk(process)


def memory(bench: Bench, share: float) -> None:
    """The server's peak while several callers send large tensors."""
    settings = bench.settings
    size, callers = settings.large_bytes, settings.large_callers
    in_flight = messages.bytes_in_flight(size, callers)
    found: dict[str, Any] = {"bytes_in_flight": in_flight}
    with ExitStack() as stack:
        bulk = stack.enter_context(_bulk())
        # Of its own, so that nothing that others left behind is counted.
        (server,) = bench.start(lambda: bench.ours("tcp"), until=stack)
        for name, process in (("server", server), ("floor", bench.floor)):
            progress(f"memory, {name}")
            before = process.memory_bytes()
            process.reset_peak_memory()
            done = bulk.run(Task(process.target, size, callers, 0.0, settings.large_calls))
            found[name] = {
                "idle_bytes": before,
                "peak_bytes": process.peak_memory_bytes(),
                "grown_to_bytes_in_flight": (process.peak_memory_bytes() - before) / in_flight,
                "peak_to_bytes_in_flight": process.peak_memory_bytes() / in_flight,
                "calls_per_second": done.calls / done.seconds,
                "refused": done.refused,
            }
        progress(f"memory, {settings.idle_seconds:.0f} s after the load")
        time.sleep(settings.idle_seconds)
        found["server"]["bytes_when_idle_again"] = server.memory_bytes()
    bench.report.server["memory"] = found
    ours, floor = found["server"], found["floor"]
    note = (
        f"{in_flight / MIB:.0f} MiB in flight, answers included; {ours['refused']} refusals for {done.calls} calls; the "
        f"floor's: {floor['grown_to_bytes_in_flight']:.2f}x"
    )
    name = f"{callers} callers x {size_name(size)}: the server's peak memory to the bytes in flight"
    bench.report.bars.append(Bar(name, ours["peak_to_bytes_in_flight"], 2.2, is_least=False, unit="x", note=note))


def flatness(bench: Bench, share: float) -> None:
    """Resident memory over many calls, unary and packed."""
    wanted = bench.settings.flat_calls
    loads = bench.server_loads
    loads.seconds = bench.settings.burst_seconds
    for name, burst in (
        ("unary", loads.raw_aio(KIB, _FLAT_OUTSTANDING)),
        ("packed", loads.raw_stream(KIB, 128, 64)),
    ):
        progress(f"flatness over {wanted} calls, {name}")
        end = time.monotonic() + bench.settings.flat_seconds
        _calls(burst, wanted // 10, end)
        samples = [bench.server.memory_bytes()]
        calls = 0
        while calls < wanted and time.monotonic() < end:
            calls += _calls(burst, wanted // 10, end)
            samples.append(bench.server.memory_bytes())
        growth = (samples[-1] / samples[0] - 1) * 100
        bench.report.server[f"memory over {name} calls"] = {"calls": calls, "resident_bytes": samples}
        bench.report.bars.append(
            Bar(
                f"resident memory over {calls:,} {name} calls: growth",
                growth,
                2.0,
                is_least=False,
                unit="%",
                note=f"{samples[0] / MIB:.1f} -> {samples[-1] / MIB:.1f} MiB{'' if calls >= wanted else '; out of time'}",
            )
        )


def _calls(burst: Callable[[], Burst], wanted: int, end: float) -> int:
    calls = 0
    while calls < wanted and (calls == 0 or time.monotonic() < end):
        calls += burst().calls
    return calls


def mixed(bench: Bench, share: float) -> None:
    """1 KiB calls beside large ones: ours and the echo's, each with its own large calls beside it."""
    settings = bench.settings
    size = settings.large_bytes
    large: dict[str, list[float]] = {"server": [], "floor": []}
    with _bulk() as bulk:

        def beside(name: str, server: ServerProcess, loads: Loads, burst: Callable[[], Burst]) -> Callable[[], Burst]:
            def run() -> Burst:
                loads.seconds = settings.mixed_seconds
                with bulk.calling(Task(server.target, size, 1, settings.mixed_seconds)) as done:
                    result = burst()
                large[name].append(done[0].calls / done[0].seconds)
                return result

            return run

        def alone(loads: Loads, burst: Callable[[], Burst]) -> Callable[[], Burst]:
            def run() -> Burst:
                loads.seconds = settings.mixed_seconds / 2
                return burst()

            return run

        server, floor = bench.server_loads, bench.floor_loads
        progress(f"1 KiB beside {size_name(size)}")
        bursts = interleave(
            {
                "server": beside("server", bench.server, server, server.raw_unary(KIB, 1)),
                "floor": beside("floor", bench.floor, floor, floor.raw_unary(KIB, 1)),
                "server, GetServerInfo": beside("server", bench.server, server, server.raw_info()),
                "server, alone": alone(server, server.raw_unary(KIB, 1)),
                "floor, alone": alone(floor, floor.raw_unary(KIB, 1)),
            },
            settings.mixed_rounds,
        )
    figures = {
        name: {
            f"p{percent}_ms": percentile([latency for burst in rounds for latency in burst.latencies], percent) * 1e3
            for percent in (50, 99)
        }
        | {"calls": sum(burst.calls for burst in rounds)}
        for name, rounds in bursts.items()
    }
    found: dict[str, Any] = {"small": figures, "large_calls_per_second": large}
    bench.report.server[f"1 KiB calls beside {size_name(size)}"] = found
    ratio = paired_ratio(
        [percentile(burst.latencies, 99) for burst in bursts["server"]],
        [percentile(burst.latencies, 99) for burst in bursts["floor"]],
    )
    note = f"{figures['server']['p99_ms']:.1f} ms, the floor's {figures['floor']['p99_ms']:.1f} ms"
    name = f"p99 of 1 KiB calls beside {size_name(size)} calls, to the echo's"
    bench.report.bars.append(Bar(name, ratio, 4.0, is_least=False, unit="x", note=note))


def loop_lag(bench: Bench, share: float) -> None:
    """How long the event loop is blocked by large messages, read from probes inside the servers."""
    settings = bench.settings
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        bulk = stack.enter_context(_bulk())
        server, floor = bench.start(
            lambda: bench.ours("tcp", probe=True), lambda: bench.echo("tcp", probe=True), until=stack
        )
        for size in sorted({min(8 * MIB, settings.large_bytes), settings.large_bytes}):
            progress(f"event loop's lag, {size_name(size)}")

            def watched(process: ServerProcess, size: int = size, seconds: float = settings.lag_seconds) -> _Lag:
                process.probe()
                with bulk.calling(Task(process.target, size, 1, seconds / _LAG_ROUNDS)) as done:
                    pass
                return _Lag(done[0].calls, process.probe())

            watched(server), watched(floor)  # memory that is had for the first time costs both alike, and once
            rounds = interleave({"server": lambda: watched(server), "floor": lambda: watched(floor)}, _LAG_ROUNDS)
            for name, lags in rounds.items():
                found[f"{name}, {size_name(size)}"] = {
                    "calls": sum(lag.calls for lag in lags),
                    "max_ms": max(lag.seen["max_seconds"] for lag in lags) * 1e3,
                    "p99_ms": statistics.median(lag.seen["p99_seconds"] for lag in lags) * 1e3,
                    "blocked_ms_per_call": statistics.median(lag.ms_per_call("blocked") for lag in lags),
                    "core_wait_ms_per_call": statistics.median(lag.ms_per_call("core_wait") for lag in lags),
                }
    bench.report.server["event loop's lag"] = found
    for size in sorted({min(8 * MIB, settings.large_bytes), settings.large_bytes}):
        ours, floors = found[f"server, {size_name(size)}"], found[f"floor, {size_name(size)}"]
        note = (
            f"blocked {ours['blocked_ms_per_call']:.1f} ms a call, the floor {floors['blocked_ms_per_call']:.1f} ms; "
            f"at most {ours['max_ms']:.1f} and {floors['max_ms']:.1f} ms at a time; its thread waited for a core for "
            f"{ours['core_wait_ms_per_call']:.1f} and {floors['core_wait_ms_per_call']:.1f} ms of a call"
        )
        beyond = ours["blocked_ms_per_call"] - floors["blocked_ms_per_call"]
        name = f"{size_name(size)}: how long a call blocks the event loop beyond what grpcio does"
        bench.report.bars.append(Bar(name, beyond, 2.0, is_least=False, unit=" ms", note=note))
