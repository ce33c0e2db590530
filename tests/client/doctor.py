"""Runs `lossgrad doctor` for tests."""

from __future__ import annotations

import json

import pytest

from lossgrad.cli import main


class Doctor:
    """Runs it, and keeps what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
        """Return the exit code, and the checks by name."""
        code = main(["doctor", "--json", "--timeout", "2", *arguments])
        captured = self._capsys.readouterr()
        self.err = captured.err
        return code, {check["name"]: check for check in json.loads(captured.out)}
