"""A client from the command line's connection arguments: of a server, or of one inside this process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lossgrad.cli.outcome import UsageError, cause
from lossgrad.client import LossClient
from lossgrad.embedded import embedded


@contextmanager
def connected(options: argparse.Namespace, target: str | None = None) -> Iterator[LossClient]:
    """Give a client, closed at the end. `target` takes the place of --target."""
    if getattr(options, "embedded", False):
        with embedded_client(options) as client:
            yield client
        return
    with client_of(options, target) as client:
        yield client


def client_of(options: argparse.Namespace, target: str | None = None) -> LossClient:
    """Return a client of the server that the options name. It connects at its first call."""
    try:
        return LossClient(
            options.target if target is None else target,
            token=token_of(options),
            tls=options.tls,
            ca=options.ca,
            cert=options.cert,
            key=options.key,
            timeout=options.timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def embedded_client(options: argparse.Namespace) -> Iterator[LossClient]:
    """Give a client of a server inside this process."""
    if options.target:
        raise UsageError("--embedded computes in this process, --target names a server; give one of them")
    with ExitStack() as stack:
        try:
            client = stack.enter_context(embedded(timeout=options.timeout))
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error
        yield client


def token_of(options: argparse.Namespace) -> str | None:
    """Return the token that --token-file holds; None leaves it to the environment."""
    path = options.token_file
    if path is None:
        return None
    try:
        text: str = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {path} cannot be read: {cause(error)}") from error
    return text.strip()
