"""Who is at the other end of a call: whether it is on this machine, and which user it is.

gRPC tells an address. A loopback address says that the caller is in this network namespace, and then the kernel knows
whose socket it is: one question over netlink, some 20 us. A connection would be a poor owner for regions: load generators
register on one and infer on others, and connections are closed and opened again behind a client's back.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final
from urllib.parse import unquote

IN_PROCESS: Final = "inproc"
_USER: Final = "user "
_ANY_OF_SOCKET: Final = "unix"

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_ALL_STATES: Final = 0xFFFF_FFFF
_NO_COOKIE: Final = b"\xff" * 8
# nlmsghdr: length, type, flags, sequence, port.
_HEADER: Final = struct.Struct("=IHHII")
# inet_diag_req_v2: family, protocol, extensions, states; then inet_diag_sockid: ports, addresses, interface, cookie.
_REQUEST: Final = struct.Struct("=BBBxI2s2s16s16sI8s")
# inet_diag_msg: 4 bytes, the 48 bytes of inet_diag_sockid, 3 numbers, then the user.
_USER_AT: Final = _HEADER.size + 4 + 48 + 12
_WAIT_SECONDS: Final = 0.2


def owner_of(peer: str, port: int) -> str | None:
    """Return whom a caller's regions belong to, by gRPC's name of its address; None where it is not on this machine.

    That is a user, or where the kernel does not tell, a connection. All callers of a unix socket are one owner: its
    file's permissions say who may connect, and gRPC tells no more. `port` is the one that this server listens on.
    """
    kind, _, address = peer.partition(":")
    if peer == IN_PROCESS:
        return f"{_USER}{os.geteuid()}"
    if kind in ("unix", "unix-abstract"):
        return _ANY_OF_SOCKET
    if kind not in ("ipv4", "ipv6"):
        return None
    host, _, client_port = unquote(address).rpartition(":")
    try:
        ip = ipaddress.ip_address(host.strip("[]").partition("%")[0])
        number = int(client_port)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_loopback:
        return None
    user = _user_of_socket(ip, number, port)
    return peer if user is None else f"{_USER}{user}"


def user_of(owner: str) -> int | None:
    """Return an owner's user id; None for one that is no known user."""
    return int(owner.removeprefix(_USER)) if owner.startswith(_USER) else None


def is_this_user(owner: str, server_address: str) -> bool:
    """Return whether an owner can be nobody but the user that the server runs as, or root.

    Of callers over a unix socket gRPC tells no user. Who may write to the socket may connect, so it is enough that only
    its owner may. `server_address` is where the server listens, as gRPC writes it.
    """
    user = user_of(owner)
    if user is not None:
        return user in (os.geteuid(), 0)
    return owner == _ANY_OF_SOCKET and _is_private(server_address)


def _is_private(address: str) -> bool:
    if not address.startswith("unix:"):  # an abstract one has no permissions
        return False
    try:
        status = Path(address.removeprefix("unix:").removeprefix("//")).stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _user_of_socket(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, server_port: int) -> int | None:
    """Return the user whose TCP socket is at `ip`:`port`, connected to the server; None where the kernel does not say."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    server = ip if ip.version == 6 else ipaddress.IPv4Address("127.0.0.1")
    request = _REQUEST.pack(
        family, socket.IPPROTO_TCP, 0, _ALL_STATES,
        port.to_bytes(2, "big"), server_port.to_bytes(2, "big"),
        ip.packed.ljust(16, b"\0"), server.packed.ljust(16, b"\0"), 0, _NO_COOKIE,
    )  # fmt: skip
    message = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not allowed here
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_WAIT_SECONDS)
            netlink.sendto(message, (0, 0))
            answer = netlink.recv(4096)
        _, kind, _, _, _ = _HEADER.unpack_from(answer)
        if kind == _SOCK_DIAG_BY_FAMILY and len(answer) >= _USER_AT + 4:
            return int(struct.unpack_from("=I", answer, _USER_AT)[0])
    return None
