"""A network namespace with a server in it: a wire of its own, whose packets the kernel drops, loses and refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType
from typing import Final, Self

import pytest

from tests.server.program import Program

_NEEDED: Final = ("ip", "iptables")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def why_not() -> str:
    """Return why no namespace can be made here; "" where one can."""
    for name in _NEEDED:
        if shutil.which(name) is None:
            return f"there is no {name} here"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"lossgrad-try-{os.getpid()}"
    made = _run("ip", "netns", "add", name)
    _run("ip", "netns", "delete", name)
    return "" if made.returncode == 0 else f"ip netns: {made.stderr.strip()}"


class Namespace:
    """A namespace and a pair of interfaces: the test's end outside, `address` inside."""

    def __init__(self) -> None:
        reason = why_not()
        if reason:
            pytest.skip(reason)
        number = os.getpid()
        self.name = f"lossgrad-{number}"
        self._outside = f"lgo{number}"
        self._inside = f"lgi{number}"
        subnet = f"10.213.{number % 250}"
        self.address = f"{subnet}.2"
        self._do("ip", "netns", "add", self.name)
        try:
            self._do("ip", "link", "add", self._outside, "type", "veth", "peer", "name", self._inside)
            self._do("ip", "link", "set", self._inside, "netns", self.name)
            self._do("ip", "address", "add", f"{subnet}.1/30", "dev", self._outside)
            self._do("ip", "link", "set", self._outside, "up")
            self.run("ip", "address", "add", f"{self.address}/30", "dev", self._inside)
            self.run("ip", "link", "set", self._inside, "up")
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def _do(self, *command: str) -> None:
        done = _run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def run(self, *command: str) -> None:
        """Run a command inside."""
        self._do("ip", "netns", "exec", self.name, *command)

    def rule(self, *rule: str) -> None:
        """Add a rule for the packets that come in."""
        self.run("iptables", "-A", "INPUT", *rule)

    def heal(self) -> None:
        """Take all rules back."""
        self.run("iptables", "-F")

    def link(self, state: str) -> None:
        """Set the inner end of the wire "up" or "down"."""
        self.run("ip", "link", "set", self._inside, state)

    def close(self) -> None:
        """Take it away, with its interfaces."""
        _run("ip", "link", "delete", self._outside)
        _run("ip", "netns", "delete", self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class NamespacedProgram(Program):
    """A server inside a namespace."""

    def __init__(self, namespace: Namespace, *arguments: str) -> None:
        self._prefix = ("ip", "netns", "exec", namespace.name)
        super().__init__(f"--host={namespace.address}", "--insecure", *arguments)

    def launcher(self) -> tuple[str, ...]:
        return self._prefix
