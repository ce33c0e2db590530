"""What is installed: the lock, constraints.txt and pyproject.toml agree, and keep out what is known to be vulnerable.

Nothing is fetched: `python requirements/lock.py --check` asks the index whether the lock is what would be made today.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.internal import api_implementation
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lossgrad_server

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ("image.txt", "build.txt", "dev.txt")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
# What a CUDA build of torch brings along.
CUDA_LIBRARIES = re.compile(r"nvidia-|cuda-|triton$")

# The newest release with each flaw, of those series that pyproject.toml could reach.
VULNERABLE = {
    "protobuf": {"CVE-2025-4565": "6.31.0", "CVE-2026-0994": "6.33.4"},
    "grpcio": {
        "CVE-2023-1428": "1.53.0",
        "CVE-2023-32732": "1.54.1",
        "CVE-2023-33953": "1.56.1",
        "CVE-2023-4785": "1.56.1",
    },
    "torch": {"CVE-2025-32434": "2.5.1"},
}


class Locked(NamedTuple):
    """A package in the lock: the only version and files of it that are installed, and where."""

    requirement: Requirement
    hashes: frozenset[str]

    @property
    def here(self) -> bool:
        """Whether it is installed on this system."""
        return self.requirement.marker is None or self.requirement.marker.evaluate()

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "=="
        return specifier.version


@cache
def lock(name: str) -> dict[str, Locked]:
    """Return the packages in a file of the lock."""
    found: dict[str, Locked] = {}
    text = re.sub(r"^#.*\n", "", (REQUIREMENTS / name).read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        stated, *hashes = re.split(r"\s+--hash=", line.strip())
        requirement = Requirement(stated)
        found[canonicalize_name(requirement.name)] = Locked(requirement, frozenset(hashes))
    return found


@cache
def constraints() -> dict[str, Requirement]:
    """Return what constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in requirements}


def asked_for(*extras: str) -> Iterator[Requirement]:
    """Give what pyproject.toml requires always, and for these extras and the extras that they name."""
    yield from map(Requirement, PYPROJECT["project"]["dependencies"])
    for extra in extras:
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == PYPROJECT["project"]["name"]:
                yield from asked_for(*sorted(requirement.extras))
            else:
                yield requirement


def torch_requires() -> list[Requirement]:
    """Return what the lock was told that every build of torch requires."""
    (told,) = tomllib.loads((REQUIREMENTS / "uv.toml").read_text())["dependency-metadata"]
    assert told["name"] == "torch"
    return [Requirement(line) for line in told["requires-dist"]]


def needed(*extras: str) -> set[str]:
    """Return the names of all that these extras need on this system, by what the installed packages say that they need."""
    names: set[str] = set()
    waiting = list(asked_for(*extras))
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate():
            continue
        name = canonicalize_name(requirement.name)
        extras_of = ["", *requirement.extras]
        if name in names and not requirement.extras:
            continue
        names.add(name)
        if name == "torch":
            waiting += torch_requires()
            continue
        for line in metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras_of):
                inner.marker = None
                waiting.append(inner)
    return names


# ---- The lock ----


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_the_lock_is_exact_and_has_hashes(name: str) -> None:
    assert lock(name)
    for package, locked in lock(name).items():
        assert Version(locked.version), package
        assert locked.hashes, f"{package} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in locked.hashes), package


def test_the_lock_and_the_constraints_name_the_same_versions() -> None:
    dev = lock("dev.txt")
    for package, locked in dev.items():
        if package in constraints():
            assert constraints()[package].specifier == locked.requirement.specifier, f"{package}: run make lock"
    elsewhere = {package for package, locked in dev.items() if not locked.here}
    assert set(dev) - set(constraints()) <= elsewhere, "constraints.txt lacks what the lock has"
    unused = set(constraints()) - set(dev) - {"torch", "pip"}
    assert not unused, f"run make lock, or take out of constraints.txt what nothing needs: {unused}"
    assert constraints()["pip"].specifier == lock("build.txt")["pip"].requirement.specifier


@pytest.mark.parametrize("name", ["image.txt", "build.txt"])
def test_the_image_is_built_from_what_is_tested(name: str) -> None:
    tested = {**lock("dev.txt"), "pip": lock("build.txt")["pip"]}  # an environment brings its own pip
    assert {package: tested.get(package) for package in lock(name)} == lock(name)


@pytest.mark.parametrize("extras", [("server", "cli", "otel"), ("dev",)], ids="+".join)
def test_the_lock_meets_every_requirement_of_pyproject(extras: tuple[str, ...]) -> None:
    locked = lock("dev.txt" if "dev" in extras else "image.txt")
    for requirement in asked_for(*extras):
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert name in locked, f"{requirement}: run make lock"
            assert requirement.specifier.contains(locked[name].version, prereleases=True), requirement
    for line in PYPROJECT["build-system"]["requires"]:
        build = Requirement(line)
        assert build.specifier.contains(lock("build.txt")[canonicalize_name(build.name)].version), line


