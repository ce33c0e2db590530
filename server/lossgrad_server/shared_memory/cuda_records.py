"""What the server and the process that copies GPU memory say to each other: records of one size, over a packet socket.

One question at a time, and one answer to each. The bytes themselves go through the staging memory, which both have.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

HANDLE_BYTES: Final = 64  # of a CUipcMemHandle
# The most that one question copies: large enough that the questions cost nothing beside it, and far from the sizes at
# which a copy takes long enough to be mistaken for one that hangs.
STAGING_BYTES: Final = 8 << 20
# The question, the region's number, the device (OPEN), where in the region, how many bytes, the handle (OPEN).
QUESTION: Final = struct.Struct(f"<IIQQQ{HANDLE_BYTES}s")
# What became of it, the driver's own code where it refused, the bytes of the allocation (OPEN).
ANSWER: Final = struct.Struct("<IIQ")
NO_HANDLE: Final = bytes(HANDLE_BYTES)


class Question(IntEnum):
    """What is wanted."""

    OPEN = 1  # the region that a handle stands for, under a number that the server chose
    CLOSE = 2
    READ = 3  # from the region to the staging memory
    WRITE = 4  # from the staging memory to the region


class Became(IntEnum):
    """What became of it."""

    DONE = 0
    REFUSED = 1  # by the driver, and nothing has changed
    OUTSIDE = 2  # of the allocation, or of the region
    NO_DRIVER = 3  # there is none here, or it cannot be used
    BROKEN = 4  # a copy failed: the driver's state is not to be relied on, and the process ends
