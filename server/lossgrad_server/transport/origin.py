"""Whom a call's requests are for, so that callers take turns: worked out only where requests have to wait."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from lossgrad_server.transport.call import Call

# Metadata of a call whose requests nobody waits for at this moment: they go after all others.
PRIORITY_KEY: Final = "lossgrad-priority"
BULK: Final = "bulk"

# Everybody on this machine has one of these addresses, so they are told apart by their connections.
_LOOPBACK: Final = ("ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]")


def caller_of(peer: str) -> str:
    """Return a peer's address, whatever connections it has; of one on this machine, its connection."""
    return peer if peer.startswith(_LOOPBACK) else peer.rpartition(":")[0] or peer


class CallOrigin:
    """The `Origin` of a call's requests."""

    def __init__(self, call: Call, *, is_bulk: bool = False, trace: tuple[str, str] | None = None) -> None:
        """`is_bulk`: these requests can wait, whatever the call says. `trace` is the trace context of one of them."""
        self.call = call
        self.trace = trace
        self._is_bulk = is_bulk

    def traced(self, trace: tuple[str, str]) -> CallOrigin:
        """Return the origin of a request of this call that has a trace context of its own."""
        origin = CallOrigin(self.call, is_bulk=self._is_bulk, trace=trace)
        vars(origin).update({name: vars(self)[name] for name in ("caller", "is_bulk") if name in vars(self)})
        return origin

    @cached_property
    def caller(self) -> str:
        """Whose turn it is: `caller_of` the peer."""
        return caller_of(self.call.peer)

    @cached_property
    def is_bulk(self) -> bool:
        """Whether the call says of itself that its requests can wait."""
        return self._is_bulk or self.call.metadata.get(PRIORITY_KEY) == BULK
