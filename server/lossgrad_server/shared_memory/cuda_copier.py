"""The server's end of the process that copies GPU memory (`cuda_process.py`): starts it, asks it, and buries it.

All of it is slow and may take for ever, so it runs in one thread of its own, `executor`, and whoever waits does so without
holding up anybody else. A process that does not answer in time is killed, as is one whose copy failed: what the driver's
documentation says of both is that nothing can be relied on afterwards. What it had open is lost with it; the next region
that is opened gets a new process. Every process is a generation, and a region belongs to one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Final, NamedTuple

from lossgrad_server.shared_memory.cuda_records import ANSWER, NO_HANDLE, QUESTION, STAGING_BYTES, Became, Question
from lossgrad_server.work import Buffer

logger = logging.getLogger(__name__)

# To start, to initialise the driver, which takes seconds where a GPU has to be woken, and to open a region.
OPEN_SECONDS: Final = 30.0
# For a copy of at most 8 MiB, a millisecond.
COPY_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 1.0
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROGRAM: Final = "lossgrad_server.shared_memory.cuda_process"


class CopierLost(Exception):
    """The process that had a region open has ended. The message says why, for the log."""


class Refused(Exception):
    """A region that cannot be opened; the process goes on. `allocation_bytes` are those of one that is too small."""

    def __init__(self, became: Became, code: int, allocation_bytes: int) -> None:
        super().__init__(f"{became.name}, CUresult {code}")
        self.became = became
        self.allocation_bytes = allocation_bytes


class Opened(NamedTuple):
    """A region that a process has open: which process, and the region's number there."""

    generation: int
    number: int


class _Process:
    """One process, with its staging memory."""

    def __init__(self, generation: int) -> None:
        """OSError where the system has no room for it."""
        self.generation = generation
        self.staging = os.memfd_create("lossgrad-cuda", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.ftruncate(self.staging, STAGING_BYTES)
            fcntl.fcntl(self.staging, fcntl.F_ADD_SEALS, _SEALS)
            self.program = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno()), str(self.staging)],
                pass_fds=(theirs.fileno(), self.staging),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()

    def ask(self, question: bytes, timeout_seconds: float) -> tuple[Became, int, int]:
        """Return the answer. CopierLost where there is none in time."""
        try:
            self.channel.send(question)
            poller = select.poll()
            poller.register(self.channel, select.POLLIN)
            if not poller.poll(timeout_seconds * 1e3):
                raise CopierLost(f"it gave no answer for {timeout_seconds:g} seconds")
            answer = self.channel.recv(ANSWER.size)
        except OSError as error:
            raise CopierLost(f"it cannot be reached: {error.strerror}") from None
        if len(answer) != ANSWER.size:
            raise CopierLost("it ended")
        became, code, byte_count = ANSWER.unpack(answer)
        if became == Became.BROKEN:
            raise CopierLost(f"a copy failed with CUresult {code}")
        return Became(became), code, byte_count

    def kill(self) -> None:
        """End it, at once: whoever waits for its answer learns of it. In any thread."""
        self.program.kill()

    def bury(self) -> None:
        """End it, and close what this process has of it. One that is stuck in the system's driver is left to the system."""
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self.program.wait(_STOP_SECONDS)
        self._close()

    def _close(self) -> None:
        self.channel.close()
        os.close(self.staging)


