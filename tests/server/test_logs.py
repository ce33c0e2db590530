"""The log: JSON that a machine can read line by line, text for a terminal, and never what a tensor holds."""

from __future__ import annotations

import io
import json
import logging
from datetime import datetime

import pytest

from lossgrad_server import logs


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def written(style: str, stream: io.StringIO) -> list[str]:
    """Return the lines of a log with a message, one with a field, one below the level, and a failure."""
    logger = logging.Logger("lossgrad_server.test")  # noqa: LOG001 - one that no other test has
    logs.configure("info", style, stream, logger)
    logger.info("Ready on %s", "unix:/run/lossgrad.sock")
    logger.warning("Refused «%s»", "a\nb", extra={"request_id": "r-1"})
    logger.debug("not written")
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("Failed")
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("style", ["json", "auto"])
def test_json_is_one_object_to_a_line_with_everything_in_it(style: str) -> None:
    ready, refused, failed = (json.loads(line) for line in written(style, io.StringIO()))
    assert ready["message"] == "Ready on unix:/run/lossgrad.sock"
    assert ready["severity"] == "INFO"
    assert ready["logger"] == "lossgrad_server.test"
    assert datetime.fromisoformat(ready["time"]).utcoffset() is not None
    assert refused["message"] == "Refused «a\nb»"
    assert refused["request_id"] == "r-1"
    assert failed["severity"] == "ERROR"
    assert failed["exception"].startswith("Traceback")
    assert failed["exception"].endswith("ValueError: boom")
    assert ready.keys() == {"time", "severity", "logger", "message"}


@pytest.mark.parametrize(("style", "stream"), [("text", io.StringIO()), ("auto", Terminal())])
def test_text_is_for_people(style: str, stream: io.StringIO) -> None:
    lines = written(style, stream)
    assert lines[0].endswith(" INFO lossgrad_server.test: Ready on unix:/run/lossgrad.sock")
    assert lines[-1] == "ValueError: boom"


@pytest.mark.parametrize(
    ("level", "said"), [("info", ["another"]), ("debug", ["ExecuteBatchError raised in core by x", "another"])]
)
def test_callers_that_hang_up_are_no_errors(level: str, said: list[str]) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.configure(level, "json", stream)
        logger = logging.getLogger("grpc._cython.cygrpc")
        logger.error("ExecuteBatchError raised in core by x")
        logger.error("another")
    finally:
        root.handlers[:], root.level = before
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == said
    assert [line["severity"] for line in lines] == ["DEBUG", "ERROR"][-len(said) :]
