"""`lossgrad doctor`: why a server cannot be used, or that it can; one line for each check, with a remedy."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from typing import Final

import grpc
import numpy as np
from google.protobuf.internal import api_implementation

import lossgrad
from lossgrad.channel import DEFAULT_TARGET, ChannelSettings
from lossgrad.cli.checks import Check, State, ok, skip, warn
from lossgrad.cli.connecting import client_of, token_of
from lossgrad.cli.network_checks import examine_network
from lossgrad.cli.outcome import CheckFailed, ExitCode, UsageError
from lossgrad.cli.server_checks import examine_server

_TIMEOUT_SECONDS: Final = 5.0
_COLORS: Final = {State.OK: "32", State.WARN: "33", State.FAIL: "31;1", State.SKIP: "2"}


def run(options: argparse.Namespace) -> ExitCode:
    """Check one thing after the other, each printed when it is known."""
    checks = []
    for check in _examine(options):
        checks.append(check)
        if not options.json:
            print(_colored(check), flush=True)
    if options.json:
        print(json.dumps([check.to_dict() for check in checks], indent=2))
    failed = [check.name for check in checks if check.state is State.FAIL]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    return ExitCode.DONE


def _examine(options: argparse.Namespace) -> Iterator[Check]:
    timeout = _TIMEOUT_SECONDS if options.timeout is None else options.timeout
    options.timeout = timeout
    try:
        settings = ChannelSettings.resolve(
            options.target,
            token=token_of(options),
            tls=options.tls,
            ca=options.ca,
            cert=options.cert,
            key=options.key,
            timeout=timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    yield _client()
    yield _settings(options, settings)
    for check in examine_network(settings, timeout):
        yield check
        if check.state is State.FAIL:
            yield skip("server", "it cannot be reached, so nothing of it can be told")
            return
    with client_of(options) as client:
        yield from examine_server(client, settings, lossgrad.__version__)


def _client() -> Check:
    protobuf = api_implementation.Type()
    text = (
        f"lossgrad {lossgrad.__version__}, Python {platform.python_version()}, grpcio {grpc.__version__}, protobuf "
        f"({protobuf}), NumPy {np.__version__}"
    )
    if protobuf == "python":
        return warn(
            "client", text, "install a protobuf wheel for this platform: its pure Python form is many times slower"
        )
    return ok("client", text)


def _settings(options: argparse.Namespace, settings: ChannelSettings) -> Check:
    source = "--target" if options.target else "LOSSGRAD_TARGET" if os.environ.get("LOSSGRAD_TARGET") else "the default"
    target = f"{settings.target} ({source})" if settings.target != DEFAULT_TARGET or options.target else settings.target
    security = "TLS" if settings.tls else "no TLS"
    if settings.cert is not None:
        security += " with a client certificate"
    return ok("settings", f"{target}, {security}, {'a' if settings.token else 'no'} token")


def _colored(check: Check) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return str(check)
    return f"\033[{_COLORS[check.state]}m{check.state:<4}\033[0m{str(check)[4:]}"
