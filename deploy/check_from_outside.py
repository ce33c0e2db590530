"""The callers of check-containers.sh: what the SDK sees of a server in a container, from outside it.

Each command prints one line with its figures and ends with 1 if something is wrong. Expected values are computed here,
with NumPy in float64, from the loss's definition.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import lossgrad
from lossgrad.errors import InvalidRequest, LossgradError, Overloaded, Unavailable

BETA = 0.5
LOAD_SECONDS = 20.0
EXHAUST_CALLERS = 8
EXHAUST_ELEMENTS = 8 * 1024 * 1024  # 32 MiB a tensor, three to a call: 768 MiB at a time
DASHBOARDS = Path(__file__).parent / "grafana/dashboards"
DASHBOARD_TRAFFIC_SECONDS = 20.0


def smooth_l1(input: npt.NDArray[np.float32], target: npt.NDArray[np.float32]) -> tuple[float, npt.NDArray[np.float64]]:
    """Return the mean smooth L1 loss and its gradient, as torch.nn.SmoothL1Loss defines them."""
    difference = input.astype(np.float64) - target.astype(np.float64)
    size = np.abs(difference)
    losses = np.where(size < BETA, 0.5 * size * size / BETA, size - 0.5 * BETA)
    return float(losses.mean()), np.clip(difference / BETA, -1.0, 1.0) / difference.size


class CheckError(Exception):
    """Something is not as it should be; the message says what."""


def check(holds: bool, otherwise: str) -> None:
    """Raise CheckError with the message `otherwise` unless it holds."""
    if not holds:
        raise CheckError(otherwise)


class Pair:
    """A pair of tensors, and what must come back for them."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        random = np.random.default_rng(seed)
        self.input = random.standard_normal(shape).astype(np.float32)
        self.target = random.standard_normal(shape).astype(np.float32)
        self.loss, self.gradient = smooth_l1(self.input, self.target)

    def compute(self, client: lossgrad.LossClient, timeout: float | None = None) -> None:
        """Have it computed. Raises CheckError if the answer is wrong."""
        result = client.smooth_l1(self.input, self.target, beta=BETA, gradient=True, timeout=timeout)
        loss, gradient = float(result.loss), np.asarray(result.gradient, np.float64)
        check(abs(loss - self.loss) <= 1e-6 * self.loss, f"the loss is {loss}, it should be {self.loss}")
        check(gradient.shape == self.gradient.shape, f"the gradient has shape {gradient.shape}")
        wrong = ~np.isclose(gradient, self.gradient, rtol=1e-5, atol=1e-12)
        check(not wrong.any(), f"{wrong.sum()} of {wrong.size} elements of the gradient are wrong")


def compute(target: str) -> str:
    """Have tensors of several sizes computed, up to one that gRPC's own limit would refuse."""
    shapes = [(), (7,), (64, 3, 5), (1000, 1000), (4, 1024, 1024)]
    with lossgrad.LossClient(target) as client:
        for seed, shape in enumerate(shapes):
            Pair(shape, seed).compute(client)
    return f"{len(shapes)} losses and gradients right, the largest of {np.prod(shapes[-1])} elements"


