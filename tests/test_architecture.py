"""Who may import whom (docs/architecture.md), held over the syntax trees; and that no file outgrows one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
API, SERVER, CLIENT = ROOT / "proto/lossgrad_api", ROOT / "server/lossgrad_server", ROOT / "client/lossgrad"
MAX_LINES = 420

# Folder or file -> the modules (and all below them) that it must not import.
FORBIDDEN = {
    API: ("lossgrad", "lossgrad_server", "torch", "numpy", "grpc"),
    CLIENT: ("lossgrad_server", "prometheus_client"),
    SERVER: ("lossgrad",),
    SERVER / "engine": ("grpc", "lossgrad_api", "lossgrad_server.transport", "lossgrad_server.batching"),
    SERVER / "batching": (
        "grpc",
        "torch",
        "numpy",
        "lossgrad_api",
        "lossgrad_server.transport",
        "lossgrad_server.engine",
    ),
    SERVER / "isolation": (
        "grpc",
        "torch",
        "numpy",
        "pickle",
        "multiprocessing",
        "lossgrad_server.transport",
        "lossgrad_server.batching",
        "lossgrad_server.app",
        "lossgrad_server.config",
    ),
    SERVER / "processes": (
        "grpc",
        "torch",
        "numpy",
        "multiprocessing",
        "lossgrad_server.batching",
        "lossgrad_server.transport",
    ),
    SERVER / "transport": ("torch", "numpy", "lossgrad_server.engine", "lossgrad_server.app", "lossgrad_server.config"),
    SERVER / "jobs.py": ("grpc", "torch", "numpy", "lossgrad_api"),
    SERVER / "work.py": ("grpc", "torch", "numpy", "lossgrad_api"),
    SERVER / "errors.py": ("grpc", "torch", "numpy", "lossgrad_api"),
    SERVER / "metrics.py": ("grpc", "torch", "numpy", "lossgrad_api", "lossgrad_server.transport"),
    SERVER / "config.py": ("grpc", "torch", "numpy", "lossgrad_api"),
}
# The one place where the client may reach the server: to run it in this process; and the one that a registry's scrape calls.
EXCEPTIONS = {CLIENT / "embedded.py": ("lossgrad_server",), CLIENT / "metrics.py": ("prometheus_client",)}


def source_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [file for file in files if "_pb2" not in file.name]


def imported_modules(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; name the module in full"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", FORBIDDEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_the_way_that_the_design_says(path: Path) -> None:
    assert source_files(path), f"{path} has no source file; mend FORBIDDEN"
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in source_files(path)
        for module, line in imported_modules(file)
        for package in FORBIDDEN[path]
        if is_below(module, package) and package not in EXCEPTIONS.get(file, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_would_be_broken_by_a_wrong_import(tmp_path: Path) -> None:
    """The checker itself sees every form of import."""
    file = tmp_path / "sample.py"
    file.write_text("import torch.nn\nfrom grpc import aio\ndef late():\n    from lossgrad_server import app\n")
    assert [module for module, _ in imported_modules(file)] == ["torch.nn", "grpc.aio", "lossgrad_server.app"]
    assert is_below("torch.nn", "torch")
    assert not is_below("torchvision", "torch")
    assert not is_below("lossgrad_server.app", "lossgrad")


@pytest.mark.parametrize("root", ["proto", "server", "client", "tests", "bench", "examples"])
def test_every_file_says_first_what_belongs_in_it_and_can_be_read_in_one_sitting(root: str) -> None:
    for file in source_files(ROOT / root):
        text = file.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{file} begins without saying what belongs in it"
        assert text.count("\n") <= MAX_LINES, f"{file} has over {MAX_LINES} lines; split it by subject"
