"""How much is tried again: little of what fails where most of it fails, so that retries do not keep a server down.

The rule is gRPC's (gRFC A6, retry throttling), which applies it to each channel's unary calls by itself; here it is for
streams. Every failure that another attempt might mend takes a token, every success gives a part of one back. Below half,
nothing is tried again.
"""

from __future__ import annotations

import weakref
from typing import Final

MAX_TOKENS: Final = 100
# A success gives so much of a token back: while fewer than 9 calls in 100 fail, all that fails is tried again.
TOKEN_RATIO: Final = 0.1


class RetryThrottle:
    """The tokens of one target. Used by several threads without a lock: a token lost between them does not matter."""

    def __init__(self) -> None:
        self._tokens: float = MAX_TOKENS

    def succeeded(self, count: int) -> None:
        """Take note of answers."""
        if self._tokens < MAX_TOKENS:
            self._tokens = min(MAX_TOKENS, self._tokens + count * TOKEN_RATIO)

    def failed(self) -> bool:
        """Take note of a message, or a stream, that failed; return whether to try again."""
        self._tokens = max(0, self._tokens - 1)
        return self._tokens > MAX_TOKENS / 2


_throttles: Final[weakref.WeakValueDictionary[str, RetryThrottle]] = weakref.WeakValueDictionary()


def throttle_of(target: str) -> RetryThrottle:
    """Return what a process's clients of a target share."""
    return _throttles.setdefault(target, RetryThrottle())
