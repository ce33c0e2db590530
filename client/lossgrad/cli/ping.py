"""`lossgrad ping`: whether the server serves, as an exit code; for people and for health checks."""

from __future__ import annotations

import argparse

from lossgrad.cli.connecting import connected
from lossgrad.cli.outcome import ExitCode


def run(options: argparse.Namespace) -> ExitCode:
    """Ask, and print the round trip."""
    with connected(options) as client:
        print(f"serving; round trip {client.ping() * 1e3:.2f} ms")
    return ExitCode.DONE
