"""The program that device processes are forked from: it has loaded what they need, and never touches a device itself.

Loading torch or numba takes seconds, and a fork of a process that has them some ten milliseconds. `python -m
lossgrad_server.isolation.nursery` is started by the server with one end of a channel, and forks a process for each FORK
that comes, whose own channel comes with it. It tells when one has ended, and ends with the server: when its channel does.
One thread. Its process group is its own, so that ctrl-C at a terminal, which the server answers by draining, does not reach
its processes; and it leaves SIGTERM to the server, because some supervisors send it to all processes of a service.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server import logs
from lossgrad_server.isolation import channel as channels
from lossgrad_server.isolation import device_process, records
from lossgrad_server.isolation.device_process import Description
from lossgrad_server.isolation.records import Kind
from lossgrad_server.work import DeviceWorker

logger = logging.getLogger(__name__)

# How long a process may take to end by itself once the server has gone.
_END_SECONDS: Final = 2.0


class Nursery:
    """Forks processes that run `child`, which takes the process's channel and returns its exit status."""

    def __init__(self, channel: socket.socket, child: Callable[[socket.socket], int]) -> None:
        self._channel = channel
        self._child = child
        self._processes: dict[int, int] = {}  # descriptor of the process -> its id

    def serve(self) -> None:
        """Fork and bury until the channel ends; then see to it that no process is left."""
        self._channel.send(records.simple(Kind.LOADED))
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        is_open = True
        while is_open:
            for descriptor in self._processes:
                poller.register(descriptor, select.POLLIN)
            for descriptor, _ in poller.poll():
                if descriptor in self._processes:
                    poller.unregister(descriptor)
                    is_open = self._bury(descriptor) and is_open
                else:
                    is_open = self._receive() and is_open
        self._end_all()

    def _receive(self) -> bool:
        packet, descriptor = channels.receive(self._channel, is_waiting=True)
        if not packet:
            return False
        if records.kind_of(packet) == Kind.FORK:
            return self._fork(socket.socket(fileno=descriptor))
        return True

    def _fork(self, channel: socket.socket) -> bool:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        process_id = os.fork()
        if process_id == 0:
            self._live(channel, parent)
        channel.close()
        descriptor = os.pidfd_open(process_id)
        self._processes[descriptor] = process_id
        return self._tell(records.pack_forked(process_id), descriptor)

    def _live(self, channel: socket.socket, parent: int) -> NoReturn:
        """Be a device process."""
        status = 1
        try:
            device_process.die_with_parent(parent)
            self._channel.close()
            for descriptor in self._processes:
                os.close(descriptor)
            gc.enable()
            status = self._child(channel)
        except BaseException:
            logger.critical("The device's process failed", exc_info=True)
        finally:
            os._exit(status)

    def _bury(self, descriptor: int) -> bool:
        process_id = self._processes.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(process_id, 0)
        return self._tell(records.pack_ended(process_id, status))

    def _tell(self, packet: bytes, descriptor: int | None = None) -> bool:
        try:
            channels.send(self._channel, packet, descriptor)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _end_all(self) -> None:
        until = time.monotonic() + _END_SECONDS
        for descriptor, process_id in self._processes.items():
            if not channels.is_readable(descriptor, until - time.monotonic()):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.waitpid(process_id, 0)


def create_worker(options: argparse.Namespace) -> DeviceWorker:
    """Return the engine's worker. Called in a device process."""
    from lossgrad_server import engine

    return engine.create_worker(options.device, options.threads or None, options.engine)


def describe(worker: DeviceWorker) -> Description:
    """Return what the server wants to know of a worker. Called in a device process."""
    from lossgrad_server import engine

    return Description(engine.determinism(worker), engine.gpu_uuid(worker.device) or "", engine.model(worker.device))


def own_memory(worker: DeviceWorker) -> Mapping[str, int]:
    """Return how much memory a worker has, by kind; nothing for a CPU. Called in a device process."""
    from lossgrad_server import engine

    return {} if worker.device == "cpu" else engine.own_memory_bytes(worker.device)


def preload(options: argparse.Namespace) -> None:
    """Import, and compile, whatever a process of this device will want, without touching a device."""
    from lossgrad_server import engine
    from lossgrad_server.engine import cpu_target

    cpu_target.choose(os.environ)
    if options.engine == "plain":
        from lossgrad_server.engine import torch_worker  # noqa: F401
    elif engine.is_surely_cpu(options.device):
        from lossgrad_server.engine.cpu_kernel import load_kernel

        load_kernel()
    else:
        from lossgrad_server.engine import cuda_worker  # noqa: F401


def main(
    arguments: Sequence[str] | None = None,
    create: Callable[[argparse.Namespace], DeviceWorker] = create_worker,
    tell: Callable[[DeviceWorker], Description] = describe,
    tell_memory: Callable[[DeviceWorker], Mapping[str, int]] = own_memory,
) -> int:
    """Serve the channel whose descriptor is given. `create` makes a process's worker, the others say what ours do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--log-level", required=True)
    parser.add_argument("--log-format", required=True)
    options = parser.parse_args(arguments)
    logs.configure(options.log_level, options.log_format)
    keep_large_blocks()
    preload(options)
    gc.collect()
    gc.disable()  # a collection would copy pages that are shared with the processes
    gc.freeze()
    channel = socket.socket(fileno=options.channel)
    Nursery(channel, lambda own: device_process.run(own, lambda: create(options), tell, tell_memory)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
