"""The metrics of several processes as those of one: sums that never fall, and gauges that keep their meaning."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from lossgrad_server.counters import Counter
from lossgrad_server.histograms import Histogram
from lossgrad_server.metrics import Metrics
from lossgrad_server.processes import merging
from lossgrad_server.processes.merging import Merge, MergedMetrics, read, told
from tests.server.scraping import Scrape


class Registry(CollectorRegistry):
    """The registry of one process, with one counter and one histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter("lossgrad_requests", "Requests.", ("loss",), registry=self)
        self.histogram = Histogram("lossgrad_seconds", "Time.", ("loss",), (0.5, 1.0))
        self.register(self.histogram)


class FakePlace:
    """A place whose process is told by the test what to answer."""

    def __init__(self, name: str, registry: CollectorRegistry | None) -> None:
        self.name = name
        self.registry = registry
        self.life = 1
        self.is_silent = False
        self.restarts = 0
        self._pipes: list[socket.socket] = []

    @property
    def is_serving(self) -> bool:
        return self.registry is not None

    def ask_for_metrics(self) -> tuple[int, socket.socket | None]:
        if self.registry is None:
            return self.life, None
        ours, theirs = socket.socketpair()
        if self.is_silent:
            self._pipes.append(theirs)
        else:
            threading.Thread(target=self._answer, args=(theirs, told(self.registry))).start()
        return self.life, ours

    @staticmethod
    def _answer(pipe: socket.socket, text: bytes) -> None:
        with pipe:
            pipe.sendall(text)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()


def merged(*registries: CollectorRegistry) -> Scrape:
    """Return what a scrape of processes with these registries shows."""
    return scrape([FakePlace(str(index), registry) for index, registry in enumerate(registries)])


def scrape(places: list[FakePlace], metrics: MergedMetrics | None = None) -> Scrape:
    registry = CollectorRegistry()
    registry.register(metrics or MergedMetrics(places))
    return Scrape(generate_latest(registry).decode())


def test_counters_and_histograms_are_added_up() -> None:
    first, second = Registry(), Registry()
    first.counter.labels("l1").inc(3)
    second.counter.labels("l1").inc(4)
    second.counter.labels("mse").inc(5)
    first.histogram.labels("l1").observe(0.25, 2)
    second.histogram.labels("l1").observe(0.25)
    second.histogram.labels("l1").observe(0.75)
    second.histogram.labels("l1").observe(8.0)
    shown = merged(first, second)
    assert shown.types["lossgrad_requests"] == "counter"
    assert shown("lossgrad_requests_total", loss="l1") == 7
    assert shown("lossgrad_requests_total", loss="mse") == 5
    assert shown.types["lossgrad_seconds"] == "histogram"
    assert shown("lossgrad_seconds_bucket", loss="l1", le="0.5") == 3
    assert shown("lossgrad_seconds_bucket", loss="l1", le="1.0") == 4
    assert shown("lossgrad_seconds_bucket", loss="l1", le="+Inf") == 5
    assert shown("lossgrad_seconds_count", loss="l1") == 5
    assert shown("lossgrad_seconds_sum", loss="l1") == 0.25 * 3 + 0.75 + 8.0


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("lossgrad_queue_bytes", (3, 4), 7),
        ("lossgrad_inflight_requests", (3, 4), 7),
        ("lossgrad_queue_limit_bytes", (512, 512), 1024),
        ("lossgrad_queue_oldest_seconds", (0.5, 2.5), 2.5),
        ("lossgrad_ready", (0, 1), 1),
        ("lossgrad_ready", (0, 0), 0),
        ("lossgrad_tls_certificate_expiry_timestamp_seconds", (2e9, 1.9e9), 1.9e9),
        ("lossgrad_device_utilization_ratio", (0.25, 0.75), 0.5),
    ],
)
def test_a_gauge_of_the_server_says_of_all_processes_what_it_says_of_one(
    name: str, values: tuple[float, ...], expected: float
) -> None:
    registries = [CollectorRegistry() for _ in values]
    for registry, value in zip(registries, values, strict=True):
        Gauge(name, "A gauge.", registry=registry).set(value)
    assert merged(*registries)(name) == expected


@pytest.mark.parametrize("name", ["lossgrad_worker_up", "process_open_fds", "lossgrad_of_tomorrow"])
def test_a_gauge_of_a_process_keeps_processes_apart(name: str) -> None:
    registries = [CollectorRegistry() for _ in range(2)]
    for value, registry in enumerate(registries, 7):
        Gauge(name, "A gauge.", ("device",), registry=registry).labels("cpu").set(value)
    shown = merged(*registries)
    assert [shown(name, device="cpu", process=process) for process in "01"] == [7, 8]


