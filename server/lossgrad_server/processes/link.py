"""The socket between a parent and one of its processes: a few words, each a packet, and metrics over a pipe of their own.

The parent's end belongs to its event loop, but for asking for metrics, which any thread may. The child's end is read by a
thread of its own, so that metrics are told however busy the event loop is; orders go on to the event loop. The parent's end
closes when the parent dies, however it does, and so no process outlives it unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final

logger = logging.getLogger(__name__)

_MAX_PACKET_BYTES: Final = 1 << 16
_METRICS: Final = b"metrics"
_PING: Final = b"ping"
# How long a parent may take to read metrics that it has asked for.
_READ_SECONDS: Final = 5.0


class Order(StrEnum):
    """What a parent tells its child."""

    LISTEN = "listen"
    DRAIN = "drain"
    STOP = "stop"  # at once
    # No parent says these:
    ORPHANED = "orphaned"  # it has died
    GO = "go"  # a signal has come, perhaps to this process alone


class News(StrEnum):
    """What a child tells its parent."""

    WARM = "warm"  # it could serve, and waits to be told
    SERVING = "serving"
    ALIVE = "alive"  # the answer of its event loop to a ping


class ParentEnd:
    """The parent's end."""

    def __init__(self) -> None:
        """Make a socket; `child` is the other end, to be given to the child and then closed here."""
        self._socket, self.child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close both ends."""
        self._socket.close()
        self.child.close()

    def receive(self) -> News | None:
        """Return what the child tells; None where it has closed its end. Raises BlockingIOError."""
        try:
            packet = self._socket.recv(_MAX_PACKET_BYTES)
        except ConnectionResetError:
            packet = b""
        return News(packet.decode()) if packet else None

    def send_settings(self, settings: dict[str, Any]) -> None:
        """Send a child what it begins with."""
        self._socket.send(json.dumps(settings).encode())

    def tell(self, order: Order) -> None:
        """Give an order. Nothing happens where the child has ended, or has not read for long."""
        with contextlib.suppress(OSError):
            self._socket.send(order.encode())

    def ping(self) -> None:
        """Ask the child's event loop for a sign of life."""
        with contextlib.suppress(OSError):
            self._socket.send(_PING)

    def ask_for_metrics(self) -> socket.socket:
        """Ask for metrics; return where they come, up to the end of the stream. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._socket, [_METRICS], [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return ours


class ChildEnd:
    """The child's end."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)

    def settings(self) -> Any:
        """Return what the parent has sent to begin with. Raises EOFError where it has ended."""
        packet = self._socket.recv(_MAX_PACKET_BYTES)
        if not packet:
            raise EOFError
        return json.loads(packet)

    def listen(self, give: Callable[[Order], None], metrics: Callable[[], bytes]) -> None:
        """Begin to read, in a thread: give orders to the running event loop, and answer with `metrics` when asked."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop, give, metrics), name="lossgrad-parent", daemon=True).start()

    def tell(self, news: News) -> None:
        """Tell the parent. Nothing happens where it has ended: the orders say so."""
        with contextlib.suppress(OSError):
            self._socket.send(news.encode())

    def _read(
        self, loop: asyncio.AbstractEventLoop, give: Callable[[Order], None], metrics: Callable[[], bytes]
    ) -> None:
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_PACKET_BYTES, 1)
            except ConnectionResetError:
                packet, descriptors = b"", []
            if packet == _METRICS:
                _answer(descriptors, metrics)
                continue
            try:
                if packet == _PING:
                    loop.call_soon_threadsafe(self.tell, News.ALIVE)
                else:
                    loop.call_soon_threadsafe(give, Order(packet.decode()) if packet else Order.ORPHANED)
            except RuntimeError:  # the loop has closed: the server has ended
                return
            if not packet:
                return


def _answer(descriptors: list[int], metrics: Callable[[], bytes]) -> None:
    for descriptor in descriptors:
        with socket.socket(fileno=descriptor) as pipe:
            pipe.settimeout(_READ_SECONDS)
            try:
                pipe.sendall(metrics())
            except OSError:
                logger.warning("The parent has not read the metrics that it asked for")


def take(descriptor: int) -> ChildEnd:
    """Return the end that was given to this process; what it starts itself does not get it."""
    os.set_inheritable(descriptor, False)
    return ChildEnd(descriptor)
