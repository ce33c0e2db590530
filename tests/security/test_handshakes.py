"""Every way in which a handshake fails (R21), and clients that take all they need from the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

import lossgrad
from tests.security.conftest import Authority
from tests.server.program import Program
from tests.server.serving import StartServer

NAMES = ("localhost", "127.0.0.1")
PAIR = ([1.0, 2.0], [0.0, 0.0])
TOKEN = "token-0123456789abcdef"  # noqa: S105


class Parties:
    """What callers and servers show each other."""

    def __init__(self, folder: Path) -> None:
        self.ours = Authority(folder / "ours")
        self.others = Authority(folder / "others")
        self.server = self.ours.issue(*NAMES)
        self.elsewhere = self.ours.issue("elsewhere.example", to="elsewhere")
        self.caller = self.ours.issue("caller", to="caller")
        self.stranger = self.others.issue("caller", to="stranger")


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    return Parties(tmp_path_factory.mktemp("parties"))


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[list[str]], Program]]:
    """Give a function that returns a server with such flags: the same one for the same flags."""
    programs: dict[tuple[str, ...], Program] = {}

    def start(flags: list[str]) -> Program:
        if tuple(flags) not in programs:
            programs[tuple(flags)] = Program("--port=0", "--metrics-port=-1", "--threads=1", *flags)
            addresses[programs[tuple(flags)]] = programs[tuple(flags)].address()
        return programs[tuple(flags)]

    yield start
    for program in programs.values():
        program.close()
        addresses.pop(program)


addresses: dict[Program, str] = {}


def pair(files: tuple[Path, Path]) -> dict[str, Any]:
    return {"cert": files[0], "key": files[1]}


def tls(files: tuple[Path, Path], client_ca: Path | None = None) -> list[str]:
    flags = [f"--tls-cert={files[0]}", f"--tls-key={files[1]}"]
    return flags if client_ca is None else [*flags, f"--tls-client-ca={client_ca}"]


# The way, the server's flags, the caller's settings, and what the caller is told to change.
Ways = Callable[[Parties], tuple[list[str], dict[str, Any], str]]
WAYS: Final[dict[str, Ways]] = {
    "plaintext to TLS": lambda p: (tls(p.server), {}, "does it want TLS"),
    "TLS to plaintext": lambda p: ([], {"ca": p.ours.file}, "leave TLS out"),
    "another authority": lambda p: (
        tls(p.server),
        {"ca": p.others.file},
        "not of an authority that this client trusts",
    ),
    "the system's authorities": lambda p: (tls(p.server), {"tls": True}, "not of an authority that this client trusts"),
    "another name": lambda p: (tls(p.elsewhere), {"ca": p.ours.file}, "is for another name than"),
    "no client certificate": lambda p: (tls(p.server, p.ours.file), {"ca": p.ours.file}, "client certificate"),
    "a stranger's certificate": lambda p: (
        tls(p.server, p.ours.file),
        {"ca": p.ours.file, **pair(p.stranger)},
        "client certificate",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_r21_a_handshake_that_fails_is_told_at_once_with_what_to_change(
    parties: Parties, served: Callable[[list[str]], Program], way: str
) -> None:
    flags, settings, hint = WAYS[way](parties)
    program = served(flags)
    logged = len(program.logged)
    began = time.monotonic()
    with (
        lossgrad.LossClient(addresses[program], timeout=10, **settings) as client,
        pytest.raises(lossgrad.Unavailable) as caught,
    ):
        client.l1(*PAIR)
    seconds = time.monotonic() - began
    time.sleep(0.2)
    said = [line for line in program.logged[logged:] if '"DEBUG"' not in line and '"Ready: ' not in line]
    print(  # noqa: T201
        f"\n{way}: {type(caught.value).__name__} after {seconds * 1e3:.0f} ms; the server's log has {len(said)} lines more"
    )
    assert hint in caught.value.message
    assert seconds < 1
    assert type(caught.value) is lossgrad.TLSError or hint in ("does it want TLS", "client certificate")
    assert program.process.poll() is None
    assert not [line for line in said if "Traceback" in line]
    assert len(said) <= 4  # one for each attempt to connect, from gRPC, at most


def test_a_certificate_that_expires_while_it_is_in_use_is_told_so(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    soon = datetime.now(UTC) + timedelta(seconds=2)
    issued = authority.issue_cert(*NAMES, not_after=soon)
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (tmp_path / "c.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    (tmp_path / "k.pem").write_bytes(issued.private_key_pem.bytes())
    server = start_server(tls_cert=str(tmp_path / "c.pem"), tls_key=str(tmp_path / "k.pem"))
    while datetime.now(UTC) <= soon + timedelta(seconds=1):
        time.sleep(0.05)
    with (
        lossgrad.LossClient(server.address, ca=tmp_path / "ca.pem", timeout=10) as client,
        pytest.raises(lossgrad.TLSError, match="expired"),
    ):
        client.l1(*PAIR)


def test_a_client_takes_all_it_needs_from_the_environment(
    start_server: StartServer, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    server = start_server(
        tls_cert=str(parties.server[0]),
        tls_key=str(parties.server[1]),
        tls_client_ca=str(parties.ours.file),
        token_file=str(tmp_path / "tokens"),
    )
    for name in [name for name in os.environ if name.startswith("LOSSGRAD_")]:
        monkeypatch.delenv(name)
    settings = {
        "TARGET": server.address,
        "TLS": "1",
        "CA": str(parties.ours.file),
        "CERT": str(parties.caller[0]),
        "KEY": str(parties.caller[1]),
        "TOKEN": TOKEN,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"LOSSGRAD_{name}", value)
    with lossgrad.LossClient() as client:
        assert client.l1(*PAIR).loss == 1.5
    # Each of them is needed, and each argument goes before its variable.
    with lossgrad.LossClient(token="wrong-" + TOKEN) as client, pytest.raises(lossgrad.Unauthenticated):
        client.l1(*PAIR)
    monkeypatch.delenv("LOSSGRAD_TOKEN")
    with lossgrad.LossClient() as client, pytest.raises(lossgrad.Unauthenticated):
        client.l1(*PAIR)
    with lossgrad.LossClient(token=TOKEN) as client:
        assert client.l1(*PAIR).loss == 1.5
    monkeypatch.delenv("LOSSGRAD_CA")
    with lossgrad.LossClient(token=TOKEN, timeout=10) as client, pytest.raises(lossgrad.TLSError):
        client.l1(*PAIR)


def test_what_is_dangerous_is_off_by_default(start_server: StartServer) -> None:
    config = start_server().config
    assert (config.reflection, config.allow_shared_memory, config.insecure) == (False, False, False)
    assert (type(config)().host, type(config)().metrics_host) == ("127.0.0.1", "127.0.0.1")