def metrics(url: str) -> str:
    """Read the metrics, which must say that the server is ready and has answered."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own address
        lines = response.read().decode().splitlines()
    values = dict(line.rpartition(" ")[::2] for line in lines if not line.startswith("#"))
    check(values["lossgrad_ready"] == "1.0", "lossgrad_ready is not 1")
    answered = sum(
        float(v) for name, v in values.items() if name.startswith("lossgrad_requests_total{") and 'outcome="ok"' in name
    )
    check(answered > 0, "no request is counted")
    return f"{len(values)} series, {answered:.0f} requests counted"


def sbom(path: str) -> str:
    """Read an image's bill of materials: valid, and with the hash of every Python package's archive."""
    text = Path(path).read_text()
    flaw = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    check(flaw is None, f"it is not CycloneDX 1.6: {flaw}")
    components = json.loads(text)["components"]
    python = [component for component in components if component["purl"].startswith("pkg:pypi/")]
    unknown = [component["name"] for component in python if "hashes" not in component]
    check(not unknown, f"nothing says what archives these came from: {unknown}")
    names = {component["name"] for component in components}
    check({"torch", "numba", "grpcio", "python", "tini", "libc6"} <= names, f"it lacks some of what is there: {names}")
    return f"{len(python)} Python packages with their archives' hashes, {len(components) - len(python)} others"


def load(target: str) -> str:
    """Call without a pause until the server is gone. What was begun must be answered, and answered right."""
    pairs = [Pair((1000,), 1), Pair((1000,), 2), Pair((4, 1024, 1024), 3)]
    answered: Counter[int] = Counter()
    refused: list[str] = []
    broken: list[str] = []

    def call(pair: Pair) -> None:
        # No retries, so that every call shows what became of it.
        with lossgrad.LossClient(target, retries=0) as client:
            deadline = time.monotonic() + LOAD_SECONDS
            while time.monotonic() < deadline:
                try:
                    pair.compute(client)
                except Unavailable as error:
                    refused.append(str(error).splitlines()[0])
                    return
                except (LossgradError, CheckError) as error:
                    broken.append(f"{type(error).__name__}: {error}")
                    return
                answered[pair.input.size] += 1

    run_together([threading.Thread(target=call, args=(pair,)) for pair in pairs])
    report = ", ".join(f"{count} of {size} elements" for size, count in sorted(answered.items()))
    check(not broken, f"broken calls: {broken}")
    check(len(refused) == len(pairs), "the server was never gone")
    check(set(answered) == {pair.input.size for pair in pairs}, f"not every caller was answered before: {report}")
    # What gRPC says of a call for which it found no server; one that was begun and then cut off says otherwise.
    cut_off = [text for text in refused if not text.startswith("connections to all backends failing")]
    check(not cut_off, f"calls cut off: {cut_off}")
    return f"answered right: {report}; then refused, none cut off"


def exhaust(target: str) -> str:
    """Send far more at a time than fits. An answer is right or there is none; callers learn that they may try again."""
    outcomes: Counter[str] = Counter()
    pairs = [Pair((EXHAUST_ELEMENTS,), seed) for seed in range(2)]

    def call(pair: Pair) -> None:
        with lossgrad.LossClient(target, retries=0) as client:
            try:
                pair.compute(client, timeout=60)
                outcomes["right"] += 1
            except (Unavailable, Overloaded) as error:
                outcomes[type(error).__name__] += 1
            except (LossgradError, CheckError) as error:
                outcomes[f"{type(error).__name__}: {error}"] += 1

    run_together([threading.Thread(target=call, args=(pairs[index % 2],)) for index in range(EXHAUST_CALLERS)])
    report = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    check(set(outcomes) <= {"right", "Unavailable", "Overloaded"}, report)
    return f"{EXHAUST_CALLERS} calls of {EXHAUST_ELEMENTS * 12 >> 20} MiB at a time: {report}"


def dashboards(target: str, prometheus: str) -> str:
    """Call in every way that the dashboards show, then ask Prometheus for what they show of servers; each must give data."""
    pair = Pair((1000,), 1)
    nothing = np.full(3, np.nan, np.float32)
    with lossgrad.LossClient(target) as client:
        deadline = time.monotonic() + DASHBOARD_TRAFFIC_SECONDS
        while time.monotonic() < deadline:
            pair.compute(client)
            client.compute(pair.input, pair.target, [lossgrad.Huber(), lossgrad.L1(), lossgrad.MSE()])
            client.mse(nothing, nothing)
            for result in client.stream([(pair.input, pair.target)] * 100, lossgrad.SmoothL1(BETA)):
                check(abs(float(result.loss) - pair.loss) <= 1e-6 * pair.loss, "a loss of the stream is wrong")
            try:
                client.smooth_l1(pair.input, pair.target[1:])
            except InvalidRequest:
                pass
            else:
                raise CheckError("unequal shapes are not refused")
    up = ask(prometheus, 'up{job="lossgrad"}')
    check([sample["value"][1] for sample in up] == ["1"], f"Prometheus does not reach the server: {up}")
    asked = 0
    for path in sorted(DASHBOARDS.glob("*.json")):
        panels = json.loads(path.read_text())["panels"]
        for title, query in ((panel["title"], query) for panel in panels for query in panel.get("targets", [])):
            expression = query["expr"].replace("$__rate_interval", "20s")
            expression = expression.replace("$job", "lossgrad").replace("$instance", ".+")
            if "_client_" in expression:
                continue  # of applications that export their client's metrics; there is none in the stack
            check(bool(ask(prometheus, expression)), f"{path.stem}, {title}: no data for {expression}")
            asked += 1
    return f"Prometheus reaches the server; {asked} expressions of the dashboards give data"


def ask(prometheus: str, expression: str) -> list[Any]:
    """Return the samples that an expression has now."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=10) as response:  # noqa: S310 - our own
        answer = json.load(response)
    check(answer["status"] == "success", f"{expression}: {answer}")
    samples: list[Any] = answer["data"]["result"]
    return samples


def run_together(threads: list[threading.Thread]) -> None:
    """Run the threads, and wait for them."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


COMMANDS: dict[str, Callable[..., str]] = {
    "compute": compute,
    "metrics": metrics,
    "sbom": sbom,
    "load": load,
    "exhaust": exhaust,
    "dashboards": dashboards,
}


def main() -> int:
    """Run one command with its addresses."""
    command, *addresses = sys.argv[1:]
    try:
        sys.stdout.write(COMMANDS[command](*addresses) + "\n")
    except (LossgradError, CheckError, OSError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
