"""The program `lossgrad-server`, started as users do."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.server.serving import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A running lossgrad-server. A subclass may run another module, which takes the same flags after its own arguments."""

    command: Sequence[str] = ("-m", "lossgrad_server")

    def __init__(self, *arguments: str, program: Sequence[str] = (), **environment: str) -> None:
        """Start it. `program` is what Python is to run instead."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [*self.launcher(), sys.executable, *(program or self.command), "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",  # gRPC's own lines show what a peer sent, as it came
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
        self.logged: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def launcher(self) -> Sequence[str]:
        """Return the command that runs Python; none, unless a subclass has one."""
        return ()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.logged.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def ready_line(self) -> str:
        """Wait for the line that says that it serves."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "".join(self.logged)
        return line.rstrip("\n")

    def address(self) -> str:
        """Wait until it serves; return where."""
        return self.ready_line().removeprefix("lossgrad-server ready on ").split(", ")[0]

    def wait_until_logged(self, text: str) -> None:
        """Wait for a line of the log that holds a text."""
        while (line := self._lines.get(timeout=PATIENCE_SECONDS)) is not None:
            if text in line:
                return
        raise AssertionError(f"it ended without saying {text!r}: {self.logged}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait until it has ended; return its exit status."""
        code = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        return code

    def close(self) -> None:
        """End it, if it has not ended, and let go of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE_SECONDS)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
