"""The documents say what is: links lead somewhere, Python runs, output is what is printed, tables equal the code."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import lossgrad
from examples.demo.server_process import READY, ServerProcess
from lossgrad.metrics import ClientMetrics
from lossgrad_server import errors
from lossgrad_server.config import ServerConfig, environment_variable, flag
from lossgrad_server.metrics import Metrics
from lossgrad_server.processes.merging import MergedMetrics

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])
METRIC_NAME = re.compile(r"\b(?:lossgrad|grpc_server|grpc_client)_[a-z_0-9]+\b")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its info string, its text, and the line that its text begins at."""

    language: str
    info: str
    text: str
    line: int


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text()
    fences = re.finditer(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start(3)) + 1) for m in fences]


def documents_with(language: str) -> list[Path]:
    return [document for document in DOCUMENTS if any(block.language == language for block in blocks_of(document))]


def prose_of(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(document: Path) -> set[str]:
    """Return the anchors that a forge gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_after(document: Path, marker: str) -> list[tuple[str, ...]]:
    """Return the rows, without the head, of the table that follows the comment `<!-- marker: ... -->`."""
    _, found, rest = document.read_text().partition(f"<!-- {marker}:")
    assert found, f"{name_of(document)} has no table marked {marker}"
    table = rest.partition("-->\n")[2].partition("\n\n")[0].splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table[2:]]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["--reflection", "--allow-shared-memory"]) as running:
        yield running


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(document))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{name_of(document)} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(document)} links to {link}; it has no such heading"


def test_every_document_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    missing = [name_of(document) for document in DOCUMENTS if name_of(document) not in linked | {"README.md"}]
    assert not missing


@pytest.mark.parametrize("document", documents_with("python"), ids=name_of)
def test_the_python_runs_and_prints_what_the_document_shows(
    document: Path, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSSGRAD_TARGET", server.target)
    namespace: dict[str, Any] = {"TARGET": server.target}
    printed: str | None = None
    for block in blocks_of(document):
        if block.language == "python":
            # The empty lines make a traceback point into the document.
            code = compile("\n" * (block.line - 1) + block.text, name_of(document), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)  # noqa: S102 - our own document
            printed = output.getvalue()
        elif block.info == "output":
            assert printed == block.text
            printed = None
    if isinstance(client := namespace.get("client"), lossgrad.LossClient):
        client.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_an_example_prints_is_shown_as_it_is(document: Path, server: ServerProcess) -> None:
    for block in blocks_of(document):
        if block.language == "text" and block.info.startswith("examples/"):
            assert block.text == run_example(block.info, server)


def run_example(path: str, server: ServerProcess) -> str:
    environment = {"LOSSGRAD_TARGET": server.target, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / path)]
    return str(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


COMMANDS = [
    line.partition("  #")[0].split()[1:]
    for block in blocks_of(ROOT / "README.md")
    if block.language == "sh"
    for line in block.text.splitlines()
    if line.startswith("lossgrad ")
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_commands_of_the_readme_work(arguments: list[str], server: ServerProcess, tmp_path: Path) -> None:
    np.save(tmp_path / "prediction.npy", np.array([1.0, 3.0], np.float32))
    np.save(tmp_path / "target.npy", np.array([1.0, 1.0], np.float32))
    program = "import sys; from lossgrad.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    environment = {"LOSSGRAD_TARGET": server.target, "PATH": "/usr/bin:/bin"}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout


def test_the_readme_shows_every_command() -> None:
    assert [arguments[0] for arguments in COMMANDS] == ["ping", "info", "compute", "evaluate", "doctor"]


def test_the_call_with_a_foreign_tool_works_as_shown(server: ServerProcess) -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed; it comes with the extra dev")
    shown = [block for block in blocks_of(ROOT / "docs/protocol.md") if block.info == "buf-curl"]
    assert len(shown) == 1
    assert "127.0.0.1:50051" in shown[0].text
    command = shown[0].text.replace("127.0.0.1:50051", server.target).replace("buf ", f"{buf} ", 1)
    answer = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True, text=True).stdout)
    assert answer["results"][0]["scalar"] == 2.0
    assert answer["results"][0]["inputGradient"]["data"] == "AACAPgAAgD4AAIA+AACAPg=="  # four times 0.25


def test_the_table_of_reasons_is_that_of_the_code() -> None:
    rows = table_after(ROOT / "docs/protocol.md", "reasons")
    assert [reason.strip("`") for reason, _, _ in rows] == [reason.value for reason in errors.Reason]
    assert {code for _, code, _ in rows} <= {code.name for code in errors.Code}
    assert all(meaning.endswith(".") for _, _, meaning in rows)


def codes_in_the_source() -> dict[str, str]:
    """Return the code that goes with each reason, from where the server raises it."""
    of_class = {
        "InvalidRequest": "INVALID_ARGUMENT",
        "TooLarge": "RESOURCE_EXHAUSTED",
        "Unavailable": "UNAVAILABLE",
    }
    found = {"DEADLINE_PASSED": "DEADLINE_EXCEEDED", "CANCELLED": "CANCELLED", "INTERNAL": "INTERNAL"}
    for file in ROOT.glob("server/lossgrad_server/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = {k.arg: k.value.attr for k in node.keywords if k.arg and isinstance(k.value, ast.Attribute)}
            if "reason" in given and (code := given.get("code") or of_class.get(node.func.id)):
                found[given["reason"]] = code
    return found


def test_every_reason_has_the_code_that_the_server_gives_it() -> None:
    shown = {reason.strip("`"): code for reason, code, _ in table_after(ROOT / "docs/protocol.md", "reasons")}
    raised = codes_in_the_source()
    assert len(raised) >= 20
    assert {reason: shown[reason] for reason in raised} == raised


def test_the_table_of_settings_is_that_of_the_config() -> None:
    expected = [
        (f"`{flag(f.name)}`", f"`{environment_variable(f.name)}`", default_of(f.default), f.metadata["help"])
        for f in dataclasses.fields(ServerConfig)
    ]
    actual = table_after(ROOT / "docs/operations.md", "settings")
    shown = "\n".join("| " + " | ".join(row) + " |" for row in expected)
    assert actual == expected, f"docs/operations.md should have this table:\n{shown}"


def default_of(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "":
        return ""
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"`{value}` ({value >> 20} MiB)"
    return f"`{value}`"


def test_the_help_of_the_server_names_every_setting_of_the_table() -> None:
    command = [sys.executable, "-m", "lossgrad_server", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag_name, variable, _, _ in table_after(ROOT / "docs/operations.md", "settings"):
        assert flag_name.strip("`") in text
        assert variable.strip("`") in text


def test_the_ready_line_is_the_one_that_the_server_writes(server: ServerProcess) -> None:
    shown = [block.text.strip() for block in blocks_of(ROOT / "docs/operations.md") if "ready on" in block.text]
    assert len(shown) == 1
    assert READY.match(shown[0])  # the pattern by which `server` was found ready


@pytest.fixture(scope="module")
def exposition(server: ServerProcess) -> list[Metric]:
    """What the metrics endpoint shows after a unary request, a streamed one, and a bad one."""
    ones = np.ones(3, np.float32)
    with lossgrad.LossClient(server.target) as client:
        client.smooth_l1(ones, ones)
        client.compute_many([(ones, ones)], lossgrad.L1())
        with pytest.raises(lossgrad.InvalidRequest):
            client.mse(ones, ones[:2])
    with urllib.request.urlopen(server.metrics_url, timeout=5) as response:  # noqa: S310 - the server of this test
        text = response.read().decode()
    families = list(text_string_to_metric_families(text))
    # And what only a server with TLS has.
    metrics = Metrics(device="cpu", build_info={"version": ""})
    metrics.watch_certificates(SimpleNamespace(expires=datetime.now(UTC)))
    # And with a GPU.
    metrics.watch_device_memory(lambda: {"total": 1})
    known = {family.name for family in families}
    families += [
        one
        for one in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        if one.name not in known
    ]
    # And with several processes.
    place = SimpleNamespace(name="0", is_serving=True, restarts=0, ask_for_metrics=lambda: (0, None))
    known = {family.name for family in families}
    families += [family for family in MergedMetrics([place]).collect() if family.name not in known]
    return [family for family in families if not family.name.endswith("_created")]


def test_the_table_of_metrics_is_that_of_the_server(exposition: list[Metric]) -> None:
    served = {}
    for family in exposition:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        served[name] = (family.type, labels)
    shown = {
        name.strip("`"): (kind, set(labels.split(", ")) if labels else set())
        for name, kind, labels, _ in table_after(ROOT / "docs/operations.md", "metrics")
    }
    assert shown == served


@pytest.fixture(scope="module")
def clients_own(server: ServerProcess) -> list[Metric]:
    """What a client has counted after a call and a stream, and some trouble, which this server does not make."""
    registry = CollectorRegistry()
    with lossgrad.LossClient(server.target, metrics=registry) as client:
        client.l1([1.0], [0.0])
        client.compute_many([([1.0], [0.0])], lossgrad.L1())
    stream = ClientMetrics.of(registry).method("stream")
    stream.retried(lossgrad.Overloaded("full", reason="QUEUE_FULL"))
    stream.reconnected(lossgrad.Unavailable("broken"))
    return list(registry.collect())


def test_the_table_of_the_clients_metrics_is_what_a_client_counts(clients_own: list[Metric]) -> None:
    served = {
        f"{family.name}_total" if family.type == "counter" else family.name: (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in clients_own
    }
    shown = {
        name.strip("`"): (kind, set(labels.split(", ")))
        for name, kind, labels, _ in table_after(ROOT / "docs/operations.md", "client-metrics")
    }
    assert shown == served


def test_every_metric_that_a_document_names_exists(exposition: list[Metric], clients_own: list[Metric]) -> None:
    families = [*exposition, *clients_own]
    names = {name for family in families for name in (family.name, *(sample.name for sample in family.samples))}
    packages = {"lossgrad_api", "lossgrad_server"}
    for document in DOCUMENTS:
        named = set(METRIC_NAME.findall(document.read_text())) - packages
        unknown = sorted(name for name in named - names if f"{name}_total" not in names)
        assert not unknown, f"{name_of(document)} names {unknown}"


def test_every_variable_that_a_document_names_is_read_somewhere() -> None:
    read = {environment_variable(f.name) for f in dataclasses.fields(ServerConfig)}
    read |= {
        f"LOSSGRAD_{name}" for name in re.findall(r'"([A-Z_]+)"', (ROOT / "client/lossgrad/channel.py").read_text())
    }
    for file in (ROOT / "docker-compose.yml", ROOT / "Dockerfile"):
        read |= set(re.findall(r"LOSSGRAD_[A-Z_]+", file.read_text()))
    for document in DOCUMENTS:
        unknown = set(re.findall(r"LOSSGRAD_[A-Z_]+[A-Z]", document.read_text())) - read
        assert not unknown, f"{name_of(document)} names {sorted(unknown)}"


def test_the_stages_and_labels_that_are_explained_are_those_of_the_code() -> None:
    from lossgrad_server import metrics
    from lossgrad_server.batching.forming import ClosedBy

    rows = {row[0].strip("`"): row[3] for row in table_after(ROOT / "docs/operations.md", "metrics")}
    assert all(f"`{stage}`" in rows["lossgrad_stage_duration_seconds"] for stage in metrics.STAGES)
    assert all(f"`{closed_by}`" in rows["lossgrad_batches_total"] for closed_by in ClosedBy)