@pytest.mark.parametrize(("name", "extras"), [("image.txt", ("server", "cli", "otel")), ("dev.txt", ("dev",))])
def test_the_lock_is_whole_and_holds_nothing_else(name: str, extras: tuple[str, ...]) -> None:
    here = {package for package, locked in lock(name).items() if locked.here}
    assert needed(*extras) == here | {"torch"}


def test_what_the_lock_was_told_of_torch_is_what_torch_says() -> None:
    stated = [Requirement(line) for line in metadata.requires("torch") or []]
    always = {
        canonicalize_name(each.name): each.specifier
        for each in stated
        if "extra" not in str(each.marker) and not CUDA_LIBRARIES.match(each.name)
    }
    assert {canonicalize_name(each.name): each.specifier for each in torch_requires()} == always


@pytest.mark.parametrize("package", VULNERABLE)
def test_no_version_that_is_allowed_has_a_flaw_that_is_known(package: str) -> None:
    requirements = [each for each in asked_for(*EXTRAS) if canonicalize_name(each.name) == package]
    assert requirements
    for requirement in requirements:
        (lowest,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
        for flaw, newest in VULNERABLE[package].items():
            assert lowest > Version(newest), f"{requirement} allows {newest}, which has {flaw}"


def test_protobuf_is_the_one_in_c() -> None:
    """Not the one in Python, which is slow and recurses where the other has a limit."""
    assert api_implementation.Type() == "upb"


# ---- The bill of materials ----


def bill(*arguments: str | Path) -> str:
    command = [sys.executable, REQUIREMENTS / "sbom.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_bill_of_materials_follows_the_schema_and_lists_what_is_installed(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    installed = metadata.version("numpy")
    archive = {"archive_info": {"hashes": {"sha256": "5" * 64}}}
    items = [
        {"metadata": {"name": "NumPy", "version": installed}, "download_info": archive},
        {"metadata": {"name": "grpcio", "version": "0.1"}, "download_info": archive},
    ]
    report.write_text(json.dumps({"install": items}))
    dpkg = tmp_path / "var/lib/dpkg"
    dpkg.mkdir(parents=True)
    (dpkg / "status").write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u14\nDescription: C\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    text = bill("--report", report, "--system", tmp_path)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert document["metadata"]["component"]["purl"] == f"pkg:pypi/lossgrad@{lossgrad_server.__version__}"
    listed = {component["purl"]: component for component in document["components"]}
    python: dict[str, str] = {
        canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions()
    }
    del python["lossgrad"]
    packages = [component for purl, component in listed.items() if purl.startswith("pkg:pypi/")]
    assert {canonicalize_name(each["name"]): each["version"] for each in packages} == python
    numpy = listed[f"pkg:pypi/numpy@{installed}"]
    assert numpy["hashes"] == [{"alg": "SHA-256", "content": "5" * 64}]
    assert "BSD" in json.dumps(numpy["licenses"])
    grpcio = f"pkg:pypi/grpcio@{metadata.version('grpcio')}"
    assert "hashes" not in listed[grpcio]  # the report is of another version
    assert [purl for purl in listed if purl.startswith("pkg:deb/")] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12"
    ]
    requires = {each["ref"]: each["dependsOn"] for each in document["dependencies"]}
    assert grpcio in requires[document["metadata"]["component"]["bom-ref"]]
    assert any(purl.startswith("pkg:pypi/numpy@") for purl in requires[f"pkg:pypi/pandas@{python['pandas']}"])


def test_the_same_environment_gives_the_same_bill_of_materials() -> None:
    assert bill() == bill()


# ---- The rules for our own code ----


def test_the_linter_holds_our_code_to_its_security_rules() -> None:
    rules = PYPROJECT["tool"]["ruff"]["lint"]
    assert "S" in rules["select"]
    assert not [rule for rule in rules["ignore"] if re.fullmatch(r"S\d*", rule)]
    for paths, ignored in rules["per-file-ignores"].items():
        if paths.startswith(("client", "server", "proto/lossgrad_api")):
            assert not [rule for rule in ignored if re.fullmatch(r"S\d*", rule)], f"{paths} is shipped"


def test_every_exception_from_a_security_rule_says_why() -> None:
    sources = [path for folder in ("client", "server", "proto") for path in (ROOT / folder).rglob("*.py")]
    unexplained = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        # An assertion says by itself what it asserts.
        if re.search(r"noqa: .*\bS(?!101\b)\d{3}\b", line) and not re.search(r"noqa: [A-Z0-9, ]+ - \w", line)
    ]
    assert not unexplained, "\n".join(unexplained)
