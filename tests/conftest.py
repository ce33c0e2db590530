"""What every test has: hypothesis without deadlines, and servers that run in a thread of the test's process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import grpc
import pytest
from hypothesis import settings

from lossgrad_server.engine import cpu_target
from tests.server.serving import RunningServer, StartServer

# No deadlines: the machines that tests run on are busy. Every run the same examples, so that a failure is found again.
settings.register_profile("lossgrad", deadline=None, derandomize=True, max_examples=50, print_blob=True)
settings.register_profile(
    "thorough", deadline=None, max_examples=2000, print_blob=True
)  # --hypothesis-profile=thorough
settings.load_profile("lossgrad")

# A shell makes what it runs in the background deaf to ctrl-C, and so are the programs that a test starts there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the CPU kernels into their cache, once, before any worker process or server of a test wants them."""
    if not hasattr(config, "workerinput"):
        # For the same level as the program, whose processes then find in the cache what this one compiles.
        cpu_target.choose(os.environ)
        from lossgrad_server.engine.cpu_kernel import load_kernel

        load_kernel()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Give a server with the default settings on free ports, shared by all tests: leave it as you found it."""
    with RunningServer() as running:
        yield running


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Give a function that starts a server of the test's own, stopped at the test's end. It takes settings."""
    started: list[RunningServer] = []

    def start(**arguments: object) -> RunningServer:
        running = RunningServer(**{"metrics_port": -1, **arguments})  # type: ignore[arg-type]
        started.append(running)
        return running.start()

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def connect() -> Iterator[Callable[[str], grpc.Channel]]:
    """Give a function that opens a channel to an address, closed at the test's end."""
    channels: list[grpc.Channel] = []

    def open_channel(address: str) -> grpc.Channel:
        channels.append(grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]))
        return channels[-1]

    yield open_channel
    for channel in channels:
        channel.close()
