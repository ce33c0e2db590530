"""Bearer tokens: who may call what, decided before a byte of a call's body is read.

Tokens are in a file, one to a line, so that several are valid at once and can be changed while the server runs: add the
new one, change the callers, take the old one out. Health checks need none, because load balancers have none.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from grpc_status import rpc_status

from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.transport.status import to_status

logger = logging.getLogger(__name__)

# Looking at a file costs a few microseconds, so it is not done for every call.
RELOAD_SECONDS: Final = 1.0
MIN_TOKEN_LENGTH: Final = 16

# Exactly these need no token. Everything else does, whether this server has such a method or not.
OPEN_METHODS: Final = frozenset(("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"))

_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_SCHEME: Final = "bearer "


class TokenFileError(ValueError):
    """A file of tokens that cannot be used. One line that says why."""


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file. Empty lines and lines that begin with # are none. Raises TokenFileError."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise TokenFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenFileError(f"{path} is not ASCII text; tokens are letters, digits and punctuation") from None
    tokens = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise TokenFileError(f"{path} holds no token; put one on a line, such as the output of: openssl rand -hex 32")
    for number, token in enumerate(tokens, 1):
        if not _TOKEN.fullmatch(token):
            raise TokenFileError(f"token {number} of {path} has spaces in it; put one token on a line")
        if len(token) < MIN_TOKEN_LENGTH:
            raise TokenFileError(
                f"token {number} of {path} has {len(token)} characters and can be guessed; use at least {MIN_TOKEN_LENGTH}"
            )
    return tokens


class Tokens:
    """The tokens that are valid now. A file that changed is read again; one that is then unusable changes nothing."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises TokenFileError."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._seen = self._state()
        self._digests = [_digest(token) for token in read_tokens(path)]

    def accept(self, token: str) -> bool:
        """Return whether a token is valid. How long that takes tells nothing of the tokens."""
        self._reload()
        given = _digest(token)
        # All of them, whichever matches: so the time does not depend on which.
        return bool(sum(hmac.compare_digest(given, digest) for digest in self._digests))

    def _reload(self) -> None:
        now = self._clock()
        if now - self._looked_at < RELOAD_SECONDS:
            return
        self._looked_at = now
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            tokens = read_tokens(self._path)
        except TokenFileError as error:
            logger.error("The tokens stay as they were: %s", error)
        else:
            self._digests = [_digest(token) for token in tokens]
            logger.info("Read %d tokens from %s", len(tokens), self._path)

    def _state(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(token: str) -> bytes:
    # Of one length, whatever the token's.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class TokenGuard(grpc.aio.ServerInterceptor):
    """Stands before all handlers of a server and refuses calls without a valid token.

    An interceptor and not a generic handler, because grpcio asks the handlers of generated services, such as reflection's,
    before all generic ones. The refusing handler is a streaming one, because gRPC reads a unary call's body before it
    calls its handler.
    """

    def __init__(self, tokens: Tokens, on_refused: Callable[[RequestError, str], None]) -> None:
        """`on_refused` is told the error, and the method that was called."""
        self._tokens = tokens
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler that the call is for, or one that refuses it."""
        is_open = handler_call_details.method in OPEN_METHODS
        if is_open or self._has_token(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(partial(self._refuse, handler_call_details.method))

    def _has_token(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        for key, value in metadata:
            if key == "authorization":
                text = value if isinstance(value, str) else value.decode("ascii", "replace")
                if text[: len(_SCHEME)].lower() == _SCHEME and self._tokens.accept(text[len(_SCHEME) :].strip()):
                    return True
        return False

    async def _refuse(self, method: str, _messages: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        error = RequestError(
            "this server takes calls with a token only; send one that it knows as metadata: authorization: Bearer TOKEN",
            code=Code.UNAUTHENTICATED,
            reason=Reason.UNAUTHENTICATED,
        )
        self._on_refused(error, method)
        status = rpc_status.to_status(to_status(error))  # type: ignore[no-untyped-call]
        await context.abort(status.code, status.details, status.trailing_metadata)
