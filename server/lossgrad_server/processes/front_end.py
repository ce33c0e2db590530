"""One of several processes, as the parent sees it: started, told to listen, watched, and replaced when it ends.

All of it belongs to the parent's event loop, but for `ask_for_metrics`, which the metrics endpoint's threads call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from typing import Final

from lossgrad_server.config import ServerConfig
from lossgrad_server.processes.link import News, Order, ParentEnd

logger = logging.getLogger(__name__)

CHILD: Final = "lossgrad_server.processes.child"
# The first start may have to compile kernels, which can take minutes on a busy machine.
_START_SECONDS: Final = 600.0
# A process that served this long was no failed attempt: the next one is started at once.
_HEALTHY_SECONDS: Final = 30.0
# Between attempts, doubled each time.
_FIRST_DELAY_SECONDS: Final = 0.5
_MOST_DELAY_SECONDS: Final = 30.0
# A process is hung whose event loop has left so many pings in a row unanswered, a minute's. Counted by the parent's own
# turns, so that a machine that was suspended as a whole costs no process.
PING_SECONDS: Final = 5.0
_MOST_UNANSWERED: Final = 12


class EndedEarly(Exception):
    """A process ended before it served. `code` is its exit status, negative for the signal that ended it."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"process {name} {how(code)} before it served; the log says why")
        self.code = code


def exit_code(code: int) -> int:
    """Return the exit status that tells how a process ended, as shells have it."""
    return code if code >= 0 else 128 - code


def how(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


class _Process:
    """A running process, and its end of the link."""

    def __init__(self, name: str, link: ParentEnd, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._link = link
        self._process = process
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self.is_warm = False
        self.unanswered = 0
        self.ended = asyncio.ensure_future(self._wait())
        asyncio.get_running_loop().add_reader(link.fileno(), self._read)

    @classmethod
    async def start(cls, name: str, config: ServerConfig) -> _Process:
        """Start one. Raises OSError."""
        link = ParentEnd()
        try:
            # Where this process finds its modules, the child does, too.
            paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", CHILD, str(link.child.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output is for the parent's one line
                pass_fds=[link.child.fileno()],
                process_group=0,  # ctrl-C is for the parent
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except BaseException:
            link.close()
            raise
        link.child.close()
        link.send_settings({"process": name, "config": dataclasses.asdict(config)})
        return cls(name, link, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def until(self, news: News) -> None:
        """Wait for a piece of news. Raises EndedEarly, TimeoutError."""
        told = asyncio.ensure_future(self._news.get())
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.wait((told, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                raise EndedEarly(self._name, self.ended.result())
            assert told.result() is news, f"process {self._name} says {told.result()}"  # noqa: S101 - it says them in order
        finally:
            told.cancel()

    def tell(self, order: Order) -> None:
        self._link.tell(order)

    def ping(self) -> None:
        self.unanswered += 1
        self._link.ping()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def ask_for_metrics(self) -> socket.socket | None:
        with contextlib.suppress(OSError):
            return self._link.ask_for_metrics() if self.is_warm else None
        return None

    def _read(self) -> None:
        try:
            news = self._link.receive()
        except BlockingIOError:
            return
        if news is None:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
        elif news is News.ALIVE:
            self.unanswered = 0
        else:
            self.is_warm = True
            self._news.put_nowait(news)

    async def _wait(self) -> int:
        code = await self._process.wait()
        self.is_warm = False
        asyncio.get_running_loop().remove_reader(self._link.fileno())
        self._link.close()
        return code


class FrontEnd:
    """A place for one process after another."""

    def __init__(self, name: str, config: ServerConfig) -> None:
        self.name = name
        self.restarts = 0
        self.is_serving = False
        self._config = config
        self._process: _Process | None = None
        self._lives = 0
        self._is_told_to_listen = False
        self._ending = asyncio.Event()

    async def prepare(self) -> None:
        """Start a process, and wait until it could serve. Raises EndedEarly, OSError, TimeoutError."""
        self._is_told_to_listen = False
        self._lives += 1
        self._process = await _Process.start(self.name, self._config)
        if self._ending.is_set():
            self._process.kill()
        await self._process.until(News.WARM)

    async def listen(self) -> None:
        """Have it listen, and wait until it serves. Raises EndedEarly, TimeoutError."""
        assert self._process is not None  # noqa: S101 - it was prepared
        self._is_told_to_listen = True
        self._process.tell(Order.LISTEN)
        await self._process.until(News.SERVING)
        self.is_serving = True

    async def keep(self) -> int:
        """Replace the process whenever it ends, until `end` is called; return the exit status of the one that drained."""
        loop = asyncio.get_running_loop()
        attempts = 0
        while True:
            assert self._process is not None  # noqa: S101 - it was prepared
            began = loop.time()
            code = await asyncio.shield(self._process.ended)
            self.is_serving = False
            if self._ending.is_set():
                return exit_code(code) if self._is_told_to_listen else 0
            logger.error("Process %s %s; starting another", self.name, how(code))
            if loop.time() - began >= _HEALTHY_SECONDS:
                attempts = 0
            while not await self._replace(attempts):
                if self._ending.is_set():
                    return 0
                attempts += 1
            attempts += 1

    async def _replace(self, attempts: int) -> bool:
        """Start another process, later the more attempts there were; return whether it serves."""
        if attempts:
            delay = min(_FIRST_DELAY_SECONDS * 2.0 ** (attempts - 1), _MOST_DELAY_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay)
        if self._ending.is_set():
            return False
        began = asyncio.get_running_loop().time()
        try:
            await self.prepare()
            await self.listen()
        except (EndedEarly, OSError, TimeoutError) as error:
            if not self._ending.is_set():
                logger.error("Process %s could not be started: %s", self.name, error or "it took too long")
            await self.kill()
            return False
        self.restarts += 1
        logger.info("Process %s serves again, after %.1f s", self.name, asyncio.get_running_loop().time() - began)
        return True

    def ping(self) -> None:
        """Ask the process for a sign of life; end it if it has given none for long."""
        if not self.is_serving or self._process is None:
            return
        if self._process.unanswered >= _MOST_UNANSWERED:
            seconds = _MOST_UNANSWERED * PING_SECONDS
            logger.error("Process %s has given no sign of life for %s s; killing it", self.name, seconds)
            self._process.kill()
        else:
            self._process.ping()

    def end(self) -> None:
        """Have it drain; there will be no other. One that was not told to listen is killed: nobody can have called it."""
        self._ending.set()
        if self._process is None:
            return
        if self._is_told_to_listen:
            self._process.tell(Order.DRAIN)
        else:
            self._process.kill()

    def stop(self) -> None:
        """Have it stop at once."""
        if self._process is not None:
            self._process.tell(Order.STOP)

    async def kill(self) -> None:
        """End it without asking it, and wait until it has ended."""
        if self._process is not None:
            self._process.kill()
            await asyncio.shield(self._process.ended)

    def ask_for_metrics(self) -> tuple[int, socket.socket | None]:
        """Ask for metrics; return which process it is, counted from 1, and where they come, if they do."""
        life, process = self._lives, self._process
        return life, None if process is None else process.ask_for_metrics()