class CudaCopier:
    """Opens, reads and writes GPU memory of other processes, from a process that may die. All in `executor`'s thread."""

    def __init__(
        self,
        on_lost: Callable[[int], None],
        *,
        open_seconds: float = OPEN_SECONDS,
        copy_seconds: float = COPY_SECONDS,
    ) -> None:
        """`on_lost` is called with the generation of a process that is lost, in `executor`'s thread."""
        self._on_lost = on_lost
        self._open_seconds = open_seconds
        self._copy_seconds = copy_seconds
        self._lock = threading.Lock()  # over `_process`, which `is_open` and `close` look at from elsewhere
        self._process: _Process | None = None
        self._is_closed = False
        self._numbers = count(1)
        self._generations = count(1)
        self.executor = ThreadPoolExecutor(1, "lossgrad-cuda-regions")

    @property
    def process_id(self) -> int | None:
        """The process's id, where there is one."""
        process = self._process
        return None if process is None else process.program.pid

    def is_open(self, region: Opened) -> bool:
        """Whether the process that has a region open lives. In any thread; does not wait."""
        with self._lock:
            process = self._process
            return process is not None and process.generation == region.generation and process.program.poll() is None

    def open(self, handle: bytes, device_id: int, byte_count: int) -> Opened:
        """Open the region that a handle of 64 bytes stands for. Raises Refused, CopierLost and OSError."""
        process = self._started()
        number = next(self._numbers)
        question = QUESTION.pack(Question.OPEN, number, device_id, 0, byte_count, handle)
        became, code, allocation_bytes = self._ask(process, question, self._open_seconds)
        if became is not Became.DONE:
            raise Refused(became, code, allocation_bytes)
        return Opened(process.generation, number)

    def read(self, region: Opened, offset: int, destination: memoryview) -> None:
        """Fill `destination` from the region. Raises CopierLost."""
        process = self._having(region)
        for begin in range(0, len(destination), STAGING_BYTES):
            piece = destination[begin : begin + STAGING_BYTES]
            self._copy(process, Question.READ, region, offset + begin, len(piece))
            # Read like a file: mapping it would gain nothing, and this lets go of the GIL.
            _whole(os.preadv(process.staging, [piece], 0), len(piece))

    def write(self, region: Opened, offset: int, data: Buffer) -> None:
        """Copy `data` into the region. Raises CopierLost; then some of it may be there."""
        process = self._having(region)
        source = memoryview(data)
        for begin in range(0, len(source), STAGING_BYTES):
            piece = source[begin : begin + STAGING_BYTES]
            _whole(os.pwritev(process.staging, [piece], 0), len(piece))
            self._copy(process, Question.WRITE, region, offset + begin, len(piece))

    def close_region(self, region: Opened) -> None:
        """Let go of a region, if the process that has it open still lives."""
        with suppress(CopierLost):
            process = self._having(region)
            question = QUESTION.pack(Question.CLOSE, region.number, 0, 0, 0, NO_HANDLE)
            self._ask(process, question, self._copy_seconds)

    def close(self) -> None:
        """End the process and the thread. In any thread."""
        with self._lock:
            self._is_closed = True
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            self.executor.submit(process.bury)
        self.executor.shutdown(wait=False)

    def _started(self) -> _Process:
        with self._lock:
            if self._process is not None and self._process.program.poll() is None:
                return self._process
        self._bury("it ended while nothing was asked of it")
        process = _Process(next(self._generations))
        with self._lock:
            if not self._is_closed:
                self._process = process
                return process
        process.bury()
        raise CopierLost("the server stops")

    def _having(self, region: Opened) -> _Process:
        process = self._process
        if process is None or process.generation != region.generation:
            raise CopierLost("it has ended before")
        return process

    def _copy(self, process: _Process, what: Question, region: Opened, offset: int, byte_count: int) -> None:
        question = QUESTION.pack(what, region.number, 0, offset, byte_count, NO_HANDLE)
        became, _, _ = self._ask(process, question, self._copy_seconds)
        if became is not Became.DONE:  # both sides check the same bounds, so that this is a bug of ours
            raise RuntimeError(f"a copy of {byte_count} bytes at {offset} was answered {became.name}")

    def _ask(self, process: _Process, question: bytes, timeout_seconds: float) -> tuple[Became, int, int]:
        try:
            return process.ask(question, timeout_seconds)
        except CopierLost as lost:
            self._bury(str(lost))
            raise

    def _bury(self, reason: str) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.bury()
        logger.error(
            "The process that copies GPU memory is lost, and with it all CUDA regions that were registered: %s", reason
        )
        self._on_lost(process.generation)


def _whole(done: int, wanted: int) -> None:
    if done != wanted:  # the staging memory is sealed and as large, so this is a bug of ours
        raise RuntimeError(f"{done} of {wanted} bytes went through the staging memory")
