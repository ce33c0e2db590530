"""What the command exits with, and the one place where whatever goes wrong becomes one line on standard error."""

from __future__ import annotations

import enum
import sys


class ExitCode(enum.IntEnum):
    """What the command exits with; docs/command-line.md has the table."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    SERVER = 3
    INTERRUPTED = 130
    TERMINATED = 143


class UsageError(Exception):
    """What the user has to change: the command line, a file."""


class CheckFailed(Exception):
    """What was asked for was done, and the answer is no: data that a policy refuses, a check that fails."""


class Terminated(BaseException):
    """SIGTERM, where a command handles it as it does ctrl-C."""


def exit_code_of(error: Exception) -> ExitCode | None:
    """Return what an exception that ended a command means; None where it is a bug of ours."""
    if isinstance(error, UsageError):
        return ExitCode.USAGE
    if isinstance(error, CheckFailed):
        return ExitCode.FAILED
    # Imported here, because gRPC comes with it: the first two happen before anything was sent.
    from lossgrad.errors import InvalidRequest, LossgradError, RequestTooLarge

    if isinstance(error, (InvalidRequest, RequestTooLarge)):
        return ExitCode.USAGE
    return ExitCode.SERVER if isinstance(error, LossgradError) else None


def say(message: str) -> None:
    """Write one line to standard error."""
    print(f"lossgrad: {' '.join(message.split())}", file=sys.stderr, flush=True)


def cause(error: Exception) -> str:
    """Return what the system says of a file that cannot be had."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
