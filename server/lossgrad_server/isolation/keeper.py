"""Keeps a device process there: starts it, sees it end, and puts another in its place.

A thread of the keeper's own does that. Whoever uses the process takes the current `Link` under `changed`, and gives up on it
with `lose`; both are the batcher's thread (worker.py). The process itself belongs to its nursery; where that dies, it dies
with it, and a new nursery is started too.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from lossgrad_server.isolation import channel as channels
from lossgrad_server.isolation import records
from lossgrad_server.isolation.link import IDLE_SECONDS, Link, ProcessLost
from lossgrad_server.isolation.loss import Loss
from lossgrad_server.isolation.records import Facts, Kind

logger = logging.getLogger(__name__)

NURSERY: Final = ("-m", "lossgrad_server.isolation.nursery")

# The first start may have to compile kernels; a later one finds them in the cache.
_LOAD_SECONDS: Final = 600.0
_START_SECONDS: Final = 60.0
# Between attempts where no process can be had; doubled each time.
_FIRST_DELAY_SECONDS: Final = 0.1
_MOST_DELAY_SECONDS: Final = 5.0
# After so long without a process the device is taken for lost, and the server ends, for its supervisor to start another.
GIVE_UP_SECONDS: Final = 120.0
_END_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What a device process computes with, and how it logs."""

    device: str
    threads: int
    engine: str
    log_level: str = "info"
    log_format: str = "auto"
    program: Sequence[str] = NURSERY  # what Python runs; a test's may make workers that fail

    def command(self, channel: int) -> list[str]:
        """Return the command of a nursery whose channel has this descriptor."""
        return [
            sys.executable, "-P", *self.program,
            "--channel", str(channel), "--device", self.device, "--engine", self.engine, "--threads", str(self.threads),
            "--log-level", self.log_level, "--log-format", self.log_format,
        ]  # fmt: skip


class KeeperObserver(Protocol):
    """What is told when a process is lost and replaced. Called from the keeper's thread."""

    def worker_lost(self, loss: Loss) -> None:
        """There is no process now."""

    def worker_replaced(self, seconds: float) -> None:
        """There is one again; it took so long."""

    def worker_given_up(self) -> None:
        """There will be none any more."""


