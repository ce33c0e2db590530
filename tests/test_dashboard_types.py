"""The dashboards are what Grafana's own types, in TypeScript, say that dashboards are; and what is not one would be found.

Needs node and npm, and npm's registry the first time; skipped with the reason where they are not.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from typing import Any

import pytest
import yaml

from deploy import check_dashboards


def of_type(dashboard: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a dashboard's first panel of a type."""
    panel: dict[str, Any] = next(panel for panel in dashboard["panels"] if panel["type"] == kind)
    return panel


def spoilt() -> dict[str, dict[str, Any]]:
    """Return dashboards with one fault each, by the word that the fault is about."""
    (_, good), *_ = sorted(check_dashboards.committed().items(), key=lambda item: item[0] != "lossgrad")
    faults = {word: copy.deepcopy(good) for word in ("refreshes", "gridPos", "tooltip", "fillOpacity", "orientation")}
    faults["refreshes"]["refreshes"] = faults["refreshes"].pop("refresh")  # a key that does not exist
    of_type(faults["gridPos"], "stat")["gridPos"]["w"] = "4"  # a value of the wrong type
    timeseries = of_type(faults["tooltip"], "timeseries")
    timeseries.setdefault("options", {})["tooltip"] = {"mode": "some"}  # a word that is none of those allowed
    custom = of_type(faults["fillOpacity"], "timeseries")["fieldConfig"]["defaults"].setdefault("custom", {})
    custom["fillOpacity"] = True
    of_type(faults["orientation"], "stat").setdefault("options", {})["orientation"] = "diagonal"
    return faults


def test_the_dashboards_are_what_grafanas_types_say_and_faults_are_found() -> None:
    try:
        check_dashboards.install()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install Grafana's types here: {error} {error.stderr!s}")
    bad = spoilt()
    found = check_dashboards.faults(
        check_dashboards.committed() | {f"spoilt-{word}": each for word, each in bad.items()}
    )
    lines = [line for line in found.splitlines() if re.match(r"\S", line)]
    assert not [line for line in lines if not line.startswith("spoilt-")], found
    for word in bad:
        assert any(line.startswith(f"spoilt-{word}.ts") for line in lines), f"{word} was not found:\n{found}"


def test_a_panel_without_types_is_refused() -> None:
    with pytest.raises(check_dashboards.UnknownPanel, match="piechart"):
        check_dashboards.typescript({"panels": [{"id": 1, "type": "piechart", "fieldConfig": {"defaults": {}}}]})


def test_the_types_are_of_the_grafana_that_runs_and_locked() -> None:
    wanted = json.loads((check_dashboards.SCHEMA / "package.json").read_text())["devDependencies"]
    stack = yaml.safe_load((check_dashboards.DEPLOY.parent / "docker-compose.yml").read_text())
    assert stack["services"]["grafana"]["image"] == f"grafana/grafana:{wanted['@grafana/schema']}"
    lock = json.loads((check_dashboards.SCHEMA / "package-lock.json").read_text())["packages"]
    assert lock.pop("")["devDependencies"] == wanted
    for name, package in lock.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, f"{name} names a registry"
