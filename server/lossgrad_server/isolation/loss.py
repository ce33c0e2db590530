"""Why a device process is no longer there."""

from __future__ import annotations

from enum import StrEnum


class Loss(StrEnum):
    """Why a process is no longer there, as far as the server can tell."""

    KILLED = "killed"  # by a signal that the server did not send: somebody's, the out-of-memory killer's, a fault's
    EXITED = "exited"
    HUNG = "hung"  # killed by the server, because a batch took too long
    DEVICE = "device"  # killed by the server, because its device had failed for good