class _Nursery:
    """A running nursery."""

    def __init__(self, settings: ProcessSettings) -> None:
        """Start it and wait until it has loaded. RuntimeError where it fails."""
        ours, theirs = channels.pair()
        self.channel = ours
        paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109
        with theirs:
            self._program = subprocess.Popen(  # noqa: S603 - our own program
                settings.command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=2,  # a server's standard output is for its one line
                pass_fds=[theirs.fileno()],
                process_group=0,
                # Its own threads would make forks slower, and nothing here multiplies matrices.
                env={"OPENBLAS_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        packet = self._receive(_LOAD_SECONDS)
        if not packet or records.kind_of(packet[0]) != Kind.LOADED:
            self.close()
            raise RuntimeError("the program that device processes are forked from did not start; the log says why")

    def fork(self) -> Link:
        """Return a new process. Raises ProcessLost."""
        ours, theirs = channels.pair()
        try:
            with theirs:
                channels.send(self.channel, records.simple(Kind.FORK), theirs.fileno())
            while (received := self._receive(_START_SECONDS)) is not None:
                packet, process = received
                if records.kind_of(packet) == Kind.FORKED:
                    return Link(ours, process, records.unpack_forked(packet))
        except OSError:
            pass
        ours.close()
        raise ProcessLost("the nursery does not answer")

    def wait_for_end(self, process_id: int) -> int | None:
        """Return how a process ended, as os.waitpid gives it; None where the nursery does not say."""
        with suppress(OSError):
            while (received := self._receive(_END_SECONDS)) is not None:
                if records.kind_of(received[0]) == Kind.ENDED:
                    ended, status = records.unpack_ended(received[0])
                    if ended == process_id:
                        return status
        return None

    def close(self) -> None:
        """End it, and what it has forked."""
        self.channel.close()
        try:
            self._program.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._program.kill()  # its processes die with it
            self._program.wait()

    def _receive(self, timeout_seconds: float) -> tuple[bytes, int] | None:
        """Return a packet and the descriptor with it; None where the nursery has ended, or says nothing for so long."""
        if not channels.is_readable(self.channel, timeout_seconds):
            return None
        packet, descriptor = channels.receive(self.channel, is_waiting=False)
        return (packet, descriptor) if packet else None


class Keeper:
    """Keeps one device process there."""

    def __init__(self, settings: ProcessSettings, least_slots: int) -> None:
        """Start a process, and learn what it computes with. ValueError where there is no such device, RuntimeError."""
        self._settings = settings
        self._least_slots = least_slots
        self.changed = threading.Condition()
        self.is_lost = False  # for good
        self._link: Link | None = None
        self._retired: list[Link] = []  # lost, and perhaps still in use by whoever has not noticed
        self._observer: KeeperObserver | None = None
        self._is_closing = self._was_warm = False
        self._nursery: _Nursery | None = _Nursery(settings)
        self._wake_receiver, self._waker = socket.socketpair()
        try:
            self._first = self._nursery.fork()
            try:
                self.facts = self._first.receive_facts(_START_SECONDS)
            except BaseException:
                self._first.close()
                raise
        except BaseException as error:
            self._nursery.close()
            self._close_waker()
            if not isinstance(error, ProcessLost):
                raise
            message = "the device's process ended while it started; the log says why"
            raise RuntimeError(message) from None
        self._thread = threading.Thread(target=self._keep, name="lossgrad-keeper", daemon=True)
        self.restart_seconds = 0.0  # how long it took the last time
        self._lost_at: float | None = None  # on time.monotonic's clock

    def watch(self, observer: KeeperObserver) -> None:
        """Tell an observer of losses from now on."""
        self._observer = observer

    def warm_up(self) -> None:
        """Warm the first process up, for as long as that takes, and keep one there from then on. Raises what it raised."""
        began = time.monotonic()
        try:
            self._first.warm_up(self._slots_of(self.facts), None)
        except ProcessLost:
            self.close()
            raise RuntimeError("the device's process ended while it warmed up; the log says why") from None
        except BaseException:
            self.close()
            raise
        self.restart_seconds = time.monotonic() - began
        self._link = self._first
        self._was_warm = True
        self._thread.start()

    @property
    def link(self) -> Link | None:
        """The process that is there now."""
        return self._link

    @property
    def seconds_without(self) -> float:
        """For how long there has been no process; 0 where there is one."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def wait_for_link(self, timeout_seconds: float) -> Link | None:
        """Return the process that is there, or the next; None where there is none for so long, or ever."""
        with self.changed:
            self.changed.wait_for(lambda: self._link or self.is_lost or self._is_closing, timeout_seconds)
            return self._link

    def lose(self, link: Link, loss: Loss | None = None) -> None:
        """Give a process up; with a `loss`, kill it. The next one comes by itself."""
        if loss is not None:
            link.kill(loss)
        with self.changed:
            if self._link is link:
                self._link = None
                self._lost_at = time.monotonic()
                self._retired.append(link)

    def close_retired(self) -> None:
        """Let go of the processes that were lost. Called by whoever uses the processes, and no longer uses those."""
        with self.changed:
            retired, self._retired = self._retired, []
        for link in retired:
            link.close()

    def close(self) -> None:
        """End the process and the nursery."""
        self._is_closing = True
        self._waker.send(b"\0")
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)
        link = self._link if self._was_warm else self._first
        if link is not None:
            link.say_goodbye()
        if self._nursery is not None:
            self._nursery.close()
        if link is not None:
            link.close()
        self.close_retired()
        self._close_waker()

    def _close_waker(self) -> None:
        for end in (self._wake_receiver, self._waker):
            end.close()

    # ---- The keeper's thread ----

    def _keep(self) -> None:
        link: Link | None = self._first
        # Not what `_link` is by now: a process may be given up before this thread comes to look at it.
        while link is not None and self._wait_for_end(link):
            self.lose(link)
            loss = self._loss_of(link)
            began = time.monotonic()
            logger.error("The device's process %d is lost (%s); starting another", link.process_id, loss)
            if self._observer is not None:
                self._observer.worker_lost(loss)
            link = self._replace(began)

    def _replace(self, began: float) -> Link | None:
        """Start processes until one is there; return it, or None where there will be none."""
        delay = _FIRST_DELAY_SECONDS
        has_told = False
        while not self._is_closing:
            try:
                link = self._start()
            except Exception as error:
                if not has_told:  # once, however often it is tried
                    logger.error("Another process for the device cannot be had: %s; trying again", error)
                    has_told = True
                if time.monotonic() - began > GIVE_UP_SECONDS:
                    break
                self._sleep(delay)
                delay = min(2 * delay, _MOST_DELAY_SECONDS)
                continue
            seconds = self.restart_seconds = time.monotonic() - began
            logger.warning("The device has a process again, %d, after %.3f s", link.process_id, seconds)
            with self.changed:
                self._link = link
                self._lost_at = None
                self.changed.notify_all()
            if self._observer is not None:
                self._observer.worker_replaced(seconds)
            return link
        with self.changed:
            self.is_lost = not self._is_closing
            self.changed.notify_all()
        if self.is_lost:
            logger.critical("No process for the device can be had; giving up after %.0f s", GIVE_UP_SECONDS)
            if self._observer is not None:
                self._observer.worker_given_up()
        return None

    def _start(self) -> Link:
        if self._nursery is None:
            self._nursery = _Nursery(self._settings)
        try:
            link = self._nursery.fork()
        except ProcessLost:
            self._nursery.close()
            self._nursery = None
            raise
        try:
            facts = link.receive_facts(_START_SECONDS)
            if facts != self.facts:
                raise RuntimeError(f"it computes with {facts}, the one before with {self.facts}")
            link.warm_up(self._slots_of(facts), _START_SECONDS)
        except BaseException:
            link.kill(Loss.EXITED)
            link.close()
            raise
        return link

    def _slots_of(self, facts: Facts) -> int:
        return max(self._least_slots, facts.slots + 1)  # one to fill while the worker computes the others

    def _wait_for_end(self, link: Link) -> bool:
        """Wait until a process has ended; return False where the keeper closes first."""
        poller = select.poll()
        poller.register(link.process, select.POLLIN)
        poller.register(self._wake_receiver, select.POLLIN)
        while not (ready := poller.poll(round(IDLE_SECONDS * 1e3))):
            link.trim()
        return not self._is_closing and any(descriptor == link.process for descriptor, _ in ready)

    def _loss_of(self, link: Link) -> Loss:
        status = self._nursery.wait_for_end(link.process_id) if self._nursery is not None else None
        if link.loss is not None:
            return link.loss
        return Loss.EXITED if status is not None and os.WIFEXITED(status) else Loss.KILLED

    def _sleep(self, seconds: float) -> None:
        channels.is_readable(self._wake_receiver, seconds)
