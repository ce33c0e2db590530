"""The small interface that handlers are written against, so that grpcio is but one transport under them.

grpc_server.py puts it on grpc.aio, in_process.py on plain function calls. Handlers raise RequestError for what goes
wrong; the transport turns it into a status in one place (status.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Call(Protocol):
    """One RPC, as its handler sees it."""

    @property
    def method(self) -> str:
        """The full method name: "/package.Service/Method"."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The caller's metadata; of a key that comes twice, the last value."""

    @property
    def deadline(self) -> float | None:
        """When the caller stops waiting, on time.monotonic's clock, in seconds. None: never."""

    @property
    def begun_ns(self) -> int:
        """When the call came, on perf_counter_ns's clock."""

    @property
    def peer(self) -> str:
        """Where the call comes from, as gRPC writes it: "ipv4:127.0.0.1:51234", "unix:"; "inproc" in this process."""


Send = Callable[[bytes], Awaitable[None]]
UnaryHandler = Callable[[bytes, Call], Awaitable[bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], Send, Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: its full name and its handler, which takes and gives messages as bytes.

    Exactly one of `unary` and `stream` is set. A handler is cancelled, as a task, when its caller goes away. The metrics of
    an occasional method begin with its first call, so that methods which most servers never see do not fill every scrape.
    """

    name: str
    unary: UnaryHandler | None = None
    stream: StreamHandler | None = None
    is_occasional: bool = False
