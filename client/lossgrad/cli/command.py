"""The entry point: reads the command line, runs the command's module, and turns what happened into an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lossgrad.cli.arguments import parse
from lossgrad.cli.outcome import ExitCode, Terminated, exit_code_of, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        options = parse(arguments)
        # The command's own module, and what it needs, are imported only now: --help waits for nothing.
        code: int = importlib.import_module(f"lossgrad.cli.{options.command}").run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        return ExitCode.FAILED
    except Exception as error:
        ending = exit_code_of(error)
        if ending is None:
            raise
        say(str(error))
        return ending
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted")
        return ExitCode.INTERRUPTED
    except Terminated as interrupt:
        say(str(interrupt) or "terminated")
        return ExitCode.TERMINATED