def test_what_the_parent_itself_takes_is_told_too() -> None:
    shown = merged(Registry())
    assert (shown("process_resident_memory_bytes", process="parent") or 0) > 1 << 20
    assert shown("lossgrad_process_up", process="0") == 1
    assert shown("lossgrad_process_restarts_total", process="0") == 0


def test_build_info_is_there_once() -> None:
    info = {"version": "1", "device": "cpu"}
    shown = merged(*[Metrics(device="cpu", build_info=info).registry for _ in range(3)])
    assert shown.of("lossgrad_build_info") == {frozenset(info.items()): 1.0}


def test_every_rule_is_for_a_gauge_that_a_server_has() -> None:
    metrics = Metrics(device="cpu", build_info={"version": "1"})
    metrics.watch_certificates(SimpleNamespace(expires=datetime.now(UTC)))
    metrics.watch(
        SimpleNamespace(
            waiting_requests=0, waiting_bytes=0, admitted_requests=0, admitted_bytes=0, oldest_wait_seconds=0.0
        )
    )
    gauges = {metric.name for metric in metrics.registry.collect() if metric.type == "gauge"}
    assert gauges >= merging._SUMMED | merging._LARGEST | merging._LEAST | merging._MEAN
    assert read(told(metrics.registry))  # all that a server has can be told


def test_a_sum_does_not_fall_when_a_process_ends_and_another_begins_at_nothing() -> None:
    places = [FakePlace("0", Registry()), FakePlace("1", Registry())]
    metrics = MergedMetrics(places)
    for place in places:
        assert isinstance(place.registry, Registry)
        place.registry.counter.labels("l1").inc(10)
        place.registry.histogram.labels("l1").observe(0.25)
    seen: list[tuple[float | None, float | None]] = []

    def look() -> None:
        shown = scrape(places, metrics)
        seen.append((shown("lossgrad_requests_total", loss="l1"), shown("lossgrad_seconds_count", loss="l1")))

    look()
    places[0].registry = None  # killed
    look()
    for _ in range(2):  # and again
        another = Registry()
        places[0].registry = another
        places[0].life += 1
        look()
        another.counter.labels("l1").inc(5)
        another.histogram.labels("l1").observe(0.25)
        look()
    assert seen == [(20, 2), (20, 2), (20, 2), (25, 3), (25, 3), (30, 4)]


def test_a_process_that_does_not_answer_counts_with_what_it_told_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_ANSWER_SECONDS", 0.05)
    registries = [Registry(), Registry()]
    for registry in registries:
        registry.counter.labels("l1").inc(10)
        Gauge("lossgrad_queue_bytes", "Bytes.", registry=registry).set(100)
    places = [FakePlace(str(index), registry) for index, registry in enumerate(registries)]
    metrics = MergedMetrics(places)
    scrape(places, metrics)
    places[0].is_silent = True
    shown = scrape(places, metrics)
    assert shown("lossgrad_requests_total", loss="l1") == 20
    assert shown("lossgrad_queue_bytes") == 100  # what it is at, nobody knows
    places[0].close()


def test_before_there_is_any_process_the_server_is_not_ready() -> None:
    shown = scrape([FakePlace("0", None)])
    assert shown("lossgrad_ready") == 0
    assert shown("lossgrad_process_up", process="0") == 0


def test_in_openmetrics_the_newest_exemplar_of_a_bucket_is_shown() -> None:
    first, second = Registry(), Registry()
    for registry, trace in ((second, "newer"), (first, "newest")):
        series = registry.histogram.labels("l1")
        series.observe(0.25)
        series.exemplar(0.25, trace)
    second.histogram.labels("l1").exemplar(0.75, "alone")
    merge = CollectorRegistry()
    merge.register(MergedMetrics([FakePlace("0", first), FakePlace("1", second)]))
    text = openmetrics.generate_latest(merge).decode()  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call] # it is strict
    exemplars = {
        sample.labels["le"]: sample.exemplar.labels["trace_id"]
        for sample in families["lossgrad_seconds"].samples
        if sample.exemplar is not None
    }
    assert exemplars == {"0.5": "newest", "1.0": "alone"}


def test_numbers_cross_as_they_are() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("lossgrad_of_tomorrow", 'With "quotes"\nand lines.', ("name",), registry=registry)
    values = {"tenth": 0.1, "large": 2.0**60 + 2**8, "infinite": float("inf"), "least": 5e-324, 'a"b\\c\n': 1.0}
    for name, value in values.items():
        gauge.labels(name).set(value)
    (metric,) = read(told(registry))
    assert {sample.labels["name"]: sample.value for sample in metric.samples} == values
    merge = Merge()
    merge.add([metric], "7")
    (again,) = merge.metrics()
    assert again.documentation == metric.documentation
    assert {sample.labels["process"] for sample in again.samples} == {"7"}


def test_half_of_an_answer_is_none() -> None:
    with pytest.raises(ValueError, match="line 1"):
        read(told(Registry())[:-1])
