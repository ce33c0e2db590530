"""Runs `lossgrad-server` as a process of its own on free ports, and stops it as an operator would: with SIGTERM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

# The one line that the server writes to standard output, when it takes requests.
READY: Final = re.compile(r"^lossgrad-server ready on (?P<target>\S+), metrics (?P<metrics_url>\S+)$")
# The first start on a machine compiles the kernels: half a minute of CPU time, and more of it where others are busy.
START_TIMEOUT_SECONDS: Final = 300.0
STOP_TIMEOUT_SECONDS: Final = 30.0


class ServerProcess:
    """A server that lives as long as the `with` block. `exit_code` is None until it has ended."""

    target: str
    metrics_url: str

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        local = ["--host", "127.0.0.1", "--port", "0", "--metrics-host", "127.0.0.1", "--metrics-port", "0"]
        self._command = [sys.executable, "-m", "lossgrad_server", *local, *arguments]
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.exit_code: int | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT_SECONDS) or not hasattr(self, "target"):
            self.stop()
            raise RuntimeError("the server did not start; it said:\n" + self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything that the server has written so far."""
        return "".join(self._lines)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._process.kill()
        self.stop()

    def stop(self) -> int:
        """Ask the server to drain and end; return its exit code."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self.exit_code = self._process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.exit_code = self._process.wait()
            self._reader.join()
            if self._process.stdout is not None:
                self._process.stdout.close()
        return self.exit_code

    def _read(self) -> None:
        # Reads to the end, so that the server never blocks on a full pipe.
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if match := READY.match(line):
                self.target = match["target"]
                self.metrics_url = match["metrics_url"]
                self._ready.set()
        self._ready.set()
