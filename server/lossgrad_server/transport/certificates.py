"""TLS: the server's certificate and key, read again when their files change, and until when the certificate is valid."""

from __future__ import annotations

import base64
import logging
import re
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc

logger = logging.getLogger(__name__)

# gRPC asks at every handshake; a handshake a millisecond must not mean three files read a millisecond.
RELOAD_SECONDS: Final = 1.0

_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17


class CertificateError(ValueError):
    """A certificate or key that cannot be used. One line that says why."""


class Certificates:
    """A certificate with its key, and the authorities of client certificates, from PEM files.

    Files that changed are read again; if they cannot be used then, the server goes on with those that it has, and says so.
    """

    def __init__(
        self, certificate: Path, key: Path, client_authorities: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Read the files. With `client_authorities`, callers must show a certificate of theirs. Raises CertificateError."""
        self._paths = [path for path in (certificate, key, client_authorities) if path is not None]
        self._clock = clock
        self._looked_at = clock()
        self._seen = self._state()
        self._configuration = self._read()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a port, which follow the files."""
        # The name has no type in the stubs.
        credentials: Callable[..., grpc.ServerCredentials] = grpc.dynamic_ssl_server_credentials
        return credentials(self._configuration, self._fetch, require_client_authentication=len(self._paths) > 2)

    @property
    def expires(self) -> datetime:
        """When the certificate in use expires."""
        return self._expires

    def reload(self) -> bool:
        """Read the files again if they have changed; return whether others are in use now."""
        now = self._clock()
        if now - self._looked_at < RELOAD_SECONDS:
            return False
        self._looked_at = now
        state = self._state()
        if state == self._seen:
            return False
        self._seen = state
        try:
            self._configuration = self._read()
        except CertificateError as error:
            logger.error("The certificate stays as it was: %s", error)
            return False
        logger.info("Read the certificate again; it is valid until %s", self._expires.isoformat())
        return True

    def _fetch(self) -> Any:
        # Called by gRPC in a thread of its own before each handshake. None: as before.
        return self._configuration if self.reload() else None

    def _read(self) -> Any:
        pem = [_read(path) for path in self._paths]
        certificate, key = pem[:2]
        self._check_pair()
        self._expires = expiry(certificate)
        if self._expires < datetime.now(UTC):
            raise CertificateError(f"the certificate {self._paths[0]} expired on {self._expires.date()}; renew it")
        authorities = pem[2] if len(pem) > 2 else None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)

    def _check_pair(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._paths[0], self._paths[1], password=_no_password)
            if len(self._paths) > 2:
                context.load_verify_locations(self._paths[2])
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()
            raise CertificateError(
                f"{', '.join(map(str, self._paths))} cannot be used: {reason}; give PEM files "
                "of a certificate, its own key without a password, and, for client certificates, their authorities"
            ) from None

    def _state(self) -> list[tuple[int, int, int] | None]:
        states: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                states.append(None)
            else:
                states.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return states


def expiry(pem: bytes) -> datetime:
    """Return when the first certificate of a PEM file expires. Raises CertificateError. Source: RFC 5280, 4.1."""
    found = re.search(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", pem, re.DOTALL)
    try:
        if found is None:
            raise ValueError
        certificate = _content(base64.b64decode(found[1]), _SEQUENCE)
        fields = _elements(_content(certificate, _SEQUENCE))  # of the part that is signed
        validity = fields[4] if fields[0][0] == _VERSION else fields[3]
        kind, text = _elements(validity[1])[1]
        pattern = "%y%m%d%H%M%SZ" if kind == _UTC_TIME else "%Y%m%d%H%M%SZ"
        return datetime.strptime(text.decode("ascii"), pattern).replace(tzinfo=UTC)
    except (ValueError, IndexError):
        raise CertificateError("there is no certificate in the PEM file that is to be the server's") from None


def _content(data: bytes, tag: int) -> bytes:
    """Return the content of the DER element that `data` begins with, which must have this tag."""
    kind, content = _elements(data, 1)[0]
    if kind != tag:
        raise ValueError
    return content


def _elements(data: bytes, most: int = 1 << 30) -> list[tuple[int, bytes]]:
    """Return the tags and contents of the DER elements that follow each other in `data`."""
    elements: list[tuple[int, bytes]] = []
    place = 0
    while place < len(data) and len(elements) < most:
        tag, length = data[place], data[place + 1]
        place += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[place : place + size], "big")
            place += size
        if place + length > len(data):
            raise ValueError
        elements.append((tag, data[place : place + length]))
        place += length
    return elements


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("the key has a password")
