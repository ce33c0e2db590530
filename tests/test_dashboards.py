"""Grafana's dashboards: made from typed code, whole, and every expression reads metrics that a server exports.

tests/test_prometheus.py asks a live Prometheus for each of them.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import lossgrad
from deploy import generate, screenshot
from lossgrad.metrics import ClientMetrics
from lossgrad_server import config
from lossgrad_server.app import Server
from tests.prometheus import expressions, fetch, panels

DASHBOARDS = sorted(generate.DASHBOARDS.glob("*.json"))
OWN_LABELS = {"job", "instance"}  # put on by Prometheus


def test_the_dashboards_are_what_the_code_makes() -> None:
    made = generate.dashboards()
    assert set(made) == set(DASHBOARDS), "run python -m deploy.generate"
    for path, text in made.items():
        assert path.read_text() == text, f"{path.name} is not what the code makes; run python -m deploy.generate"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafanas_own_types_read_a_dashboard_without_loss(path: Path) -> None:
    read = Dashboard.from_json(json.loads(path.read_text()))
    assert json.loads(JSONEncoder(sort_keys=True).encode(read)) == json.loads(path.read_text())


async def exported() -> dict[str, set[str]]:
    """Return every sample name that a server and its client export after calls of every kind, with its labels."""
    server = Server(config.ServerConfig(port=0, metrics_port=0, device="cpu"))
    await server.start()
    registry = CollectorRegistry()
    try:
        async with lossgrad.AsyncLossClient(server.grpc_address, metrics=registry) as client:
            await client.smooth_l1([1.0, 2.0], [0.0, math.nan], gradient=True)
            async for _ in client.stream([([1.0], [0.0])], lossgrad.SmoothL1()):
                pass
            with pytest.raises(lossgrad.InvalidRequest):
                await client.mse([1.0, 2.0], [0.0])
        text = await asyncio.to_thread(fetch, server.metrics_address)
    finally:
        await server.stop()
    # What only a client in trouble has.
    stream = ClientMetrics.of(registry).method("stream")
    stream.retried(lossgrad.Overloaded("full", reason="QUEUE_FULL"))
    stream.reconnected(lossgrad.Unavailable("broken"))
    with stream.waiting():
        pass
    samples: dict[str, set[str]] = {}
    for family in [*text_string_to_metric_families(text), *registry.collect()]:
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_metric_and_label_of_a_dashboard_is_one_that_a_server_exports(path: Path) -> None:
    samples = asyncio.run(exported())
    for expression, legend in expressions(json.loads(path.read_text())):
        names = set(re.findall(r"\b(?:lossgrad|grpc|process)_\w+", expression)) - {
            "grpc_method",
            "grpc_type",
            "grpc_code",
            "grpc_service",
        }
        assert names, f"{expression} reads no metric"
        assert names <= set(samples), f"{names - set(samples)} in {expression}"
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        labels |= set(re.findall(r"[{,]\s*(\w+)\s*[=!]", expression)) - {"job", "instance"}
        labels |= set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))
        known = OWN_LABELS.union(*(samples[name] for name in names))
        assert labels <= known, f"{labels - known} is no label of {names}: {expression}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, f"{panel['title']} is cut off"
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in panels(dashboard):
        assert panel["description"], f"{panel['title']} does not say what it shows"
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"], f"{panel['title']} has no unit"
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_the_picture_in_the_documents_is_of_panels_that_there_are() -> None:
    shown = screenshot.expressions()
    assert len(shown) == len(screenshot.PANELS)
    every = {re.sub(r"\[\w+\]", "[10s]", text) for text, _ in expressions(json.loads(DASHBOARDS[-1].read_text()))}
    assert set(shown) <= every
    assert "0.99," in shown[0]
