"""A Prometheus of a test's own: the real program, on the loopback, with the rules of this repository; what to ask it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

import yaml

RULES = Path(__file__).parents[1] / "deploy/prometheus/rules"


def fetch(url: str) -> str:
    """Return what is at an address of this machine."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
        text: str = response.read().decode()
        return text


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dashboard's panels, without its rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Return every expression of a dashboard, with Grafana's variables replaced, and the legend of what it gives."""
    values = {"$__rate_interval": "1m", "$job": "lossgrad", "$instance": ".+"}
    found: list[tuple[str, str]] = []
    for target in (target for panel in panels(dashboard) for target in panel["targets"]):
        expression = target["expr"]
        for name, value in values.items():
            expression = expression.replace(name, value)
        found.append((expression, target["legendFormat"]))
    return found


class Prometheus:
    """Scrapes targets every second; a context manager."""

    def __init__(self, folder: Path, targets: list[str], *, rules: list[Path] | None = None) -> None:
        program = shutil.which("prometheus")
        assert program is not None, "see is_installed"
        self.address = f"127.0.0.1:{free_port()}"
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules or sorted(RULES.glob("*.yml"))],
            "scrape_configs": [{"job_name": "lossgrad", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    @staticmethod
    def is_installed() -> bool:
        """Return whether the program is there."""
        return shutil.which("prometheus") is not None

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                fetch(f"http://{self.address}/-/ready")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            else:
                return self
        raise TimeoutError("Prometheus did not get ready within 30 s")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of Prometheus' API."""
        text = fetch(f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(text)
        assert answer["status"] == "success", text
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """Return the series that an expression gives now."""
        result: list[Any] = self.get("query", query=expression)["result"]
        return result

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}
