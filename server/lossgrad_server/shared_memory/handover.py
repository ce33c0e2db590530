"""The socket over which segments are handed to callers: a descriptor can be given to another process in no other way.

A caller on this machine connects (GetServerInfo says where), asks for memory, and gets its name and its descriptor. What
it was given belongs to the connection and ends with it, so that a caller that dies leaves nothing behind. Whoever can call
the server can connect: the socket lies beside the server's own, or in the abstract namespace, which like the loopback is
the network namespace's. Nothing can be asked of it but fresh memory, within the budget.

Each message is a record of one size, on a socket that keeps them apart (SOCK_SEQPACKET). All of it runs in the event
loop's thread and never waits: a caller that does not read its answers is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Final

from lossgrad_api.shared_codec import HANDOVER_MARK, HANDOVER_RECORD, TOKEN_BYTES, HandoverAnswer, HandoverAsk
from lossgrad_server.errors import RequestError
from lossgrad_server.shared_memory.segments import Segment, Segments, free_pages

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256


class Handover:
    """Listens, and hands out segments."""

    def __init__(self, segments: Segments, server_address: str) -> None:
        """`server_address` is where the server itself listens, as gRPC writes it."""
        self._segments = segments
        self._path: Path | None = None
        if server_address.startswith("unix:"):
            # Beside the server's own socket: whoever reaches that one reaches this one, from another container, too.
            self._path = Path(server_address.removeprefix("unix:").removeprefix("//") + ".memory").absolute()
            self.address = f"unix:{self._path}"
        else:
            self.address = f"unix-abstract:lossgrad-{secrets.token_hex(16)}"
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    def start(self) -> None:
        """Begin to listen, in the running event loop. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            if self._path is None:
                listener.bind("\0" + self.address.removeprefix("unix-abstract:"))
            else:
                self._path.unlink(missing_ok=True)  # of a server that was killed; gRPC does so with its own
                listener.bind(str(self._path))
            listener.listen(16)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop listening and end all connections."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101 - it is what called
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            logger.warning("A caller that wants to share memory could not be let in: %s", error.strerror)
            return
        accepted.setblocking(False)
        if len(self._connections) >= MAX_CONNECTIONS:
            unused = next((one for one in self._connections if not self._segments.has_any(one)), None)
            if unused is None:
                logger.warning("%s callers share memory, the limit; another was turned away", MAX_CONNECTIONS)
                accepted.close()
                return
            unused.close()
        self._connections.add(_Connection(self, self._segments, accepted))

    def forget(self, connection: _Connection) -> None:
        """Take note that a connection has ended."""
        self._connections.discard(connection)


class _Connection:
    """One caller, and the owner of its segments."""

    def __init__(self, handover: Handover, segments: Segments, accepted: socket.socket) -> None:
        self._handover = handover
        self._segments = segments
        self._socket = accepted
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(accepted, self._read)

    def close(self) -> None:
        """End it. Its segments are not touched: the server is going, and its callers may still look at results."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._handover.forget(self)
        self._segments.take_all(self)

    def _read(self) -> None:
        try:
            # Room for one byte more than a record has, to see that there is no more. Descriptors that a caller sends
            # along are not taken: there is no room for them, and the kernel closes them.
            message = self._socket.recv(HANDOVER_RECORD.size + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._end()
            return
        if len(message) != HANDOVER_RECORD.size:
            self._refuse()
            return
        mark, ask, token, byte_count = HANDOVER_RECORD.unpack(message)
        if mark == HANDOVER_MARK and ask == HandoverAsk.REGION and byte_count:
            self._grant(byte_count)
        elif mark == HANDOVER_MARK and ask == HandoverAsk.RELEASE:
            segment = self._segments.take(self, token)
            if segment is not None:
                self._free([segment])
        else:
            self._refuse()

    def _grant(self, byte_count: int) -> None:
        try:
            segment, descriptor = self._segments.create(self, byte_count)
        except RequestError:
            self._answer(HandoverAnswer.NO_ROOM, byte_count=byte_count)
            return
        except (OSError, ValueError, OverflowError) as error:
            logger.warning("No memory to share: %s bytes: %s", byte_count, error)
            self._answer(HandoverAnswer.NO_ROOM, byte_count=byte_count)
            return
        try:
            self._answer(HandoverAnswer.GRANTED, segment, descriptor)
        finally:
            os.close(descriptor)

    def _answer(
        self, answer: HandoverAnswer, segment: Segment | None = None, descriptor: int | None = None, byte_count: int = 0
    ) -> None:
        token = bytes(TOKEN_BYTES)
        if segment is not None:
            token, byte_count = segment.token, segment.byte_count
        record = HANDOVER_RECORD.pack(HANDOVER_MARK, answer, token, byte_count)
        try:
            socket.send_fds(self._socket, [record], [] if descriptor is None else [descriptor])
        except OSError:  # gone, or it does not read
            self._end()

    def _refuse(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(HANDOVER_RECORD.pack(HANDOVER_MARK, HandoverAnswer.MALFORMED, bytes(TOKEN_BYTES), 0))
        self._end()

    def _end(self) -> None:
        segments = self._segments.take_all(self)
        self.close()
        self._free(segments)

    def _free(self, segments: list[Segment]) -> None:
        if segments:
            self._loop.run_in_executor(None, _free_all, segments)


def _free_all(segments: list[Segment]) -> None:
    while segments:
        free_pages(segments.pop())
