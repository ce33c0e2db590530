"""Clients of a process that is forked: the child must not use, nor close, what it has from its parent."""

from __future__ import annotations

import os
import weakref
from typing import Any, Final, Protocol


class Forked(Protocol):
    """What wants to be told in a forked child."""

    def after_fork(self) -> None:
        """Let go of what is the parent's."""


_watched: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def watch(client: Forked) -> None:
    """Tell a client, in every child that is forked while it lives."""
    _watched.add(client)


def _after_fork_in_child() -> None:
    for client in list(_watched):
        client.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
