"""Gets NVIDIA's perf_analyzer for tests and benchmarks, and runs it: `python -m tests.tools.perf_analyzer` fetches it.

It is not to be had as a package: the newest one that runs with glibc 2.36 lies in the wheel of tritonclient 2.51.0 (14 MB),
and needs libcudart.so.12 (a wheel of 3.5 MB; no GPU is needed) and libb64 (Debian's libb64-0d). The wheels are taken by
their hashes, once, into a cache of the user's. LOSSGRAD_PERF_ANALYZER names a binary to take instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

WHEELS: Final = """\
tritonclient==2.51.0 --hash=sha256:c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52
nvidia-cuda-runtime-cu12==12.9.79 --hash=sha256:25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3
"""
BINARY: Final = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
CUDA_RUNTIME: Final = "nvidia/cuda_runtime/lib/libcudart.so.12"
FETCH_SECONDS: Final = 120


class NotToBeHad(Exception):
    """perf_analyzer cannot be had here, and why."""


def command() -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that run it, after fetching it where needed. Raises NotToBeHad."""
    if (given := os.environ.get("LOSSGRAD_PERF_ANALYZER")) is not None:
        return [given], dict(os.environ)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotToBeHad(f"perf_analyzer is there for Linux on x86_64, not for {sys.platform} on {platform.machine()}")
    folder = _cache() / "perf_analyzer-2.51.0"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "perf_analyzer.lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "perf_analyzer").exists():
            _fetch(folder)
    libraries = f"{folder / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    return [str(folder / "perf_analyzer")], {**os.environ, "LD_LIBRARY_PATH": libraries}


def run(arguments: Sequence[str], timeout_seconds: float = 90) -> subprocess.CompletedProcess[str]:
    """Run it to its end; standard error goes to standard output. Raises NotToBeHad."""
    program, environment = command()
    return subprocess.run(
        [*program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout_seconds,
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lossgrad"


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        root = Path(scratch)
        (root / "wheels.txt").write_text(WHEELS)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        only_these = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        _run([*pip, *only_these, "--dest", str(root), "--requirement", str(root / "wheels.txt")])
        ready = root / "ready"
        (ready / "lib").mkdir(parents=True)
        for wheel in root.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name, destination in (
                    (BINARY, ready / "perf_analyzer"),
                    (CUDA_RUNTIME, ready / "lib/libcudart.so.12"),
                ):
                    if name in archive.namelist():
                        destination.write_bytes(archive.read(name))
        program = ready / "perf_analyzer"
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        _fetch_b64(root, ready / "lib")
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)


def _fetch_b64(root: Path, destination: Path) -> None:
    """Take libb64 from the system, or else from its Debian package, which needs no root to unpack."""
    try:
        ctypes.CDLL("libb64.so.0d")
    except OSError:
        pass
    else:
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotToBeHad(
            "perf_analyzer needs libb64.so.0d, which is not installed; on Debian: apt-get install libb64-0d"
        )
    try:
        _run(["apt-get", "download", "libb64-0d"], cwd=root)
    except NotToBeHad:  # a fresh container has no lists of packages yet
        _run(["apt-get", "update"])
        _run(["apt-get", "download", "libb64-0d"], cwd=root)
    (package,) = root.glob("libb64-0d*.deb")
    _run(["dpkg-deb", "--extract", str(package), str(root / "b64")])
    (library,) = (path for path in root.glob("b64/usr/lib/**/libb64.so.0d") if path.exists())
    shutil.copy(library, destination / "libb64.so.0d")


def _run(arguments: Sequence[str], cwd: Path | None = None) -> None:
    try:
        subprocess.run(arguments, cwd=cwd, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        raise NotToBeHad(f"`{arguments[0]} ... {arguments[-1]}` failed: {lines[-1] if lines else error}") from error
    except subprocess.TimeoutExpired as error:
        raise NotToBeHad(f"`{arguments[0]} ... {arguments[-1]}` took over {FETCH_SECONDS} s") from error


if __name__ == "__main__":
    try:
        found, _ = command()
    except NotToBeHad as reason:
        sys.exit(f"perf_analyzer cannot be had: {reason}")
    sys.stdout.write(f"{found[0]}\n")
