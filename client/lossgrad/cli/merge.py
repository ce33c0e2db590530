"""`lossgrad merge`: one report of what several evaluations found, exact, in any order. It needs no server."""

from __future__ import annotations

import argparse
from pathlib import Path

from lossgrad.accumulation import Accumulation
from lossgrad.cli.outcome import ExitCode, UsageError, cause
from lossgrad.cli.report_output import check_folder, check_plot, show_report, write_report


def run(options: argparse.Namespace) -> ExitCode:
    """Merge, print, and write what is to be written."""
    if len({path.resolve() for path in options.files}) < len(options.files):
        raise UsageError(f"a file is given twice: {', '.join(map(str, options.files))}; its elements would count twice")
    if options.plot is not None:
        check_plot(options.plot)
    if options.state_out is not None:
        check_folder("--state-out", options.state_out)
    report = Accumulation.merge(*map(_load, options.files)).report()
    show_report(report, json=options.json, about={"files": list(map(str, options.files))})
    write_report(report, state_out=options.state_out, plot=options.plot)
    return ExitCode.DONE


def _load(path: Path) -> Accumulation:
    try:
        return Accumulation.load(path)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {cause(error)}") from error
