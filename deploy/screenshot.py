"""Takes docs/overview.png: the main panels' graphs of a server under load, drawn by Prometheus' own pages in Chromium.

    python -m deploy.screenshot [FILE]

Starts a server, a Prometheus and a load, all on the loopback, for a minute and a half: first callers that wait for each
answer, then streams and large tensors beside them, then the first alone again. Grafana draws the same expressions with more
care. Needs prometheus and chromium (Debian's packages), and the development environment.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

import lossgrad
from deploy.generate import DASHBOARDS
from tests.prometheus import Prometheus

ROOT: Final = Path(__file__).resolve().parents[1]
PANELS: Final = (
    "Request duration",
    "Where a request's time goes",
    "Calls by method",
    "Requests in a batch",
    "Batches by what closed them",
)
QUIET_SECONDS: Final = 30.0
BUSY_SECONDS: Final = 35.0
GRAPH_HEIGHT: Final = 770  # of one panel of Prometheus' page, in pixels
WIDTH: Final = 1100


def expressions() -> list[str]:
    """Return the first expression of each of PANELS, for a rate over ten seconds; PANELS' first with its 99th percentile."""
    dashboard = json.loads((DASHBOARDS / "lossgrad.json").read_text())
    targets = {panel["title"]: panel["targets"] for panel in dashboard["panels"] if panel["title"] in PANELS}
    found = [targets[title][2 if title == "Request duration" else 0]["expr"] for title in PANELS]
    for variable, value in {"$__rate_interval": "10s", "$job": "lossgrad", "$instance": ".+"}.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


def call(target: str, elements: int, until: threading.Event, *, stream: bool = False) -> None:
    """Send pairs of tensors until told to stop: one by one, or in streams."""
    input, other = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    with lossgrad.LossClient(target) as client:
        while not until.is_set():
            if stream:
                for _ in client.stream([(input, other)] * 500, lossgrad.SmoothL1()):
                    pass
            else:
                client.smooth_l1(input, other, gradient=True)
                until.wait(0.01)


def load(target: str) -> None:
    """Call a server: calmly, then hard, then calmly."""
    done, calm = threading.Event(), threading.Event()
    always = [threading.Thread(target=call, args=(target, 1000, done)) for _ in range(2)]
    hard = [
        threading.Thread(target=call, args=(target, 256, calm), kwargs={"stream": True}),
        threading.Thread(target=call, args=(target, 2_000_000, calm)),
    ]
    for thread in always:
        thread.start()
    time.sleep(QUIET_SECONDS)
    for thread in hard:
        thread.start()
    time.sleep(BUSY_SECONDS)
    calm.set()
    for thread in hard:
        thread.join()
    time.sleep(QUIET_SECONDS)
    done.set()
    for thread in always:
        thread.join()


def draw(prometheus: str, output: Path) -> None:
    """Have Chromium draw the expressions' graphs, one below the other."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise FileNotFoundError("chromium is not installed")
    seconds = int(2 * QUIET_SECONDS + BUSY_SECONDS)
    query: list[tuple[str, str]] = []
    for index, expression in enumerate(expressions()):
        settings = {"expr": expression, "tab": "0", "stacked": "0", "range_input": f"{seconds}s", "step_input": "1"}
        query += [(f"g{index}.{name}", value) for name, value in settings.items()]
    page = "http://" + prometheus + "/graph?" + urllib.parse.urlencode(query)
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(  # noqa: S603 - the browser
            [
                chromium,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *(f"--window-size={WIDTH},{GRAPH_HEIGHT * len(PANELS)}", "--virtual-time-budget=20000"),
                *(f"--screenshot={output}", page),
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )


def main() -> None:
    """Start everything, load it, and draw."""
    output = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "docs/overview.png"
    command = [sys.executable, "-m", "lossgrad_server", "--port", "0", "--metrics-port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    try:
        assert server.stdout is not None  # noqa: S101 - for the type checker
        _, _, ready = server.stdout.readline().strip().partition(" on ")
        target, _, metrics = ready.partition(", metrics http://")
        scraped = [metrics.partition("/")[0]]
        with tempfile.TemporaryDirectory() as folder, Prometheus(Path(folder), scraped) as prometheus:
            load(target)
            draw(prometheus.address, output)
    finally:
        server.terminate()
        server.wait(30)
    with Image.open(output) as picture:  # a few colours are all there are, and a third of the size
        few = picture.convert("RGB").quantize(64)
    few.save(output, optimize=True)
    sys.stdout.write(f"{output}: {output.stat().st_size >> 10} KiB\n")


if __name__ == "__main__":
    main()
