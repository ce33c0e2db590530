"""`lossgrad doctor`: what it finds on the way to a server, and what it says to do about it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from lossgrad.cli import network_checks
from lossgrad.cli.checks import Check, State
from lossgrad.cli.network_checks import Place, places_of
from tests.client.doctor import Doctor
from tests.client.peer import PeerServer

NEEDS_OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


def test_nobody_listening_is_found(doctor: Doctor) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    code, checks = doctor("--target", target)
    assert code == 1
    assert (checks["tcp"]["state"], checks["tcp"]["text"]) == ("fail", f"{target}: connection refused")
    assert checks["tcp"]["remedy"].startswith("start lossgrad-server there; look at its --port, and its --host")
    assert checks["server"]["state"] == "skip"
    assert doctor.err == "lossgrad: 1 of 5 checks failed: tcp\n"


def test_a_name_without_an_address_is_found(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, checks = doctor("--target", "lossgrad.invalid:50051")
    assert code == 1
    assert checks["dns"]["text"] == "'lossgrad.invalid' has no address: Name or service not known"


@pytest.mark.parametrize(
    ("error", "says", "remedy"),
    [
        (TimeoutError(), "no answer in 2 s", "look at firewalls, security groups and network policies"),
        (OSError(113, "No route to host"), "No route to host", "look at this machine's network"),
    ],
)
def test_a_host_that_does_not_answer_is_found(
    error: OSError, says: str, remedy: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(network_checks, "_open", fail)
    _, checks = doctor("--target", "127.0.0.1:50051")
    assert checks["tcp"]["text"] == f"127.0.0.1:50051: {says}"
    assert checks["tcp"]["remedy"].startswith(remedy)


def test_one_of_several_addresses_that_does_not_answer_is_a_warning(
    target: str,
) -> None:
    port = int(target.rpartition(":")[2])
    found = [(socket.AF_INET, ("127.0.0.1", each)) for each in (port, 1)]
    checks = list(network_checks._connect(Place("replicas", port), found, 1))
    assert isinstance(checks[0], Check)
    assert checks[0].state is State.WARN
    assert checks[0].text == f"replicas:{port}: 1 of 2 addresses answer; another: connection refused"


@contextmanager
def speaking(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Give the address of a program that is no gRPC server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def send(data: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(data)

    return answer


@pytest.mark.parametrize(
    ("answer", "says", "remedy"),
    [
        (
            send(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            "speaks HTTP/1.1 only",
            "give the server's gRPC port (50051), not that",
        ),
        (send(b"\x15\x03\x01\x00\x02\x02\x46"), "speaks TLS, and this client does not", "use --ca FILE, or --tls"),
        (send(b""), "closes the connection at once, as servers that want TLS do", "use --ca FILE, or --tls"),
        (send(b"-ERR unknown command\r\n"), "does not speak HTTP/2", "another program has this port"),
        (
            lambda connection: connection.recv(10_000) and connection.recv(10),
            "says nothing in 0.2 s",
            "another program",
        ),
    ],
)
def test_another_program_on_the_port_is_found(
    answer: Callable[[socket.socket], None], says: str, remedy: str, doctor: Doctor
) -> None:
    with speaking(answer) as target:
        code, checks = doctor("--target", target, "--timeout", "0.2")
    assert code == 1
    assert says in checks["http2"]["text"]
    assert checks["http2"]["remedy"].startswith(remedy)


def test_tls_to_a_server_that_has_none_is_found(target: str, doctor: Doctor) -> None:
    _, checks = doctor("--target", target, "--tls")
    assert checks["tls"]["text"] == f"{target}: it does not speak TLS"
    assert checks["tls"]["remedy"].startswith("leave out --tls and --ca (LOSSGRAD_TLS=0)")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    for name, subject, days in (("good", "localhost", 100), ("old", "localhost", 2), ("other", "elsewhere", 100)):
        command = (
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days {days} -subj /CN={subject} "
            f"-addext subjectAltName=DNS:{subject} -keyout {name}.key -out {name}.pem"
        )
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@contextmanager
def tls_server(folder: Path, name: str, *, client: str | None = None) -> Iterator[str]:
    pair = ((folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes())
    root = None if client is None else (folder / f"{client}.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], root, require_client_auth=client is not None)
    server = PeerServer(credentials=credentials)
    yield f"localhost:{server.port}"
    server.stop()


@NEEDS_OPENSSL
def test_tls_in_order_passes_and_tells_how_long_the_certificate_is_good(certificates: Path, doctor: Doctor) -> None:
    with tls_server(certificates, "good") as target:
        code, checks = doctor("--target", target, "--ca", str(certificates / "good.pem"))
    assert (code, checks["tls"]["state"]) == (0, "ok")
    assert checks["tls"]["text"] == f"TLSv1.3 with {target}, its certificate is good for 100 days"
    with tls_server(certificates, "old") as target:
        code, checks = doctor("--target", target, "--ca", str(certificates / "old.pem"))
    assert (code, checks["tls"]["state"], checks["tls"]["remedy"]) == (0, "warn", "renew the certificate")


@NEEDS_OPENSSL
@pytest.mark.parametrize(
    ("name", "trusted", "says", "remedy"),
    [
        (
            "good",
            "other",
            "self-signed certificate",
            "give the PEM file of the authority that signed the certificate: --ca",
        ),
        (
            "other",
            "other",
            "Hostname mismatch",
            "call the server by a name that its certificate has, or have localhost",
        ),
    ],
)
def test_a_certificate_that_does_not_fit_is_found(
    name: str, trusted: str, says: str, remedy: str, certificates: Path, doctor: Doctor
) -> None:
    with tls_server(certificates, name) as target:
        code, checks = doctor("--target", target, "--ca", str(certificates / f"{trusted}.pem"))
    assert code == 1
    assert says in checks["tls"]["text"]
    assert checks["tls"]["remedy"].startswith(remedy)


@NEEDS_OPENSSL
def test_a_client_certificate_that_is_wanted_is_found(certificates: Path, doctor: Doctor) -> None:
    ca = ["--ca", str(certificates / "good.pem")]
    with tls_server(certificates, "good", client="other") as target:
        code, checks = doctor("--target", target, *ca)
        assert code == 1
        assert checks["tls"]["remedy"] == "give a certificate that it trusts: --cert and --key"
        own = ["--cert", str(certificates / "other.pem"), "--key", str(certificates / "other.key")]
        code, checks = doctor("--target", target, *ca, *own)
        assert (code, checks["tls"]["state"]) == (0, "ok")
        assert checks["settings"]["text"].endswith("TLS with a client certificate, no token")
        wrong = ["--cert", str(certificates / "other.pem"), "--key", str(certificates / "good.key")]
        _, checks = doctor("--target", target, *ca, *wrong)
        assert checks["tls"]["remedy"] == "give PEM files; the key must be the certificate's"


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("certificate has expired", "renew the server's certificate, or set this machine's clock right"),
        ("certificate is not yet valid", "set this machine's clock right"),
        (
            "IP address mismatch, certificate is not valid for '10.0.0.1'.",
            "call the server by a name that its certificate",
        ),
        ("unable to get local issuer certificate", "give the PEM file of the authority"),
    ],
)
def test_what_is_wrong_with_a_certificate_has_its_remedy(message: str, remedy: str) -> None:
    assert network_checks._certificate_remedy(message, Place("10.0.0.1", 1)).startswith(remedy)


def test_a_proxy_in_the_way_is_a_warning(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_checks, "_open", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError()))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("10.0.0.1", 1))])
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    _, checks = doctor("--target", "far.example:50051")
    assert checks["proxy"]["text"] == "calls go through http://proxy:3128 (https_proxy)"
    assert checks["proxy"]["remedy"] == "set no_proxy=far.example if the server is to be called directly"
    monkeypatch.setenv("no_proxy", "localhost,.example")
    assert "proxy" not in doctor("--target", "far.example:50051")[1]


@pytest.mark.parametrize(
    ("target", "places"),
    [
        ("localhost:50051", [Place("localhost", 50051)]),
        ("localhost", [Place("localhost", 443)]),
        ("dns:///a.b:1", [Place("a.b", 1)]),
        ("dns://8.8.8.8/a.b:1", [Place("a.b", 1)]),
        ("dns:a:1", [Place("a", 1)]),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", [Place("10.0.0.1", 1), Place("10.0.0.2", 2)]),
        ("ipv6:[::1]:50051", [Place("::1", 50051)]),
        ("[::1]:50051", [Place("::1", 50051)]),
        ("::1", [Place("::1", 443)]),
        ("unix:/run/x.sock", [Place(path="/run/x.sock")]),
        ("unix:///run/x.sock", [Place(path="/run/x.sock")]),
        ("unix-abstract:x", [Place(path="\0x")]),
        ("xds:///service", []),
    ],
)
def test_a_target_leads_to_places(target: str, places: list[Place]) -> None:
    assert places_of(target) == places


def test_a_socket_and_its_permissions_are_checked(tmp_path: Path, doctor: Doctor) -> None:
    path = tmp_path / "s"
    assert doctor("--target", f"unix:{path}")[1]["tcp"]["text"] == f"{path}: there is no such socket"
    server = PeerServer(f"unix:{path}")
    try:
        code, checks = doctor("--target", f"unix:{path}")
    finally:
        server.stop()
    assert code == 0
    assert checks["http2"]["text"] == f"{path} speaks HTTP/2 in plaintext"
