"""A network that does what a test wants: a TCP proxy on the loopback that delays, cuts, resets and loses connections."""

# ruff: noqa: ASYNC110 - whether it is cut, another thread says
from __future__ import annotations

import asyncio
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024
_LINGER_RESET = struct.pack("ii", 1, 0)  # closing sends RST


class Proxy:
    """Carries bytes both ways between callers and the server at `upstream`, in a thread of its own."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self.delay_seconds = 0.0  # each way
        self.is_cut = False  # bytes vanish; connections stay, as where a cable is pulled
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self._server = server
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def reset(self) -> None:
        """Reset every connection."""

        async def reset_all() -> None:
            for writer in self._writers:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(reset_all(), self._loop).result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self.is_cut:  # a connection is never answered; the kernel has accepted it, the server never
            await asyncio.sleep(0.05)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        for one_reader, one_writer in ((reader, up_writer), (up_reader, writer)):
            self._writers.add(one_writer)
            task = asyncio.create_task(self._carry(one_reader, one_writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                while self.is_cut:
                    await asyncio.sleep(0.02)
                if self.delay_seconds:
                    self._loop.call_later(self.delay_seconds, writer.write, data)
                else:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            self._loop.call_later(self.delay_seconds, writer.close)
            self._writers.discard(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async def close() -> None:
            self._server.close()
            self.is_cut = False
            for writer in list(self._writers):
                writer.transport.abort()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.sleep(0.1)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
