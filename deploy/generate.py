"""Writes the files of this folder that are made by others: Grafana's dashboards, and the Prometheus operator's rules.

`python -m deploy.generate` writes them; the tests hold the committed ones equal to what this would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import capacity, clients, overview

DEPLOY: Final = Path(__file__).parent
RULES: Final = DEPLOY / "prometheus/rules"
PROMETHEUS_RULE: Final = DEPLOY / "kubernetes/components/monitoring/prometheusrule.yaml"

DASHBOARDS: Final = DEPLOY / "grafana/dashboards"

_HEADER: Final = "# Made from deploy/prometheus/rules by `python -m deploy.generate`; change them there.\n"


def prometheus_rule() -> str:
    """Return the PrometheusRule that holds every rule of deploy/prometheus/rules."""
    groups: list[Any] = []
    for path in sorted(RULES.glob("*.yml"), reverse=True):  # recording.yml first
        groups += yaml.safe_load(path.read_text())["groups"]
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "lossgrad", "labels": {"app.kubernetes.io/name": "lossgrad"}},
        "spec": {"groups": groups},
    }
    return _HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def dashboards() -> dict[Path, str]:
    """Return every dashboard as JSON, by the file that it belongs in."""
    files: dict[Path, str] = {}
    for module in (overview, capacity, clients):
        dashboard = module.build().build()
        for index, panel in enumerate(dashboard.panels or [], 1):
            panel.id_val = index
        files[DASHBOARDS / f"{module.UID}.json"] = JSONEncoder(sort_keys=True, indent=1).encode(dashboard) + "\n"
    return files


def main() -> None:
    """Write every file."""
    for path, text in dashboards().items():
        path.write_text(text)
    PROMETHEUS_RULE.write_text(prometheus_rule())


if __name__ == "__main__":
    main()
