"""The port that several processes share: held by a socket that is bound to it and never listens.

With SO_REUSEPORT the kernel gives each connection to one of the sockets that listen on a port, chosen by the connection's
addresses. Whoever has the option may join in, if it is of the same user: so the port is first bound without it, which
fails where anybody else has the port, and the option is set afterwards, for our own processes.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from lossgrad_server.config import ConfigError


@contextlib.contextmanager
def held(host: str, port: int) -> Iterator[int]:
    """Hold a port of all addresses that a host has, 0 for a free one; give its number. Raises ConfigError."""
    with contextlib.ExitStack() as sockets:
        try:
            found = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise _unusable(host, port, error) from None
        failure: OSError | None = None
        number = 0
        for family, kind, protocol, _, address in found:
            try:
                number = _hold(sockets, family, kind, protocol, (address[0], number or port, *address[2:]))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _unusable(host, port, error) from None
                failure = error  # an address of a family that this machine does not use is no hindrance
        if not number:
            raise _unusable(host, port, failure or OSError("it has no address"))
        yield number


def _hold(sockets: contextlib.ExitStack, family: int, kind: int, protocol: int, address: tuple[str | int, ...]) -> int:
    holder = sockets.enter_context(socket.socket(family, kind, protocol))
    # Over connections of a server before us that are being forgotten; but not beside one that listens.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, bool(address[1]))
    holder.bind(address)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
    number: int = holder.getsockname()[1]
    return number


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port")
