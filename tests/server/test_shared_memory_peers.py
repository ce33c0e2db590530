"""Who is at the other end of a call, as the kernel tells."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lossgrad_server.shared_memory.peers import owner_of, user_of

CONNECT = """
import os, socket, sys
family, host, port, user = sys.argv[1:]
if int(user) != os.getuid():
    os.setuid(int(user))
connection = socket.socket(getattr(socket, family))
connection.connect((host, int(port)))
print(connection.getsockname()[1], flush=True)
sys.stdin.read()
"""
NOBODY = 65534


@pytest.fixture(params=["AF_INET", "AF_INET6"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = getattr(socket, request.param)
    listening = socket.socket(family)
    try:
        listening.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    except OSError as error:
        pytest.skip(f"no {request.param} loopback: {error}")
    listening.listen()
    with listening:
        yield listening


def address(host: str, port: int) -> str:
    return f"ipv4:{host}:{port}" if ":" not in host else f"ipv6:%5B{host}%5D:{port}"


@pytest.mark.parametrize("user", [os.getuid(), NOBODY])
def test_a_caller_over_the_loopback_is_a_user(listener: socket.socket, user: int) -> None:
    if user != os.getuid() and os.getuid() != 0:
        pytest.skip("only root can call as somebody else")
    host, port = listener.getsockname()[:2]
    command = [sys.executable, "-c", CONNECT, listener.family.name, host, str(port), str(user)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        client_port = int(client.stdout.readline())
        owner = owner_of(address(host, client_port), port)
        client.communicate()
    if owner == address(host, client_port):
        pytest.skip("this kernel does not tell whose a socket is (no inet_diag)")
    assert owner == f"user {user}"
    assert user_of(owner) == user


def test_where_the_kernel_does_not_tell_a_connection_owns(unused_port: int) -> None:
    peer = f"ipv4:127.0.0.1:{unused_port}"
    assert owner_of(peer, 1) == peer
    assert user_of(peer) is None


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.parametrize("peer", ["unix:", "unix:/run/lossgrad.sock", "unix-abstract:lossgrad"])
def test_callers_of_a_unix_socket_are_one(peer: str) -> None:
    owner = owner_of(peer, 0)
    assert owner == "unix"
    assert user_of(owner) is None


def test_a_caller_in_this_process_is_this_user() -> None:
    assert owner_of("inproc", 0) == f"user {os.geteuid()}"


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:10.0.0.1:1234",
        "ipv4:192.168.1.5:127",
        "ipv4:128.0.0.1:1",
        "ipv6:%5Bfe80::1%25eth0%5D:1",
        "ipv6:[2001:db8::1]:1",
        "ipv6:[::ffff:10.0.0.1]:1",
        "ipv4:127.0.0.1",
        "ipv4:127.0.0.1:",
        "ipv4:127.0.0.1.evil.example:1",
        "ipv4:0x7f000001:1",
        "ipv4:localhost:1",
        "vsock:2:1",
        "",
        "127.0.0.1:1",
        "xunix:",
    ],
)
def test_everybody_else_is_on_another_machine(peer: str) -> None:
    assert owner_of(peer, 1) is None


@pytest.mark.parametrize("peer", ["ipv6:[::1]:1", "ipv6:%5B::1%5D:1", "ipv6:[::ffff:127.0.0.1]:1", "ipv4:127.9.9.9:1"])
def test_every_loopback_address_is_this_machine(peer: str) -> None:
    assert owner_of(peer, 1) is not None
