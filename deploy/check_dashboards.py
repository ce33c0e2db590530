"""Holds Grafana's dashboards to Grafana's own types: `python -m deploy.check_dashboards`. Needs npm and its registry.

@grafana/schema, of the same version as the Grafana in docker-compose.yml, says in TypeScript what a dashboard is, and what
each kind of panel may be told. Each dashboard is written as a value of those types, and tsc refuses a key that does not
exist, a value of the wrong type, and a word that is none of those allowed. Grafana itself ignores what it does not know, and
shows something else. The packages are those of grafana/schema/package-lock.json, by their hashes; npm puts them into .node.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

DEPLOY: Final = Path(__file__).parent
DASHBOARDS: Final = DEPLOY / "grafana/dashboards"
SCHEMA: Final = DEPLOY / "grafana/schema"
NODE: Final = DEPLOY.parent / ".node"

# A panel's type -> the name of its types in the package.
PANELS: Final = {
    "heatmap": "Heatmap",
    "stat": "Stat",
    "table": "Table",
    "timeseries": "TimeSeries",
}
_INTERVAL_SETTINGS: Final = {"auto": False, "auto_count": 30, "auto_min": "10s"}
_TYPES: Final = "@grafana/schema/dist/esm/raw/composable"
# The types have enumerations for what is a plain word in JSON, and ask for settings for which Grafana has defaults.
_HEADER: Final = """\
import type { Dashboard } from "@grafana/schema";
type Plain<T> = 0 extends 1 & T ? T : T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
type Part<T> = 0 extends 1 & T ? T : T extends string ? `${T}` : T extends object ? { [K in keyof T]?: Part<T[K]> } : T;
"""
_OPTIONS: Final = (
    *("--noEmit", "--strict", "--skipLibCheck", "--pretty", "false"),
    *("--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"),
)


class UnknownPanel(Exception):
    """A dashboard has a panel whose types this does not know."""


def typescript(dashboard: dict[str, Any]) -> str:
    """Return a program that compiles if a dashboard is one, and if each panel's settings are of its type's."""
    for variable in dashboard.get("templating", {}).get("list", []):
        # The builder writes an interval's settings for every kind of variable, with what they are where nobody sets them.
        for key, unset in _INTERVAL_SETTINGS.items():
            if variable["type"] != "interval" and variable.get(key) == unset:
                del variable[key]
    panels = [panel for row in dashboard["panels"] for panel in (row, *row.get("panels", []))]
    parts = [_HEADER]
    used = sorted({panel["type"] for panel in panels} - {"row"})
    for kind in used:
        if kind not in PANELS:
            raise UnknownPanel(f"add {kind} to PANELS")
        parts.append(f'import type * as {kind} from "{_TYPES}/{kind}/panelcfg/x/{PANELS[kind]}PanelCfg_types.gen";')
    parts.append(f"export const dashboard: Plain<Dashboard> = {json.dumps(dashboard, indent=1)};")
    for panel in panels:
        if panel["type"] != "row":
            settings = {"Options": panel.get("options"), "FieldConfig": panel["fieldConfig"]["defaults"].get("custom")}
            for name, value in settings.items():
                if value:
                    type_name = f"Part<{panel['type']}.{name}>"
                    parts.append(f"export const {name}{panel['id']}: {type_name} = {json.dumps(value, indent=1)};")
    return "\n".join(parts) + "\n"


def install() -> None:
    """Have npm install the locked packages, unless they are there. Raises CalledProcessError if it cannot."""
    done = NODE / "installed.json"
    lock = SCHEMA / "package-lock.json"
    if not done.exists() or done.read_bytes() != lock.read_bytes():
        NODE.mkdir(exist_ok=True)
        for path in (lock, SCHEMA / "package.json"):
            shutil.copy(path, NODE)
        command = [_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, cwd=NODE, check=True, capture_output=True, text=True, timeout=90)  # noqa: S603 - npm
        shutil.copy(lock, done)


def faults(dashboards: dict[str, dict[str, Any]]) -> str:
    """Return what tsc finds wrong with dashboards, given by their names; empty if nothing is."""
    with tempfile.TemporaryDirectory(dir=NODE) as folder:  # below the packages, where tsc looks for them
        for name, dashboard in dashboards.items():
            (Path(folder) / f"{name}.ts").write_text(typescript(dashboard))
        files = [path.name for path in sorted(Path(folder).glob("*.ts"))]
        command = [
            _program("node"),
            str(NODE / "node_modules/typescript/bin/tsc"),
            *_OPTIONS,
            "--pretty",
            "false",
            *files,
        ]
        result = subprocess.run(  # noqa: S603 - tsc
            command, cwd=folder, check=False, capture_output=True, text=True, timeout=90
        )
    if result.returncode and not result.stdout:
        raise RuntimeError(f"tsc failed: {result.stderr}")
    return result.stdout


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def committed() -> dict[str, dict[str, Any]]:
    """Return the dashboards that Grafana is given."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def main() -> int:
    """Check the committed dashboards."""
    install()
    found = faults(committed())
    sys.stdout.write(found or f"{len(committed())} dashboards are what Grafana says dashboards are\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
