"""The servers of bench.transport, each in a process of its own, and what /proc says about them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

_ROOT: Final = Path(__file__).resolve().parent.parent
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_START_SECONDS: Final = 120.0


class ChildProcess:
    """A Python module in a process of its own, read line by line. Always ended when its context is left."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._name = module
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._unread = b""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, politely and then not. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def tell(self, line: str) -> None:
        """Send the process a line."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def read_line(self, timeout_seconds: float) -> str:
        """Return the next line that the process prints. Raises RuntimeError, with its errors, if it ends or is late."""
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        descriptor = self._process.stdout.fileno()
        due = time.monotonic() + timeout_seconds
        while b"\n" not in self._unread:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, due - time.monotonic()))
            received = os.read(descriptor, 65536) if readable else b""
            if not received:
                why = "ended" if readable else f"printed nothing for {timeout_seconds} s"
                raise RuntimeError(f"{self._name} {why}; its errors end with:\n{self.errors()[-2000:]}")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def errors(self) -> str:
        """Return what it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


class ServerProcess(ChildProcess):
    """A gRPC server: ours or the echo. `target` is known once `wait_until_ready` has returned."""

    target = ""

    def wait_until_ready(self) -> None:
        """Wait for the line that says where it serves."""
        line = self.read_line(_START_SECONDS)
        self.target = line.partition(" ready on ")[2].partition(",")[0]
        if not self.target:
            raise RuntimeError(f"{self._name} printed {line!r}, not where it is ready")

    def cpu_seconds(self) -> float:
        """Return the processor time that it has taken, all threads together."""
        return (int(self._stat(14)) + int(self._stat(15))) / _TICKS_PER_SECOND

    def page_faults(self) -> int:
        """Return how many pages of memory it had to be given, again or for the first time; each costs about a us."""
        return int(self._stat(10))

    def memory_bytes(self) -> int:
        """Return its resident memory."""
        return self._status("VmRSS")

    def peak_memory_bytes(self) -> int:
        """Return the most resident memory that it has had since `reset_peak_memory`."""
        return self._status("VmHWM")

    def reset_peak_memory(self) -> None:
        """Count the peak anew from now on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def probe(self) -> dict[str, Any]:
        """Return what the probe in its event loop saw since the last time."""
        self.signal(signal.SIGUSR1)
        report: dict[str, Any] = json.loads(self.read_line(30.0))
        return report

    def _stat(self, number: int) -> str:
        """Return the field that proc(5) gives this number."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[number - 3]

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc says nothing of {name}")


def loss_server(address: str, *arguments: str, probe: bool = False, computing: bool = True) -> ServerProcess:
    """Start lossgrad-server with its defaults, so that what is measured is what users get."""
    where = ("--host", address) if address.startswith("unix") else ("--host", "127.0.0.1", "--port", "0")
    ours = [*where, "--metrics-port", "-1", "--log-level", "warning", *arguments]
    if computing and not probe:
        return ServerProcess("lossgrad_server", *ours)
    switches = [*(["--probe"] if probe else []), *([] if computing else ["--no-computing"])]
    return ServerProcess("bench.transport_server", *switches, "--", *ours)


def echo_server(address: str, sizes: Sequence[int], packed: Sequence[int], *, probe: bool = False) -> ServerProcess:
    """Start the echo server."""
    where = address if address.startswith("unix") else "127.0.0.1:0"
    more = ["--probe"] if probe else []
    return ServerProcess(
        "bench.echo_server",
        *("--address", where),
        *("--tensor-bytes", *map(str, sizes)),
        *("--packed", *map(str, packed)),
        *more,
    )
