"""The small interface that handlers are written against, so that grpcio is but one transport under them.

grpc_server.py puts it on grpc.aio, in_process.py on plain function calls. Handlers raise RequestError for what goes
wrong; the transport turns it into a status in one place (status.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

# The caller's clock started before ours, so its end of a call that is late comes before our deadline for it, by about as
# long as a request is on its way.
_UNDERWAY_SECONDS: Final = 0.1


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


def is_late(deadline: float | None) -> bool:
    """Whether a call that ends now, ends because its deadline has come, and not because its caller cancelled it."""
    return deadline is not None and time.monotonic() >= deadline - _UNDERWAY_SECONDS


Send = Callable[[bytes], Awaitable[None]]
UnaryHandler = Callable[[bytes, Call], Awaitable[bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], Send, Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: its full name and its handler, which takes and gives messages as bytes.

    Exactly one of `unary` and `stream` is set. A handler is cancelled, as a task, when its caller goes away. The metrics of
    an occasional method begin with its first call, so that methods which most servers never see do not fill every scrape.
    `api` is what metrics call its requests; None where it computes nothing.
    """

    name: str
    unary: UnaryHandler | None = None
    stream: StreamHandler | None = None
    is_occasional: bool = False
    api: str | None = None
