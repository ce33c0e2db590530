"""Writes the lock: every package at the version of constraints.txt, with the hashes of all its files (`make lock`).

image.txt is what the container image holds, build.txt what builds it (pip itself too), dev.txt what `make setup` installs.
pip installs them with --require-hashes --no-deps: nothing that is not written there, and no file that is not one of these.

torch alone is not in them. It is installed by its version, because its files are not the same everywhere: the CPU wheels
and each CUDA's come from indexes of their own, with hashes of their own, and the same version from the public index is yet
another build. What it needs is locked like everything else (uv.toml), save NVIDIA's libraries, which come with a CUDA build.
For an image, TORCH_SHA256 pins torch's wheel too (Dockerfile).

To change a version, change constraints.txt; to add a package, add it to pyproject.toml and constraints.txt; then run this.
It needs the package index, and makes an environment of its own for uv at first use (.venv-lock).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Final

UV: Final = "uv==0.13.9"
LOWEST_PYTHON: Final = "3.11"  # one lock for this and all later ones, and for every system
UNLOCKED: Final = "torch"

FOLDER: Final = Path(__file__).resolve().parent
ROOT: Final = FOLDER.parent
ENVIRONMENT: Final = ROOT / ".venv-lock"
# The lock's files, and what of pyproject.toml each has: the extras beside the dependencies, or the build's own requirements.
EXTRAS: Final = {"image.txt": ("server", "cli", "otel"), "dev.txt": ("dev",)}
BUILD: Final = "build.txt"


def uv() -> Path:
    """Return uv, after making the environment that it is in if there is none."""
    command = ENVIRONMENT / "bin" / "uv"
    done = ENVIRONMENT / UV
    if not done.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([ENVIRONMENT / "bin/python", "-m", "pip", "install", "--quiet", UV], check=True)
        done.touch()
    return command


def compile_to(output: Path, *sources: str, stdin: str | None = None) -> None:
    """Have uv lock what the sources require, at the versions of constraints.txt, and write it."""
    options = ["--quiet", "--universal", "--python-version", LOWEST_PYTHON, "--generate-hashes", "--no-annotate"]
    options += [
        "--constraint",
        "constraints.txt",
        "--no-emit-package",
        UNLOCKED,
        "--custom-compile-command",
        "make lock",
    ]
    files: list[str | Path] = ["--config-file", FOLDER / "uv.toml", "--output-file", output]
    subprocess.run(
        [uv(), "pip", "compile", *sources, *options, *files],
        check=True,
        cwd=ROOT,
        input=stdin,
        text=True,
        stdout=subprocess.DEVNULL,
    )


def write(folder: Path) -> None:
    """Write every file of the lock into `folder`."""
    for name, extras in EXTRAS.items():
        compile_to(folder / name, "pyproject.toml", *(word for extra in extras for word in ("--extra", extra)))
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    compile_to(folder / BUILD, "-", stdin="\n".join(["pip", *requires]))


def main() -> int:
    """Write the lock, or with --check say whether it is what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if the lock is not up to date")
    if not parser.parse_args().check:
        write(FOLDER)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        names = [*EXTRAS, BUILD]
        stale = [name for name in names if (folder / name).read_text() != (FOLDER / name).read_text()]
    for name in stale:
        sys.stderr.write(f"requirements/{name} is not up to date; run make lock\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
