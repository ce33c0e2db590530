"""`lossgrad info`: what the server is."""

from __future__ import annotations

import argparse
import dataclasses
import json

from lossgrad.cli.connecting import connected
from lossgrad.cli.outcome import ExitCode


def run(options: argparse.Namespace) -> ExitCode:
    """Print what the server says of itself."""
    with connected(options) as client:
        info = dataclasses.asdict(client.info())
    if options.json:
        print(json.dumps(info, indent=2))
        return ExitCode.DONE
    limits = info.pop("limits")
    for name, value in (info | limits).items():
        shown = ", ".join(value) if isinstance(value, tuple) else value
        print(f"{name.replace('_', ' '):20} {shown}")
    return ExitCode.DONE
