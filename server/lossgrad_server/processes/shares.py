"""What each of several processes gets of a server's settings, and which settings cannot be divided."""

from __future__ import annotations

import dataclasses
import os

from lossgrad_server import engine
from lossgrad_server.config import ConfigError, ServerConfig


def check(config: ServerConfig) -> None:
    """Refuse what several processes cannot do. Raises ConfigError, which says why and what to do."""
    several = f"--processes is {config.processes}"
    if config.is_socket:
        raise ConfigError(
            f"{several} and --host is {config.host}: only one process can listen on a unix socket; give --host an address, "
            "or leave --processes at 1"
        )
    if config.isolation == "process":
        raise ConfigError(
            f"{several} and --isolation is 'process': there would be a process that computes for each of them, which "
            "is not what isolation is for; choose --isolation thread (a process that dies is replaced either way), or "
            "leave --processes at 1"
        )
    if not engine.is_surely_cpu(config.device):
        raise ConfigError(
            f"{several} and --device is {config.device!r}, which {'may be' if config.device == 'auto' else 'is'} a GPU: one "
            "process must own a GPU, because several would take turns on it and share no batch; leave --processes at 1, "
            "or choose --device cpu"
        )
    if config.allow_shared_memory:
        raise ConfigError(
            f"{several} and --allow-shared-memory is given: memory is shared with one process, and a caller's next "
            "connection may be another's; leave --processes at 1, or do without shared memory"
        )


def share_of(config: ServerConfig, port: int) -> ServerConfig:
    """Return the settings of one of `config.processes` processes that serve on `port`.

    Threads, and what bounds the whole server, are divided; rounded up, so that nobody gets nothing. Each may queue at least
    what one stream may have inside, because a stream stays with one process and alone is never refused.
    """
    count = config.processes
    requests = max(_divided(config.max_queued_requests, count), config.max_stream_requests)
    return dataclasses.replace(
        config,
        processes=1,
        port=port,
        metrics_port=-1,  # the parent has it
        device="cpu",
        isolation="thread",
        threads=max(1, (config.threads or len(os.sched_getaffinity(0))) // count),
        max_queued_requests=min(config.max_queued_requests, requests),
        max_queued_bytes=_divided(config.max_queued_bytes, count),
        max_connections=_divided(config.max_connections, count),
    )


def _divided(total: int, count: int) -> int:
    return -(-total // count)
