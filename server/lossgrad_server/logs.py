"""The log: one line for each change of state and each failure, for people at a terminal and as JSON for machines elsewhere.

Nothing here is written for each request above debug, and never what a tensor holds.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

FORMATS: Final = ("auto", "text", "json")
# How gRPC says that an answer could not be sent. Callers may hang up when they like, so that is no error of ours, and a
# hostile one must not fill the log with it.
_GRPC_LOGGER: Final = "grpc._cython.cygrpc"
_HUNG_UP: Final = "ExecuteBatchError"
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# What a LogRecord has of its own; everything else was given by `extra` and belongs into the line.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object on one line: time (RFC 3339, UTC), severity, logger, message, what `extra` gave, exception."""

    def __init__(self, process: str = "") -> None:
        """`process` is what each line says of which process wrote it; "" where there is one."""
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        line.update((name, value) for name, value in vars(record).items() if name not in _OWN)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(
    level: str,
    style: str,
    stream: TextIO = sys.stderr,
    logger: logging.Logger | None = None,
    *,
    process: str = "",
) -> None:
    """Send a logger (the root) to a stream. `style` is one of FORMATS; "auto" is text on a terminal and JSON elsewhere.

    `process` names the process in each line, where several write to one log.
    """
    is_text = style == "text" or (style == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    text = f"[process {process}] {_TEXT}" if process else _TEXT
    handler.setFormatter(logging.Formatter(text) if is_text else JsonFormatter(process))
    configured = logger or logging.getLogger()
    configured.handlers[:] = [handler]
    configured.setLevel(level.upper())
    of_grpc = logging.getLogger(_GRPC_LOGGER)
    if _without_hung_up not in of_grpc.filters:
        of_grpc.addFilter(_without_hung_up)


def _without_hung_up(record: logging.LogRecord) -> bool:
    """Keep gRPC's complaints about callers that hung up for those who debug."""
    if not record.getMessage().startswith(_HUNG_UP):
        return True
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
