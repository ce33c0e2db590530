"""Throwaway authorities and certificates, and servers that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme


class Authority:
    """An authority of a test's own, which writes PEM files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, *names: str, to: str = "server") -> tuple[Path, Path]:
        """Write a certificate and its key; return the files. Writing to the same names again replaces them."""
        issued = self._ca.issue_cert(*names)
        certificate, key = self._folder / f"{to}.pem", self._folder / f"{to}.key"
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        for path, content in ((certificate, chain), (key, issued.private_key_pem.bytes())):
            new = path.with_suffix(path.suffix + ".new")
            new.write_bytes(content)
            new.replace(path)
        return certificate, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other-ca")
