"""The way to a server, step by step, without gRPC, whose errors name no step: names, connections, TLS, HTTP/2."""

from __future__ import annotations

import os
import re
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lossgrad.channel import ChannelSettings, is_local
from lossgrad.cli.checks import Check, fail, ok, skip, warn
from lossgrad.cli.latencies import duration

_MOST_ADDRESSES: Final = 8
_GRPC_PORT: Final = 443  # what gRPC takes where a target has none
_DAYS_LEFT: Final = 14
# HTTP/2's connection preface, and an empty SETTINGS frame: what a gRPC client sends first.
_HTTP2_HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS_TYPE: Final = 4
_TLS_ALERT: Final = 0x15


@dataclass(frozen=True, slots=True)
class Place:
    """Where a target leads: host and port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path.replace("\0", "@")
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def places_of(target: str) -> list[Place]:
    """Return where a gRPC target leads. Empty for schemes that only gRPC resolves, such as xds."""
    if target.startswith("unix-abstract:"):
        return [Place(path="\0" + target.partition(":")[2])]
    if target.startswith("unix:"):
        return [Place(path=re.sub(r"^//(?=/)", "", target.partition(":")[2]))]
    scheme = re.match(r"([a-z0-9+.-]+):(?=/|[^/]*:)", target)
    if scheme is not None and scheme[1] in ("dns", "ipv4", "ipv6"):
        target = re.sub(r"^//[^/]*/", "", target[scheme.end() :])
    elif "://" in target:
        return []
    return [_place(address) for address in target.split(",")]


def _place(address: str) -> Place:
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        port = rest.removeprefix(":")
    elif address.count(":") > 1:
        host, port = address, ""
    else:
        host, _, port = address.partition(":")
    return Place(host, int(port) if port.isdecimal() else _GRPC_PORT)


def examine_network(settings: ChannelSettings, timeout: float) -> Iterator[Check]:
    """Check the way to the server. The last check is a failure where it does not lead there."""
    places = places_of(settings.target)
    if not places:
        yield skip("dns", f"{settings.target} is resolved by gRPC alone")
        return
    yield from _examine_proxy(settings.target)
    reached = None
    for place in places:
        if place.port == _GRPC_PORT and f":{_GRPC_PORT}" not in settings.target:
            yield warn("settings", f"{settings.target} has no port, and gRPC takes {_GRPC_PORT}", "give HOST:PORT")
        found: list[tuple[int, Any]] = []
        if place.path:
            found = [(socket.AF_UNIX, place.path)]
        else:
            yield from _resolve(place, found)
        opened = list(_connect(place, found, timeout)) if found else []
        yield from (each for each in opened if isinstance(each, Check))
        reached = reached or next((each for each in opened if not isinstance(each, Check)), None)
    if reached is not None:
        yield from _examine_tls(settings, *reached, timeout) if settings.tls else _examine_http2(*reached, timeout)


def _examine_proxy(target: str) -> Iterator[Check]:
    variable = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
    if variable is not None and not is_local(target) and not target.startswith("unix"):
        host = places_of(target)[0].host
        exceptions = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112 - gRPC's names
        if not any(host.endswith(each.strip().lstrip("*")) for each in exceptions.split(",") if each.strip()):
            yield warn(
                "proxy",
                f"calls go through {os.environ[variable]} ({variable})",
                f"set no_proxy={host} if the server is to be called directly",
            )


def _resolve(place: Place, found: list[tuple[int, Any]]) -> Iterator[Check]:
    start = time.perf_counter()
    try:
        infos = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        yield fail(
            "dns", f"{place.host!r} has no address: {reason}", "check the name, and this machine's DNS and search list"
        )
        return
    found += dict.fromkeys((family, address) for family, _, _, _, address in infos)
    addresses = ", ".join(str(address[0]) for _, address in found[:_MOST_ADDRESSES])
    yield ok("dns", f"{place.host} is {addresses} ({duration(time.perf_counter() - start)})")


def _connect(
    place: Place, found: Sequence[tuple[int, Any]], timeout: float
) -> Iterator[Check | tuple[Place, int, Any]]:
    """Connect to each address; give a check, and what can be connected to, if anything."""
    failures: list[tuple[str, str]] = []
    times = []
    reached: tuple[Place, int, Any] | None = None
    for family, address in found[:_MOST_ADDRESSES]:
        start = time.perf_counter()
        try:
            _open(family, address, timeout).close()
        except OSError as error:
            failures.append(_unreachable(place, error, timeout))
        else:
            times.append(time.perf_counter() - start)
            reached = reached or (place, family, address)
    total = min(len(found), _MOST_ADDRESSES)
    if reached is None:
        yield fail("tcp", f"{place}: {failures[0][0]}", failures[0][1])
        return
    # A name such as localhost has an IPv6 address too, on which nobody need listen.
    if failures and not is_local(str(place)):
        yield warn(
            "tcp", f"{place}: {len(times)} of {total} addresses answer; another: {failures[0][0]}", failures[0][1]
        )
    else:
        yield ok("tcp", f"{place} takes connections ({duration(min(times))})")
    yield reached


def _open(family: int, address: Any, timeout: float) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _unreachable(place: Place, error: OSError, timeout: float) -> tuple[str, str]:
    """Return what happened, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        remedy = (
            "start lossgrad-server there; look at its --port, and its --host, which is 127.0.0.1 unless told otherwise"
        )
        return "connection refused", remedy
    if isinstance(error, TimeoutError):
        return (
            f"no answer in {timeout:g} s",
            "look at firewalls, security groups and network policies between here and there, and whether the host is up",
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such socket", "start lossgrad-server with --host unix:PATH, or give its path"
    if isinstance(error, PermissionError):
        return "this user may not use the socket", "change its permissions, or run as a user who may"
    return error.strerror or str(error), "look at this machine's network"


def _examine_http2(place: Place, family: int, address: Any, timeout: float) -> Iterator[Check]:
    """Say hello in plaintext HTTP/2, and see what answers."""
    try:
        with _open(family, address, timeout) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(64)
    except TimeoutError:
        yield fail(
            "http2", f"{place} says nothing in {timeout:g} s", "another program has this port: see who does there"
        )
        return
    except OSError:  # it closed the connection
        answer = b""
    if len(answer) > 3 and answer[3] == _SETTINGS_TYPE:
        yield ok("http2", f"{place} speaks HTTP/2 in plaintext")
    elif answer[:1] == bytes((_TLS_ALERT,)) or not answer:
        told = "speaks TLS" if answer else "closes the connection at once, as servers that want TLS do"
        yield fail("http2", f"{place} {told}, and this client does not", "use --ca FILE, or --tls (LOSSGRAD_TLS=1)")
    elif answer.startswith(b"HTTP/1"):
        yield fail(
            "http2", f"{place} speaks HTTP/1.1 only", "give the server's gRPC port (50051), not that of its metrics"
        )
    else:
        yield fail("http2", f"{place} does not speak HTTP/2", "another program has this port: see who does there")


def _examine_tls(settings: ChannelSettings, place: Place, family: int, address: Any, timeout: float) -> Iterator[Check]:
    """Shake hands, as gRPC will, and look at the certificate."""
    try:
        context = _tls_context(settings)
    except (ssl.SSLError, OSError) as error:
        remedy = "give PEM files; the key must be the certificate's"
        yield fail("tls", f"--ca, --cert and --key cannot be used: {error}", remedy)
        return
    try:
        with (
            _open(family, address, timeout) as plain,
            context.wrap_socket(plain, server_hostname=place.host) as connection,
        ):
            certificate: Any = connection.getpeercert() or {}
            version, protocol = connection.version(), connection.selected_alpn_protocol()
            connection.sendall(_HTTP2_HELLO)
            # In TLS 1.3 the client's certificate is judged after the handshake; some servers then close without a word.
            if not connection.recv(64):
                raise ssl.SSLError(
                    ssl.SSL_ERROR_EOF, "CERTIFICATE_REQUIRED, it seems: the server closed the connection"
                )
    except OSError as error:  # ssl's errors are such as well
        text, remedy = _tls_failure(error, place, timeout)
        yield fail("tls", f"{place}: {text}", remedy)
        return
    if protocol != "h2":
        remedy = "give the gRPC port, past proxies that end HTTP/2"
        yield fail("tls", f"{place} speaks {version} but not HTTP/2 over it", remedy)
        return
    expires = ssl.cert_time_to_seconds(certificate["notAfter"]) if "notAfter" in certificate else None
    days = None if expires is None else (expires - time.time()) / 86400
    text = f"{version} with {place}" + ("" if days is None else f", its certificate is good for {days:.0f} days")
    if days is not None and days < _DAYS_LEFT:
        yield warn("tls", text, "renew the certificate")
    else:
        yield ok("tls", text)


def _tls_failure(error: OSError, place: Place, timeout: float) -> tuple[str, str]:
    """Return what went wrong while shaking hands, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message, _certificate_remedy(error.verify_message, place)
    if not isinstance(error, ssl.SSLError):
        reason = error.strerror or f"no answer in {timeout:g} s"
        return f"{reason} while shaking hands", "see the server's log, and what is between here and there"
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return "it does not speak TLS", "leave out --tls and --ca (LOSSGRAD_TLS=0), or turn TLS on there"
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
        return f"it refuses this client: {reason}", "give a certificate that it trusts: --cert and --key"
    return reason, "see the server's log"


def _tls_context(settings: ChannelSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=None if settings.ca is None else settings.ca.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    if settings.cert is not None and settings.key is not None:
        # The ssl module takes these from files only.
        with tempfile.TemporaryDirectory() as folder:
            cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
            key.touch(0o600)
            cert.write_bytes(settings.cert)
            key.write_bytes(settings.key)
            context.load_cert_chain(cert, key)
    return context


def _certificate_remedy(message: str, place: Place) -> str:
    message = message.lower()
    if "expired" in message:
        return "renew the server's certificate, or set this machine's clock right"
    if "not yet valid" in message:
        return "set this machine's clock right"
    if "mismatch" in message or "not valid for" in message:
        return f"call the server by a name that its certificate has, or have {place.host} put into it"
    return "give the PEM file of the authority that signed the certificate: --ca FILE (LOSSGRAD_CA)"
