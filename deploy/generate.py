"""Writes the files of this folder that are made from others: the Prometheus operator's rules, from Prometheus' own.

`python deploy/generate.py` writes them; tests/test_kubernetes.py holds the committed ones equal to what this would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

DEPLOY: Final = Path(__file__).parent
RULES: Final = DEPLOY / "prometheus/rules"
PROMETHEUS_RULE: Final = DEPLOY / "kubernetes/components/monitoring/prometheusrule.yaml"

_HEADER: Final = "# Made from deploy/prometheus/rules by `python deploy/generate.py`; change them there.\n"


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


def main() -> None:
    """Write every file."""
    PROMETHEUS_RULE.write_text(prometheus_rule())


if __name__ == "__main__":
    main()
