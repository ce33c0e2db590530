"""What metrics, and tracing, cost the server: the same server with and without them, side by side.

    python -m bench.metrics_cost [--json] [--rounds 15] [--burst-seconds 0.3]

"without" counts nothing at all: what the metrics would be told is not even worked out. "metrics" is the server as it is,
"tracing" the server with --tracing whose sampler takes no request, "1 in 100" and "all" the same with samplers that take so
many; their spans go over OTLP to a collector in a process of its own. All serve the same load at their peak rate, in turns,
and what counts is the processor time that the server takes for a request: a rate on cores that others use says less. The
bar is issue 7's: at the peak rate of requests metrics cost less than 3%.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final
from unittest import mock

from bench.measuring import KIB, Bar, bars_table, interleave, machine, number, paired_ratio, table, to_json
from bench.transport_loads import Burst, Loads
from bench.transport_servers import ChildProcess, ServerProcess

_FLAGS: Final = ("--port", "0", "--metrics-port", "-1", "--log-level", "error")
_SAMPLERS: Final = {
    "tracing": {"OTEL_TRACES_SAMPLER": "always_off"},
    "1 in 100": {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all": {"OTEL_TRACES_SAMPLER": "always_on"},
}
KINDS: Final = ("without", "metrics", *_SAMPLERS)
_LOADS: Final[dict[str, Callable[[Loads], Callable[[], Burst]]]] = {
    "1 KiB requests, 64 to a message": lambda loads: loads.raw_stream(KIB, 256, 64),
    "1 KiB unary calls, 16 at a time": lambda loads: loads.raw_aio(KIB, 16),
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst-seconds", type=float, default=0.3)
    parser.add_argument("--serve", choices=("without", "collector"), help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.serve == "collector":
        collect()
        return
    if arguments.serve:
        serve_without(flags)
        return
    report = measure(arguments.rounds, arguments.burst_seconds)
    print(to_json(report) if arguments.json else shown(report))


def measure(rounds: int, burst_seconds: float) -> dict[str, Any]:
    """Return the microseconds of the server's processor time for a request, by load and kind of server, and the bars."""
    bursts: dict[tuple[str, str], list[Burst]] = {}
    with ExitStack() as stack:
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        servers = {
            "without": ServerProcess("bench.metrics_cost", "--serve", "without", *_FLAGS),
            "metrics": ServerProcess("lossgrad_server", *_FLAGS),
        }
        collector = stack.enter_context(ChildProcess("bench.metrics_cost", "--serve", "collector"))
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.read_line(60)}"}
        for kind, sampler in _SAMPLERS.items():
            with mock.patch.dict(os.environ, {**endpoint, **sampler}):
                servers[kind] = ServerProcess("lossgrad_server", *_FLAGS, "--tracing")
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():
            server.wait_until_ready()
        loads = {kind: stack.enter_context(Loads(server, loop, burst_seconds)) for kind, server in servers.items()}
        for name, load in _LOADS.items():
            cases = {kind: load(loads[kind]) for kind in KINDS}
            interleave(cases, 1)  # warm
            for kind, results in interleave(cases, rounds).items():
                bursts[name, kind] = results
    # Over all rounds: the system counts a process's time in hundredths of a second, too coarse for one burst.
    microseconds = {
        key: 1e6 * sum(one.server_cpu_seconds for one in found) / sum(one.calls for one in found)
        for key, found in bursts.items()
    }
    bars = [
        Bar(f"{kind}, {name}", 100 * (microseconds[name, kind] / microseconds[name, "without"] - 1), 3.0, False, "%")
        for name in _LOADS
        for kind in ("metrics",)
    ]
    rows = [
        {
            "load": name,
            "server": kind,
            "microseconds": value,
            "rate_ratio": paired_ratio([b.rate for b in bursts[name, kind]], [b.rate for b in bursts[name, "without"]]),
        }
        for (name, kind), value in microseconds.items()
    ]
    return {"machine": machine(), "rounds": rounds, "rows": rows, "bars": bars}


def shown(report: dict[str, Any]) -> str:
    """Return the report as text."""
    heads = ("load", "server", "us of its CPU a request", "rate, to without")
    rows = [
        (row["load"], row["server"], number(row["microseconds"]), number(row["rate_ratio"])) for row in report["rows"]
    ]
    return f"{table(heads, rows, left=(0, 1))}\n\n{bars_table(report['bars'])}"


def serve_without(flags: Sequence[str]) -> None:
    """Serve as lossgrad-server does, but count nothing."""
    from lossgrad_server import __main__ as program
    from lossgrad_server.counters import CounterSeries
    from lossgrad_server.histograms import HistogramSeries
    from lossgrad_server.metrics import Metrics
    from lossgrad_server.transport.pipeline import RequestPipeline

    def nothing(*_: Any, **__: Any) -> None:
        """Do nothing."""

    for owner, names in (
        (RequestPipeline, ("look", "count", "_count_all")),
        (Metrics, ("stage", "failed", "batch_done")),
        (CounterSeries, ("inc",)),
        (HistogramSeries, ("observe",)),
    ):
        for name in names:
            setattr(owner, name, nothing)
    sys.argv[1:] = list(flags)
    sys.exit(program.main())


def collect() -> None:
    """Serve as a collector of spans that forgets them; print its address, and end with standard input."""
    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

    class Forgetting(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - its name in the protocol
            return pb.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Forgetting(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(None).wait()


if __name__ == "__main__":
    main()
