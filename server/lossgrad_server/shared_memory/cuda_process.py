"""The process that copies between callers' GPU memory and the server's: it may hang or die of it, and nothing else does.

`python -m lossgrad_server.shared_memory.cuda_process CHANNEL STAGING` is started by `cuda_copier.py` with the descriptors of
its end of a packet socket and of the staging memory. It has a CUDA context of its own. What it is asked is checked by the
server, and by itself again: against what was registered and against the allocation. It ends when the server does, however
that ended and whatever the driver is at.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Final

from lossgrad_server.shared_memory.cuda_driver import Driver, DriverError
from lossgrad_server.shared_memory.cuda_records import ANSWER, QUESTION, STAGING_BYTES, Became, Question

logger = logging.getLogger(__name__)

_OTHER_END_GONE: Final = select.POLLHUP | select.POLLERR | select.POLLRDHUP


@dataclass(frozen=True, slots=True)
class _Region:
    device_id: int
    address: int
    byte_count: int


class _Outside(Exception):
    """Of a region, or of an allocation that has so many bytes."""

    def __init__(self, byte_count: int) -> None:
        self.byte_count = byte_count


class Copier:
    """Answers questions, one after the other."""

    def __init__(self, staging: mmap.mmap) -> None:
        self._held = staging  # the driver knows its address only
        self._staging = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        self._driver: Driver | None = None
        self._regions: dict[int, _Region] = {}

    def answer(self, question: bytes) -> tuple[Became, int, int]:
        """Return what became of a question, the driver's code, and the bytes of the allocation."""
        what, number, device_id, offset, byte_count, handle = QUESTION.unpack(question)
        try:
            if self._driver is None:
                self._driver = Driver()
        except (OSError, AttributeError, DriverError) as error:
            logger.error("The CUDA driver cannot be used: %s", error)
            return Became.NO_DRIVER, getattr(error, "code", 0), 0
        try:
            if what == Question.OPEN:
                return Became.DONE, 0, self._open(self._driver, number, device_id, byte_count, handle)
            self._use(self._driver, Question(what), number, offset, byte_count)
        except _Outside as error:
            return Became.OUTSIDE, 0, error.byte_count
        except DriverError as error:
            logger.warning("%s", error)
            return Became.REFUSED if what == Question.OPEN else Became.BROKEN, error.code, 0
        return Became.DONE, 0, 0

    def _open(self, driver: Driver, number: int, device_id: int, byte_count: int, handle: bytes) -> int:
        driver.use(device_id)
        address = driver.open(handle)
        try:
            base, allocation_bytes = driver.allocation_of(address)
            behind = base + allocation_bytes - address
            if not (base <= address and byte_count <= behind):
                raise _Outside(max(0, behind))
        except BaseException:
            driver.close(address)
            raise
        self._regions[number] = _Region(device_id, address, byte_count)
        return allocation_bytes

    def _use(self, driver: Driver, what: Question, number: int, offset: int, byte_count: int) -> None:
        region = self._regions[number] if what != Question.CLOSE else self._regions.pop(number)
        driver.use(region.device_id)
        if what == Question.CLOSE:
            driver.close(region.address)
            return
        if offset + byte_count > region.byte_count or byte_count > STAGING_BYTES:
            raise _Outside(region.byte_count)
        if what == Question.READ:
            driver.read(self._staging, region.address + offset, byte_count)
        else:
            driver.write(region.address + offset, self._staging, byte_count)


def _end_with(channel: socket.socket) -> None:
    """End this process when the other end of the channel is gone, also while a call into the driver hangs."""
    poller = select.poll()
    poller.register(channel, select.POLLRDHUP)
    while not any(events & _OTHER_END_GONE for _, events in poller.poll()):
        pass
    os._exit(0)


def main() -> int:
    """Serve until the channel ends, or a copy has failed."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Ctrl-C and a supervisor's SIGTERM are the server's, which drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold callers' tensors
    channel = socket.socket(fileno=int(sys.argv[1]))
    staging = int(sys.argv[2])
    copier = Copier(mmap.mmap(staging, STAGING_BYTES))
    os.close(staging)
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    while question := channel.recv(QUESTION.size):
        became, code, byte_count = copier.answer(question)
        channel.send(ANSWER.pack(became, code, byte_count))
        if became is Became.BROKEN:
            return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: a context in an unknown state is left to the system, not to the driver's own handlers at exit.
    os._exit(main())
