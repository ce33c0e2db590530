"""Writes a software bill of materials: what is installed where this runs, as CycloneDX 1.6 in JSON, on standard output.

    python requirements/sbom.py [--report pip-report.json ...] [--system DIRECTORY]

Every image has its own, made while it was built: /opt/lossgrad/sbom.cdx.json. It lists the Python packages with the hashes
of the archives that pip installed them from (pip's reports have them: torch's too, whatever index it came from), Python
itself, and with --system Debian's packages under that root. The same environment gives the same bytes: no time is in it.

Only Python's own library is used, because it runs where nothing else but the server is.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

PRODUCT: Final = "lossgrad"
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "cyclonedx.lossgrad")
_LICENSE_CLASSIFIER: Final = "License :: "
_LONGEST_LICENSE_NAME: Final = 80  # beyond it a License field holds the license's text

Component = dict[str, Any]


def normalized(name: str) -> str:
    """Return a package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def archive_hashes(reports: Iterable[Path]) -> dict[tuple[str, str], str]:
    """Return the SHA-256 of the archives in pip's installation reports, by name and version."""
    hashes: dict[tuple[str, str], str] = {}
    for report in reports:
        for item in json.loads(report.read_text())["install"]:
            found = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
            if found:
                hashes[normalized(item["metadata"]["name"]), item["metadata"]["version"]] = found
    return hashes


def licenses(described: metadata.PackageMetadata) -> list[dict[str, Any]]:
    """Return a package's license as its metadata has it: an SPDX expression, or names; empty where it says nothing."""
    if "License-Expression" in described:
        return [{"expression": described["License-Expression"]}]
    classifiers: list[str] = described.get_all("Classifier", [])
    names = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith(_LICENSE_CLASSIFIER)]
    field = described["License"].strip() if "License" in described else ""
    if not names and field and len(field) <= _LONGEST_LICENSE_NAME and "\n" not in field:
        names = [field]
    return [{"license": {"name": name}} for name in names]


def python_components(hashes: Mapping[tuple[str, str], str]) -> tuple[list[Component], list[dict[str, Any]]]:
    """Return the installed Python packages, and which of them each one requires."""
    installed = {normalized(each.metadata["Name"]): each for each in metadata.distributions()}
    references = {name: f"pkg:pypi/{name}@{quote(each.version)}" for name, each in installed.items()}
    components: list[Component] = []
    dependencies: list[dict[str, Any]] = []
    for name, each in sorted(installed.items()):
        component: Component = {
            "type": "application" if name == PRODUCT else "library",
            "bom-ref": references[name],
            "name": each.metadata["Name"],
            "version": each.version,
            "purl": references[name],
        }
        if named := licenses(each.metadata):
            component["licenses"] = named
        if found := hashes.get((name, each.version)):
            component["hashes"] = [{"alg": "SHA-256", "content": found}]
        components.append(component)
        needed = {references[other] for other in required(each, whole=name == PRODUCT) if other in references}
        dependencies.append({"ref": references[name], "dependsOn": sorted(needed)})
    return components, dependencies


def required(distribution: metadata.Distribution, *, whole: bool) -> set[str]:
    """Return the names of what a package requires; what only its extras require too, if `whole`."""
    names: set[str] = set()
    for line in distribution.requires or []:
        name = re.match(r"[\w.-]+", line)
        if name and (whole or "extra ==" not in line.partition(";")[2]):
            names.add(normalized(name[0]))
    return names - {normalized(distribution.metadata["Name"])}


def interpreter() -> Component:
    """Return Python itself, which in its own images is no package of the system's."""
    version = platform.python_version()
    reference = f"pkg:generic/python@{version}"
    return {"type": "platform", "bom-ref": reference, "name": "python", "version": version, "purl": reference}


def system_components(root: Path) -> list[Component]:
    """Return the packages that Debian's dpkg has installed under `root`; none where there is no dpkg."""
    status = root / "var/lib/dpkg/status"
    release = root / "etc/os-release"
    if not status.is_file():
        return []
    known = dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
    distro = "-".join(known.get(key, "").strip('"') for key in ("ID", "VERSION_ID"))
    components: list[Component] = []
    for stanza in status.read_text().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version|Architecture): (.*)$", stanza, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}&distro={distro}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return sorted(components, key=lambda component: str(component["purl"]))


def bill(hashes: Mapping[tuple[str, str], str], system: Path | None) -> dict[str, Any]:
    """Return the bill of materials of the environment that this runs in."""
    components, dependencies = python_components(hashes)
    products = [component for component in components if component["name"] == PRODUCT]
    components = [component for component in components if component["name"] != PRODUCT]
    components.append(interpreter())
    if system is not None:
        components += system_components(system)
    contents: dict[str, Any] = {"components": components, "dependencies": dependencies}
    if products:
        contents = {"metadata": {"lifecycles": [{"phase": "build"}], "component": products[0]}, **contents}
    number = uuid.uuid5(_NAMESPACE, json.dumps(contents, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        **contents,
    }


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", action="append", type=Path, default=[], help="a report of pip install")
    parser.add_argument("--system", type=Path, help="root of a Debian system whose packages belong in it")
    arguments = parser.parse_args()
    document = bill(archive_hashes(arguments.report), arguments.system)
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
