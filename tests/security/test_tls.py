"""TLS and mutual TLS: who gets in, what the others are told, and certificates that change while the server runs."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

import lossgrad
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.security import is_local, security
from lossgrad_server.transport import certificates
from lossgrad_server.transport.certificates import CertificateError, Certificates, expiry
from tests.security.conftest import Authority
from tests.server.scraping import Scrape
from tests.server.serving import StartServer

NAMES = ("localhost", "127.0.0.1")
PAIR = ([1.0, 2.0], [0.0, 0.0])


def client(address: str, **settings: Any) -> lossgrad.LossClient:
    return lossgrad.LossClient(address, retries=0, timeout=5, **settings)


def settings_of(files: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    return {"tls_cert": str(files[0]), "tls_key": str(files[1]), **more}


def serial(address: str, authority: Path) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        shown = tls.getpeercert()
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)


def test_a_caller_that_trusts_the_authority_is_served(start_server: StartServer, authority: Authority) -> None:
    server = start_server(**settings_of(authority.issue(*NAMES)))
    with client(server.address, ca=authority.file) as trusting:
        assert trusting.l1(*PAIR).loss == 1.5
        assert trusting.ping() > 0
        assert [result.loss for result in trusting.stream([PAIR] * 2, lossgrad.L1())] == [1.5, 1.5]


@pytest.mark.parametrize(
    ("way", "kind", "hint"),
    [
        ("plaintext", lossgrad.Unavailable, "does it want TLS"),
        ("another authority", lossgrad.TLSError, "is not of an authority that this client trusts"),
        ("another name", lossgrad.TLSError, "is for another name than '127.0.0.1:"),
    ],
)
def test_other_callers_are_told_at_once_what_to_change(
    start_server: StartServer,
    authority: Authority,
    other_authority: Authority,
    way: str,
    kind: type[lossgrad.Unavailable],
    hint: str,
) -> None:
    names = ["elsewhere.example"] if way == "another name" else [*NAMES]
    server = start_server(**settings_of(authority.issue(*names)))
    trusted = {"another authority": other_authority.file, "another name": authority.file}.get(way)
    started = time.monotonic()
    with client(server.address, ca=trusted) as caller, pytest.raises(kind, match=hint) as caught:
        caller.l1(*PAIR)
    assert time.monotonic() - started < 1
    assert type(caught.value) is kind
    if way != "another name":
        with client(server.address, ca=authority.file) as trusting:
            assert trusting.l1(*PAIR).loss == 1.5


def test_tls_to_a_server_without_is_told_apart(start_server: StartServer, authority: Authority) -> None:
    server = start_server()
    with (
        client(server.address, ca=authority.file) as caller,
        pytest.raises(lossgrad.TLSError, match="does not; leave TLS out"),
    ):
        caller.l1(*PAIR)


def test_mutual_tls_serves_only_callers_with_a_certificate_of_the_authority(
    start_server: StartServer, authority: Authority, other_authority: Authority
) -> None:
    server = start_server(**settings_of(authority.issue(*NAMES), tls_client_ca=str(authority.file)))
    certificate, key = authority.issue("caller", to="caller")
    with client(server.address, ca=authority.file, cert=certificate, key=key) as known:
        assert known.l1(*PAIR).loss == 1.5
    stranger = other_authority.issue("caller", to="caller")
    with (
        client(server.address, ca=authority.file, cert=stranger[0], key=stranger[1]) as unknown,
        pytest.raises(lossgrad.Unavailable),
    ):
        unknown.l1(*PAIR)
    with client(server.address, ca=authority.file) as nobody, pytest.raises(lossgrad.Unavailable):
        nobody.l1(*PAIR)


def test_a_new_certificate_is_used_without_a_restart_and_no_call_fails(
    start_server: StartServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "RELOAD_SECONDS", 0.1)
    server = start_server(metrics_port=0, **settings_of(authority.issue(*NAMES)))
    done = threading.Event()
    failures: list[Exception] = []

    def call() -> None:
        while not done.is_set():
            try:
                with client(server.address, ca=authority.file) as caller:  # a handshake each
                    caller.l1(*PAIR)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    seen = {serial(server.address, authority.file)}
    for _ in range(3):
        authority.issue(*NAMES)
        deadline = time.monotonic() + 10
        while (now := serial(server.address, authority.file)) in seen:
            assert time.monotonic() < deadline, "the new certificate is not used"
            time.sleep(0.05)
        seen.add(now)
    done.set()
    thread.join()
    assert not failures, failures[0]
    told = Scrape(server.scrape())("lossgrad_tls_certificate_expiry_timestamp_seconds")
    assert told is not None
    assert told > time.time()


def test_files_that_become_unusable_leave_the_server_with_those_that_it_has(
    start_server: StartServer, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "RELOAD_SECONDS", 0.0)
    files = authority.issue(*NAMES)
    server = start_server(**settings_of(files))
    before = serial(server.address, authority.file)
    files[0].write_text("no certificate")
    assert serial(server.address, authority.file) == before
    assert [record.message for record in caplog.records if "stays as it was" in record.message]
    assert (
        len([record for record in caplog.records if "stays as it was" in record.message]) == 1
    )  # not at every handshake
    authority.issue(*NAMES)
    assert serial(server.address, authority.file) != before


def test_expiry_is_that_of_the_certificate() -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
    later = datetime(2061, 3, 4, 5, 6, 7, tzinfo=UTC)  # after 2049 it is written in another form
    for when in (soon, later):
        issued = trustme.CA().issue_cert("localhost", not_after=when)
        assert expiry(issued.cert_chain_pems[0].bytes()) == when


@pytest.mark.parametrize("text", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", b"x" * 100])
def test_what_is_no_certificate_is_refused(text: bytes) -> None:
    with pytest.raises(CertificateError, match="no certificate"):
        expiry(text)


# ---- Settings ----


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    issued = trustme.CA().issue_cert("localhost", not_before=yesterday - timedelta(days=9), not_after=yesterday)
    (tmp_path / "c.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "k.pem").write_bytes(issued.private_key_pem.bytes())
    with pytest.raises(CertificateError, match=f"expired on {yesterday.date()}; renew it"):
        Certificates(tmp_path / "c.pem", tmp_path / "k.pem")


def refused(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        security(ServerConfig(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_settings_that_cannot_be_used_are_one_line(
    authority: Authority, other_authority: Authority, tmp_path: Path
) -> None:
    certificate, key = map(str, authority.issue(*NAMES))
    other_key = str(other_authority.issue(*NAMES)[1])
    assert "--tls-cert is given without --tls-key" in refused(tls_cert=certificate)
    assert "--tls-key is given without --tls-cert" in refused(tls_key=key)
    assert "--tls-client-ca is given without" in refused(tls_client_ca=str(authority.file))
    assert "cannot be read: No such file" in refused(tls_cert=str(tmp_path / "no.pem"), tls_key=key)
    assert "key values mismatch" in refused(tls_cert=certificate, tls_key=other_key)
    assert "--insecure" in refused(host="0.0.0.0")
    assert "--insecure" in refused(host="[::]")
    assert "--insecure" in refused(host="lossgrad.example")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("[::1]", True),
        ("unix:/run/x.sock", True),
        ("0.0.0.0", False),
        ("a.b", False),
    ],
)
def test_local_addresses_are_those_that_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_local(ServerConfig(host=host)) is expected
    if not expected:
        assert security(ServerConfig(host=host, insecure=True)).certificates is None
