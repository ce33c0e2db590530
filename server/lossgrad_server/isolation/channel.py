"""Packets over a SOCK_SEQPACKET socket, with at most one descriptor beside each."""

from __future__ import annotations

import array
import select
import socket
from typing import Final

from lossgrad_server.isolation.records import MAX_PACKET_BYTES

_DESCRIPTOR_BYTES: Final = array.array("i").itemsize


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, packet: bytes, descriptor: int | None = None) -> None:
    """Send a packet, and a descriptor with it. Raises OSError."""
    if descriptor is None:
        channel.send(packet)
    else:
        socket.send_fds(channel, [packet], [descriptor])


def receive(channel: socket.socket, *, is_waiting: bool) -> tuple[bytes, int]:
    """Return the next packet, and the descriptor that came with it or -1. The packet is empty where the other end is closed.

    Raises BlockingIOError where there is none, unless waiting for one, and OSError.
    """
    # Not socket.recv_fds, which forgets its flags.
    flags = socket.MSG_CMSG_CLOEXEC | (0 if is_waiting else socket.MSG_DONTWAIT)
    try:
        packet, extra, _, _ = channel.recvmsg(MAX_PACKET_BYTES, socket.CMSG_LEN(_DESCRIPTOR_BYTES), flags)
    except ConnectionResetError:  # closed, with something unread
        return b"", -1
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return packet, array.array("i", data)[0]
    return packet, -1


def is_readable(descriptor: socket.socket | int, timeout_seconds: float | None) -> bool:
    """Wait until there is something to receive, None for ever; return whether there is. Works for any descriptor."""
    poller = select.poll()  # not select.select, which knows the first 1024 descriptors only
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if timeout_seconds is None else max(0.0, timeout_seconds) * 1e3))
