"""A real Prometheus scrapes a live server: every expression of every dashboard and rule gives data, and alerts fire.

Skipped, with the reason, where Prometheus is not installed.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

import lossgrad
from deploy import generate
from lossgrad.metrics import ClientMetrics
from tests.prometheus import RULES, Prometheus, expressions, fetch
from tests.server.serving import HeldWorker, RunningServer

pytestmark = [
    pytest.mark.skipif(not Prometheus.is_installed(), reason="prometheus is not installed"),
    pytest.mark.xdist_group("prometheus"),
]

PATIENCE_SECONDS = 60.0


def eventually(condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def call_in_every_way(address: str, registry: CollectorRegistry, until: threading.Event) -> None:
    """Send requests of every kind, good and bad, until told to stop."""
    with lossgrad.LossClient(address, retries=0, metrics=registry) as client:
        stream = ClientMetrics.of(registry).method("stream")
        while not until.wait(0.05):
            client.smooth_l1([1.0, 2.0], [0.0, math.nan], gradient=True)
            list(client.stream([([1.0], [0.0])] * 3, lossgrad.Huber()))
            with pytest.raises(lossgrad.InvalidRequest):
                client.mse([1.0, 2.0], [0.0])
            client.info()
            # Trouble, which this server does not make by itself.
            stream.retried(lossgrad.Overloaded("full", reason="QUEUE_FULL"))
            stream.reconnected(lossgrad.Unavailable("broken"))


@pytest.fixture(scope="module")
def under_load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Give a Prometheus that has scraped a server under load, and its client, for some seconds."""
    done = threading.Event()
    registry = CollectorRegistry()
    exporter, exporting = start_http_server(0, addr="127.0.0.1", registry=registry)
    with RunningServer(metrics_port=0) as server:
        load = threading.Thread(target=call_in_every_way, args=(server.address, registry, done))
        load.start()
        try:
            targets = [server.server.metrics_address.removeprefix("http://").partition("/")[0]]
            targets.append(f"127.0.0.1:{exporter.server_port}")
            with Prometheus(tmp_path_factory.mktemp("prometheus"), targets) as prometheus:
                scraped = "sum by (instance) (count_over_time(up[1m])) >= 6"
                assert eventually(lambda: len(prometheus.query(scraped)) == len(targets))
                yield prometheus
        finally:
            done.set()
            load.join()
            exporter.shutdown()
            exporter.server_close()
            exporting.join()


@pytest.mark.parametrize("path", sorted(generate.DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_expression_of_a_dashboard_gives_data(under_load: Prometheus, path: Path) -> None:
    empty = [
        expression for expression, _ in expressions(json.loads(path.read_text())) if not under_load.query(expression)
    ]
    assert not empty, "\n".join(empty)


def test_every_recording_rule_has_recorded(under_load: Prometheus) -> None:
    groups = yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    for name in [rule["record"] for group in groups for rule in group["rules"]]:
        assert under_load.query(name), f"{name} has no data"


def test_every_rule_is_evaluated_without_an_error_and_nothing_fires(under_load: Prometheus) -> None:
    rules = [rule for group in under_load.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    for rule in rules:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))
    assert under_load.firing() <= {"LossgradNonFinite"}


def test_the_metrics_are_in_the_form_that_prometheus_recommends(under_load: Prometheus) -> None:
    """The newest sample of every series of the server is there, so that the scrape was read whole."""
    targets = under_load.get("targets", state="active")["activeTargets"]
    assert len(targets) == 2  # the server and its client
    stored = set(under_load.get("label/__name__/values"))
    for target in targets:
        assert target["health"] == "up", target["lastError"]
        lines = fetch(target["scrapeUrl"]).splitlines()
        assert {line.split("{")[0].split(" ")[0] for line in lines if line[:1] not in "#"} <= stored


def impatient(rules: Path, folder: Path) -> list[Path]:
    """Return the rules with everything that takes minutes taking seconds, so that a test can wait for an alert."""
    copies: list[Path] = []
    for path in sorted(rules.glob("*.yml")):
        document = yaml.safe_load(path.read_text())
        for group in document["groups"]:
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "2s"
                rule["expr"] = rule["expr"].replace("[1m]", "[5s]")
        copies.append(folder / path.name)
        copies[-1].write_text(yaml.safe_dump(document))
    return copies


def test_a_worker_that_hangs_and_a_server_that_is_gone_raise_their_alerts(tmp_path: Path) -> None:
    worker = HeldWorker()
    with RunningServer(metrics_port=0, worker=worker) as server:
        target = server.server.metrics_address.removeprefix("http://").partition("/")[0]
        with Prometheus(tmp_path, [target], rules=impatient(RULES, tmp_path)) as prometheus:
            assert eventually(lambda: bool(prometheus.query("lossgrad_ready == 1")))
            worker.hold()
            with lossgrad.LossClient(server.address, retries=0) as client:
                calls = [threading.Thread(target=client.l1, args=([1.0], [0.0])) for _ in range(3)]
                for call in calls:
                    call.start()
                assert eventually(lambda: {"LossgradNoBatches", "LossgradQueueOld"} <= prometheus.firing())
                worker.release()
                for call in calls:
                    call.join()
            assert eventually(lambda: not prometheus.firing() & {"LossgradNoBatches", "LossgradQueueOld"})
            server.stop()
            assert eventually(lambda: "LossgradDown" in prometheus.firing())
