"""`lossgrad top`: what servers do right now, from their metrics: latency, rate, batches, queue, device."""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING, Final

from lossgrad.cli.exposition import Interval, Scrape, scrape
from lossgrad.cli.outcome import CheckFailed, ExitCode, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STAGES: Final = ("decode", "queue", "pack", "compute", "unpack", "encode")
_DURATION: Final = "lossgrad_request_duration_seconds"
_BAR_WIDTH: Final = 12
_GAP: Final = 3


def run(options: argparse.Namespace) -> ExitCode:
    """Show it until ctrl-C, or once."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError:
        raise UsageError("lossgrad top needs rich: pip install 'lossgrad[cli]'") from None
    addresses = [metrics_address(text) for text in options.metrics or ["127.0.0.1:8002"]]
    before, failures = scrape(addresses)
    if len(failures) == len(addresses):
        address, why = next(iter(failures.items()))
        raise CheckFailed(f"{address} cannot be read: {why}; is it the server's --metrics-port?")
    console = Console()
    if options.once:
        time.sleep(options.interval)
        after, failures = scrape(addresses)
        console.print(picture(before, after, failures, console))
        return ExitCode.DONE
    waiting = f"lossgrad   measuring for {options.interval:g} s; ctrl-C ends this"
    try:
        with Live(waiting, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            live.refresh()
            while True:
                time.sleep(options.interval)
                after, failures = scrape(addresses)
                live.update(picture(before, after, failures, console), refresh=True)
                before = after
    except KeyboardInterrupt:
        return ExitCode.DONE


def metrics_address(text: str) -> str:
    """Return the URL of a server's metrics. Takes HOST:PORT too. Raises UsageError."""
    address = text if "://" in text else f"http://{text}"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--metrics is {text!r}; give HOST:PORT or an http address")
    host_and_path = address.partition("://")[2]
    return address if "/" in host_and_path else f"{address}/metrics"


