"""The server programs that faults are done to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.program import Program


class PacedProgram(Program):
    """A server whose device takes `milliseconds` for each request."""

    def __init__(self, milliseconds: float, *arguments: str, **environment: str) -> None:
        self.command = ("-m", "tests.faults.paced_server", str(milliseconds))
        super().__init__(*arguments, **environment)


@contextmanager
def serving(program: Program, *, knows_address: bool = False) -> Iterator[tuple[Program, str]]:
    """Wait until a program serves; give it and its address, and end it. The caller may know better how to wait."""
    try:
        yield program, "" if knows_address else program.address()
    finally:
        program.close()
