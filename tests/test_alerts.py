"""Prometheus' rules: they are valid, each alert fires when it should and not otherwise, and each has a runbook.

promtool comes with Prometheus; where it is not installed its tests are skipped and say so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import generate

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RUNBOOKS = ROOT / "docs/runbooks.md"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool; skip the test where there is none."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, cwd=PROMETHEUS
    )


def alerts() -> list[dict[str, Any]]:
    """Return every alert rule."""
    groups = (group for path in RULES for group in yaml.safe_load(path.read_text())["groups"])
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def cases() -> list[dict[str, Any]]:
    """Return every case of promtool's tests."""
    document = yaml.safe_load((PROMETHEUS / "tests/alerts_test.yml").read_text())
    return [case for test in document["tests"] for case in test["alert_rule_test"]]


def test_promtool_accepts_the_rules() -> None:
    result = promtool("check", "rules", *RULES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_does_what_its_test_says() -> None:
    result = promtool("test", "rules", "tests/alerts_test.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_alert_that_never_fires_would_be_found(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    rules = tmp_path / "prometheus/rules/alerts.yml"
    rules.write_text(rules.read_text().replace("lossgrad_ready == 0", "lossgrad_ready == 2"))
    result = promtool("test", "rules", tmp_path / "prometheus/tests/alerts_test.yml")
    assert result.returncode != 0
    assert "LossgradNotReady" in result.stdout + result.stderr


@pytest.mark.parametrize("alert", [alert["alert"] for alert in alerts()])
def test_each_alert_is_seen_to_fire_and_not_to_fire(alert: str) -> None:
    own = [case for case in cases() if case["alertname"] == alert]
    assert any(case.get("exp_alerts") for case in own), "no case in which it fires"
    assert any(not case.get("exp_alerts") for case in own), "no case in which it does not"


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_each_alert_has_a_severity_a_summary_and_a_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook"] == f"docs/runbooks.md#{alert['alert'].lower()}"
    assert f"\n## {alert['alert']}\n" in RUNBOOKS.read_text()


def test_no_runbook_is_for_an_alert_that_is_not_there() -> None:
    sections = re.findall(r"^## (Lossgrad\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]


def test_the_operators_rules_are_made_from_these() -> None:
    assert generate.PROMETHEUS_RULE.read_text() == generate.prometheus_rule(), "run python deploy/generate.py"