def picture(before: Scrape, after: Scrape, failures: dict[str, str], console: Console) -> RenderableType:
    """Return what is shown of the time between two scrapes, laid out for a console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    notes = [Text(f"{address} cannot be read: {why}", style="red") for address, why in failures.items()]
    if not after.servers:
        return Group(Text.assemble(("lossgrad   ", "bold"), ("no server can be read", "red")), "", *notes)
    interval = Interval(before, after)
    ready = int(after.total("lossgrad_ready"))
    devices = ", ".join(after.label_values("lossgrad_build_info", "device")) or "?"
    versions = ", ".join(after.label_values("lossgrad_build_info", "version")) or "?"
    outcomes = interval.rates_by("lossgrad_requests_total", "outcome")
    servers = after.servers + len(failures)
    head = Text.assemble(
        ("lossgrad ", "bold"),
        f"{versions} on {devices}   ",
        (f"{ready} of {servers} ready", "green" if ready == servers else "red"),
    )
    rates = (
        f"{interval.rate('lossgrad_requests_total'):,.0f} requests/s"
        f"   {short(interval.rate('lossgrad_elements_total')).strip()} elements/s"
    )
    head.append(("   " if len(head) + len(rates) + 3 <= console.width else "\n") + rates)
    latency = Table(title="Latency", title_justify="left", box=None, pad_edge=False)
    latency.add_column("", style="dim", no_wrap=True)
    latency.add_column("mean", justify="right", no_wrap=True)
    latency.add_column("median", justify="right", no_wrap=True)
    latency.add_column("99 %", justify="right", no_wrap=True)
    latency.add_column("", justify="left", no_wrap=True)
    total = interval.mean(_DURATION)
    latency.add_row("request", *_times(interval, _DURATION), "")
    for stage in STAGES:
        own = interval.mean("lossgrad_stage_duration_seconds", stage=stage)
        share = own / total if total else math.nan
        latency.add_row(
            stage,
            *_times(interval, "lossgrad_stage_duration_seconds", stage=stage),
            bar(share, _BAR_WIDTH),
            style="cyan",
        )
    state = Table(title="Now", title_justify="left", box=None, pad_edge=False, show_header=False)
    state.add_column(style="dim", no_wrap=True)
    state.add_column(justify="right", no_wrap=True)
    batches = interval.rate("lossgrad_batches_total")
    state.add_row("batches/s", f"{batches:,.0f}")
    state.add_row("requests in a batch", number(interval.mean("lossgrad_batch_requests")))
    state.add_row("elements in a batch", short(interval.mean("lossgrad_batch_elements")))
    state.add_row("requests inside", f"{after.total('lossgrad_inflight_requests'):,.0f}")
    state.add_row("of which wait", f"{after.total('lossgrad_queue_requests'):,.0f}")
    if bulk := after.total("lossgrad_queue_requests", priority="bulk"):
        state.add_row("of these, as bulk", f"{bulk:,.0f}")
    held, most = after.total("lossgrad_inflight_bytes"), after.total("lossgrad_queue_limit_bytes")
    state.add_row("bytes inside", f"{short(held)}B {share_of(held, most)}")
    used = after.total("lossgrad_device_memory_bytes", kind="used")
    if memory := after.total("lossgrad_device_memory_bytes", kind="total"):
        state.add_row("device memory", f"{short(used)}B {share_of(used, memory)}")
    busy = after.total("lossgrad_device_utilization_ratio") / max(after.servers, 1)
    state.add_row("device busy", f"{bar(busy, 10)} {busy:4.0%}")
    for outcome, rate in outcomes.items():
        state.add_row(f"{outcome}/s", f"{rate:,.1f}", style=None if outcome == "ok" else "red")
    if restarts := after.total("lossgrad_worker_restarts_total"):
        state.add_row("worker restarts", f"{restarts:,.0f}", style="red")
    for what, metric, label in (
        ("refused", "lossgrad_rejected_total", "reason"),
        ("computed once more", "lossgrad_batch_retries_total", "reason"),
        ("not finite", "lossgrad_nonfinite_results_total", "kind"),
    ):
        for value, rate in interval.rates_by(metric, label).items():
            state.add_row(f"{what}, {value}/s", f"{rate:,.1f}", style="red")
    losses = Table(title="Losses", title_justify="left", box=None, pad_edge=False, show_header=False)
    losses.add_column(style="dim", no_wrap=True)
    losses.add_column(justify="right", no_wrap=True)
    for loss, rate in interval.rates_by("lossgrad_requests_total", "loss").items():
        losses.add_row(loss, f"{rate:,.1f}/s")
    return Group(head, *notes, "", *_side_by_side([latency, state, *([losses] if losses.row_count else [])], console))


def _side_by_side(tables: list[RenderableType], console: Console) -> list[RenderableType]:
    """Return tables beside each other, as many as fit the console, and the others below with a line between."""
    from rich.measure import Measurement
    from rich.table import Table

    lines: list[list[RenderableType]] = []
    left = 0
    for table in tables:
        width = Measurement.get(console, console.options, table).maximum + _GAP
        if not lines or width > left:
            lines.append([])
            left = console.width + _GAP
        lines[-1].append(table)
        left -= width
    shown: list[RenderableType] = []
    for line in lines:
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        grid.add_row(*line)
        shown += [grid, ""]
    return shown[:-1]


def _times(interval: Interval, histogram: str, **labels: str) -> tuple[str, str, str]:
    return (
        seconds(interval.mean(histogram, **labels)),
        seconds(interval.quantile(0.5, histogram, **labels)),
        seconds(interval.quantile(0.99, histogram, **labels)),
    )


def seconds(value: float) -> str:
    """Return a time with three digits and its unit."""
    if math.isnan(value):
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.2g} us"


def number(value: float) -> str:
    """Return a number, or a dash for none."""
    return "-" if math.isnan(value) else f"{value:,.1f}"


def short(value: float) -> str:
    """Return a number with three digits and k, M, G or T."""
    if math.isnan(value):
        return "-"
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def share_of(part: float, whole: float) -> str:
    """Return a share in percent, in a width of its own; nothing where there is no whole."""
    return f"{part / whole:4.0%}" if whole and not math.isinf(whole) else ""


def bar(share: float, width: int) -> str:
    """Return a share, 0 to 1, as a bar."""
    if math.isnan(share):
        return ""
    return "█" * round(min(max(share, 0.0), 1.0) * width)
