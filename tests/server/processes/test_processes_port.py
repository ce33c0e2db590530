"""The port that several processes share: ours may listen on it together, and nobody else may."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from lossgrad_server.config import ConfigError
from lossgrad_server.processes.port import held

HOST = "127.0.0.1"


@contextlib.contextmanager
def listening(port: int, *, shares: bool) -> Iterator[socket.socket]:
    """Listen as gRPC does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
        listener.bind((HOST, port))
        listener.listen()
        yield listener


def test_several_listen_on_a_held_port_and_share_its_connections() -> None:
    with held(HOST, 0) as port, contextlib.ExitStack() as stack:
        assert port > 0
        listeners = [stack.enter_context(listening(port, shares=True)) for _ in range(2)]
        callers = [stack.enter_context(socket.create_connection((HOST, port), timeout=5)) for _ in range(64)]
        accepted = 0
        for listener in listeners:
            listener.setblocking(False)
            own = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    own += 1
            assert own > 0
            accepted += own
        assert accepted == len(callers)


def test_who_does_not_share_cannot_have_it() -> None:
    with held(HOST, 0) as port, pytest.raises(OSError, match="in use"), listening(port, shares=False):
        pass


def test_a_port_that_is_held_or_listened_on_is_refused_to_a_second_server() -> None:
    with held(HOST, 0) as port:
        message = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(ConfigError, match=message), held(HOST, port):
            pass
        with listening(port, shares=True), pytest.raises(ConfigError, match="choose another"), held(HOST, port):
            pass
    with held(HOST, port) as again:  # it was let go
        assert again == port


def test_a_listener_that_would_share_with_anybody_is_not_joined() -> None:
    with listening(0, shares=True) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="in use"), held(HOST, port):
            pass


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::1]", "::"])
def test_every_form_of_a_host_is_understood(host: str) -> None:
    if ":" in host:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    with held(host, 0) as port, socket.socket() as other:
        assert port > 0
        if host in ("localhost", "0.0.0.0"):
            with pytest.raises(OSError, match="in use"):
                other.bind((HOST, port))


@pytest.mark.parametrize("host", ["no host", "192.0.2.1"])
def test_a_host_that_is_none_of_this_machine_is_told_in_one_line(host: str) -> None:
    with pytest.raises(ConfigError) as caught, held(host, 0):
        pass
    assert str(caught.value).startswith(f"cannot listen on {host}:0: ")
    assert "\n" not in str(caught.value)
