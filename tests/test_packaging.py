"""What users install: one wheel with three typed packages and nothing else, and no torch unless they ask for it."""

from __future__ import annotations

import email
import email.message
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lossgrad": "client", "lossgrad_api": "proto", "lossgrad_server": "server"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Give the wheel, built as pip would build it, with the backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    program = "import sys; from hatchling import build; print(build.build_wheel(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(folder / result.stdout.split()[-1]) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def requirements(metadata: email.message.Message, extra: str | None) -> set[str]:
    """Return the names of what is required always, or for an extra."""
    names: set[str] = set()
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        name = requirement.strip()
        for character in " <>=![(~":
            name = name.split(character)[0]
        if (extra is None and "extra" not in marker) or (extra is not None and f"extra == '{extra}'" in marker):
            names.add(name)
    return names


def test_the_wheel_holds_the_three_packages_typed_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        assert f"{package}/__init__.py" in names
    stray = [name for name in names if "test" in name or "conftest" in name or "__pycache__" in name]
    assert not stray
    assert all(name.endswith((".py", ".pyi", ".proto", "py.typed", "inference.binpb")) for name in names), names


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile, package: str) -> None:
    root = ROOT / PACKAGES[package]
    sources = {str(path.relative_to(root)) for path in (root / package).rglob("*.py")}
    assert sources
    assert {name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")} == sources


def test_the_protos_and_their_stubs_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in ("loss_service.proto", "tensor.proto", "loss_service_pb2.pyi", "loss_service_pb2_grpc.py"):
        assert f"lossgrad_api/v1/{name}" in names
    assert "lossgrad_api/inference.binpb" in names


def test_the_client_alone_needs_four_packages_and_neither_torch_nor_the_server(
    metadata: email.message.Message,
) -> None:
    assert requirements(metadata, None) == {"grpcio", "grpcio-status", "protobuf", "numpy"}


def test_the_extras_bring_what_they_are_named_for(metadata: email.message.Message) -> None:
    assert {"torch", "numba", "prometheus-client", "grpcio-health-checking", "grpcio-reflection"} == requirements(
        metadata, "server"
    )
    assert requirements(metadata, "torch") == {"torch"}
    assert requirements(metadata, "cli") == {"rich"}


def test_the_metadata_say_what_it_is(wheel: zipfile.ZipFile, metadata: email.message.Message) -> None:
    import lossgrad_server

    assert metadata["Name"] == "lossgrad"
    assert metadata["Version"] == lossgrad_server.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"]
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = wheel.read(name).decode()
    assert "lossgrad = lossgrad.cli:main" in entry_points
    assert "lossgrad-server = lossgrad_server.__main__:main" in entry_points


def test_both_commands_and_both_versions_agree_from_the_wheel_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Imported from the unpacked wheel, not from this checkout."""
    wheel.extractall(tmp_path)
    program = (
        "import importlib.metadata, pathlib, sys, lossgrad, lossgrad_api, lossgrad_server; "
        "assert all(sys.argv[1] in module.__file__ for module in (lossgrad, lossgrad_api, lossgrad_server)); "
        "assert 'torch' not in sys.modules; "
        "print(lossgrad.__version__, lossgrad_server.__version__, "
        "next(importlib.metadata.distributions(name='lossgrad', path=[sys.argv[1]])).version)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert len(set(result.stdout.split())) == 1, result.stdout
