"""What a name, a size and a place may be, and how much may be shared: the rules, apart from any memory.

What a caller is told repeats what that caller said, and nothing that it did not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError, TooLarge

# One read or write takes at most this much on Linux.
MAX_PART_BYTES: Final = 0x7FFF_F000
# Where a part of a segment may begin: no element of any type is then misaligned.
PART_ALIGNMENT: Final = 8

_MAX_NAME_BYTES: Final = 256
_KEY: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_MAX_SHOWN: Final = 64


def canonical_key(key: str, prefixes: Sequence[str]) -> str:
    """Return the name of a POSIX shared memory object without its leading slash. Raises RequestError.

    Exactly one slash may lead, as POSIX has it. Everything is checked on what is left, which is what is then opened:
    Triton compared prefixes before it had taken a slash away, and so let its own memory be registered.
    """
    name = key.removeprefix("/")
    if not _KEY.fullmatch(name):
        raise _bad(
            f"key is {shown(key)}; it must be a name of 1 to 255 letters, digits, '.', '_' and '-', with one '/' before "
            "it or none",
            "key",
        )
    if not name.startswith(tuple(prefixes)):
        allowed = " or ".join(repr("/" + prefix) for prefix in prefixes)
        raise _bad(
            f"key is {shown(key)}; this server opens names that begin with {allowed} (--shared-memory-prefixes)", "key"
        )
    return name


def check_name(name: str) -> None:
    """Check what a caller calls a region. Raises RequestError."""
    if not 1 <= len(name.encode()) <= _MAX_NAME_BYTES:
        raise _bad(f"name has {len(name.encode())} bytes; a region's name has 1 to {_MAX_NAME_BYTES}", "name")


def check_part(what: str, offset: int, byte_count: int, region_bytes: int) -> None:
    """Check that `byte_count` bytes from `offset` are in a region. `what` names them. Raises RequestError."""
    # Python's integers do not overflow: the sum is the sum.
    if offset < 0 or byte_count < 0 or offset + byte_count > region_bytes:
        raise _bad(
            f"{what} takes {byte_count} bytes from byte {offset} on; its region has {region_bytes} bytes",
            "shared_memory",
        )
    if byte_count > MAX_PART_BYTES:
        raise _bad(
            f"{what} takes {byte_count} bytes; at most {MAX_PART_BYTES} can be shared at a time", "shared_memory"
        )


def shown(name: str) -> str:
    """Return a caller's own name as an error shows it: printable and short."""
    return ascii(name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "...")


def unknown_region(message: str) -> RequestError:
    """Return the error of a region that is not there, or not this caller's: nobody is told which."""
    return RequestError(message, code=Code.NOT_FOUND, reason=Reason.UNKNOWN_REGION)


def _bad(message: str, field: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.BAD_REGION, field=field)


class Budget:
    """How many regions there may be, and how many bytes they may have together."""

    def __init__(self, max_regions: int, max_bytes: int) -> None:
        self.max_regions = max_regions
        self.max_bytes = max_bytes
        self.regions = 0
        self.bytes = 0

    def take(self, byte_count: int) -> None:
        """Count a region in. Raises TooLarge where there is no room for it."""
        if self.regions >= self.max_regions:
            raise TooLarge(
                f"the server shares {self.regions} regions, its limit is {self.max_regions}; unregister some, or use parts "
                "of a larger one",
                reason=Reason.REGIONS_FULL,
            )
        if byte_count > self.max_bytes - self.bytes:
            raise TooLarge(
                f"this region has {byte_count} bytes, {self.bytes} of the server's {self.max_bytes} are taken; unregister "
                "some, or raise --max-shared-memory-bytes",
                reason=Reason.REGIONS_FULL,
            )
        self.regions += 1
        self.bytes += byte_count

    def give_back(self, byte_count: int) -> None:
        """Count a region out."""
        self.regions -= 1
        self.bytes -= byte_count
