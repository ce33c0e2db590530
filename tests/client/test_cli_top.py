"""`lossgrad top`: what it computes from two scrapes is what Prometheus would, and what it shows is what servers did."""

from __future__ import annotations

import io
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from rich.console import Console

import lossgrad
from lossgrad.cli import main, top
from lossgrad.cli.exposition import Interval, Scrape
from lossgrad.cli.outcome import UsageError
from tests.server.serving import RunningServer


def text_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def between(*texts: tuple[str, str]) -> Interval:
    """Return the two seconds between scrapes of servers, each as it was and as it is."""
    before = Scrape({str(index): one for index, (one, _) in enumerate(texts)}, 100.0)
    return Interval(before, Scrape({str(index): one for index, (_, one) in enumerate(texts)}, 102.0))


def test_rates_are_summed_over_servers_and_labels_and_a_restart_is_no_negative_rate() -> None:
    old, new = (
        'x_total{kind="a",w="1"} 10\nx_total{kind="b",w="1"} 5\n',
        'x_total{kind="a",w="1"} 30\nx_total{kind="b",w="1"} 6\n',
    )
    interval = between((old, new), (old, new))
    assert interval.rate("x_total") == 21
    assert interval.rate("x_total", kind="a") == 20
    assert interval.rates_by("x_total", "kind") == {"a": 20.0, "b": 1.0}
    assert between((new, old)).rate("x_total", kind="a") == 0


def test_labels_may_hold_anything() -> None:
    registry = CollectorRegistry()
    counter = Counter("odd", "Help.", ("name",), registry=registry)
    counter.labels('a "quoted" \\ name, {x="1"}').inc(3)
    scraped = Scrape({"a": text_of(registry)}, 0.0)
    assert scraped.total("odd_total") == 3


@given(st.lists(st.floats(1e-5, 2.0), min_size=1, max_size=40), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_quantiles_lie_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = (0.001, 0.01, 0.1, 0.5, 1.0)
    registry = CollectorRegistry()
    histogram = Histogram("took", "Help.", registry=registry, buckets=bounds)
    histogram.observe(0.05)  # from before
    old = text_of(registry)
    for value in values:
        histogram.observe(value)
    interval = between((old, text_of(registry)))
    assert interval.mean("took") == pytest.approx(sum(values) / len(values))
    found = interval.quantile(share, "took")
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    upper = next((bound for bound in bounds if true <= bound), bounds[-1])
    lower = max((bound for bound in (0.0, *bounds) if bound < true), default=0.0)
    assert min(lower, bounds[-1]) <= found <= upper


def test_nothing_observed_is_no_number() -> None:
    registry = CollectorRegistry()
    Histogram("took", "Help.", registry=registry)
    interval = between((text_of(registry), text_of(registry)))
    assert math.isnan(interval.mean("took"))
    assert math.isnan(interval.quantile(0.5, "took"))
    assert math.isnan(interval.quantile(0.5, "other"))


@pytest.mark.parametrize(
    ("value", "shown"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (4e-7, "0.4 us"), (math.nan, "-")]
)
def test_times_are_shown_in_the_unit_that_fits(value: float, shown: str) -> None:
    assert top.seconds(value) == shown


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("127.0.0.1:8002", "http://127.0.0.1:8002/metrics"),
        ("http://a:1", "http://a:1/metrics"),
        ("https://a/b/metrics", "https://a/b/metrics"),
    ],
)
def test_a_server_is_named_as_people_do(given: str, address: str) -> None:
    assert top.metrics_address(given) == address


def test_other_addresses_are_refused() -> None:
    with pytest.raises(UsageError, match="file:///etc/passwd"):
        top.metrics_address("file:///etc/passwd")


def test_top_shows_what_a_server_did(capsys: pytest.CaptureFixture[str]) -> None:
    done = threading.Event()

    def load(address: str) -> None:
        with lossgrad.LossClient(address) as client:
            while not done.wait(0.01):
                client.huber([1.0, 2.0], [0.0, 0.0])
                with pytest.raises(lossgrad.InvalidRequest):
                    client.mse([1.0, 2.0], [0.0])

    with RunningServer(metrics_port=0) as server:
        thread = threading.Thread(target=load, args=(server.address,))
        thread.start()
        time.sleep(0.3)
        address = server.server.metrics_address
        assert main(["top", "--metrics", address, "--once", "--interval", "0.5"]) == 0
        done.set()
        thread.join()
    shown = capsys.readouterr().out
    assert f"lossgrad {lossgrad.__version__} on cpu" in shown
    assert "1 of 1 ready" in shown
    for word in ("request ", "queue", "compute", "huber", "ok/s", "invalid/s", "device busy"):
        assert word in shown, shown
    assert " us" in shown or " ms" in shown


def exposition(requests: int) -> str:
    return (
        'lossgrad_ready 1\nlossgrad_build_info{version="1.2",device="cpu"} 1\n'
        f'lossgrad_requests_total{{loss="l1",outcome="ok"}} {requests}\n'
        "lossgrad_inflight_bytes 5e8\nlossgrad_queue_limit_bytes 1e9\n"
        'lossgrad_device_memory_bytes{kind="used"} 3e10\nlossgrad_device_memory_bytes{kind="total"} 4e10\n'
    )


def shown_at(width: int, after: Scrape, failures: dict[str, str] | None = None) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(top.picture(Scrape({"a": exposition(0)}, 0.0), after, failures or {}, console))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(("width", "beside"), [(120, 3), (70, 2), (40, 1)])
def test_what_does_not_fit_beside_goes_below(width: int, beside: int) -> None:
    lines = shown_at(width, Scrape({"a": exposition(20)}, 2.0))
    assert max(map(len, lines)) <= width
    (titles,) = [line.split() for line in lines if line.startswith("Latency")]
    assert titles == ["Latency", "Now", "Losses"][:beside]
    text = "\n".join(lines)
    assert "10 requests/s   0 elements/s" in text
    assert "500 MB  50%" in text
    assert "30 GB  75%" in text


def test_servers_that_cannot_be_read_are_told_first_and_nothing_is_made_up() -> None:
    failures = {"http://b/metrics": "Connection refused"}
    some = shown_at(100, Scrape({"a": exposition(20)}, 2.0), failures)
    assert "1 of 2 ready" in some[0]
    assert some[1] == "http://b/metrics cannot be read: Connection refused"
    assert shown_at(100, Scrape({}, 2.0), failures) == ["lossgrad   no server can be read", "", some[1]]


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--metrics", "127.0.0.1:1", "--once"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "http://127.0.0.1:1/metrics cannot be read" in error
    assert "--metrics-port" in error
