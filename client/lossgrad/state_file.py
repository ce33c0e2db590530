"""Small files of exact state: JSON with a format, a version and a checksum, replaced as a whole, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lossgrad.errors import InvalidRequest

VERSION: Final = 1
_CHECKSUM: Final = "sha256"


def write_state(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a file, so that at any moment it is the old one or the new one, whoever is killed and whatever loses power."""
    document = {"format": kind, "version": VERSION, **content}
    document[_CHECKSUM] = _checksum(document)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def read_state(path: Path, kind: str) -> dict[str, Any]:
    """Return a file's content. Raises OSError where it cannot be read, InvalidRequest where it is not what it should be."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not UTF-8
        document = None
    if not isinstance(document, dict) or document.get("format") != kind:
        raise bad_file(path, f"is not a {kind} file")
    if document.get("version") != VERSION:
        raise bad_file(
            path, f"has version {document.get('version')!r}, this lossgrad reads {VERSION}; use the one that wrote it"
        )
    if document.pop(_CHECKSUM, None) != _checksum(document):
        raise bad_file(path, "is damaged: its checksum does not fit its content")
    return document


def bad_file(path: Path, what: str) -> InvalidRequest:
    """Return the error for a file that cannot be used."""
    return InvalidRequest(f"{path} {what}", reason="BAD_STATE", field=str(path))


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
