"""What a fuzzer sends: HTTP/2 and gRPC as they should be, and every way of getting them wrong. Seeded; no I/O."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Final

from hpack import Encoder

from lossgrad_api.codec import COMPUTE_LOSS, GET_SERVER_INFO, STREAM_COMPUTE_LOSS
from tests.faults import http2
from tests.faults.http2 import PREFACE, frame, framed, headers_of

GOAWAY, WINDOW_UPDATE, PUSH_PROMISE, PRIORITY = 0x7, 0x8, 0x5, 0x2
_KINDS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 42, 255)


class Adversary:
    """Makes one connection's bytes after another."""

    def __init__(self, seed: int, messages: Callable[[], bytes]) -> None:
        """`messages` gives gRPC messages, good and bad."""
        self._chance = random.Random(seed)
        self._messages = messages
        self.requests = 0  # streams that were opened, or tried to be

    def connection(self, request_count: int) -> bytes:
        """Return all that a peer sends on one connection: about so many requests, and noise between them."""
        chance = self._chance
        self._encoder = Encoder()
        parts = [PREFACE + frame(http2.SETTINGS, 0, 0)] if chance.random() < 0.97 else [chance.randbytes(100)]
        stream = 1
        for _ in range(request_count):
            kind = chance.choices(
                (self._call, self._broken_headers, self._broken_body, self._noise), weights=(10, 3, 4, 1)
            )[0]
            parts.append(kind(stream))
            stream += 2
            self.requests += 1
        return b"".join(parts)

    def _headers(self, stream: int, headers: list[tuple[str, str]], flags: int = http2.END_HEADERS) -> bytes:
        return frame(http2.HEADERS, flags, stream, self._encoder.encode(headers))

    def _call(self, stream: int) -> bytes:
        path = self._chance.choice((COMPUTE_LOSS, COMPUTE_LOSS, STREAM_COMPUTE_LOSS, GET_SERVER_INFO))
        body = framed(self._messages())
        return self._headers(stream, headers_of(path)) + frame(http2.DATA, http2.END_STREAM, stream, body)

    def _broken_headers(self, stream: int) -> bytes:
        chance = self._chance
        headers = headers_of()
        change = chance.randrange(9)
        if change == 0:
            headers[2] = (":path", chance.choice(("/", "//", COMPUTE_LOSS + "x", "/a/b", "*", COMPUTE_LOSS.upper())))
        elif change == 1:
            headers[5] = ("content-type", chance.choice(("text/html", "application/grpc+thrift", "")))
        elif change == 2:
            headers.append(("grpc-timeout", chance.choice(("1n", "0S", "-1S", "99999999H", "1000000000S", "x", "1"))))
        elif change == 3:
            headers.append(("grpc-encoding", chance.choice(("gzip", "deflate", "zstd", "identity", "\u00e9"))))
        elif change == 4:
            headers.append((chance.choice(("x-bin", "trace-bin", "authorization", "lossgrad-priority")), "\x7f!=" * 9))
        elif change == 5:
            headers.append(("x-large", "a" * chance.choice((4_000, 17_000, 70_000))))
        elif change == 6:
            headers.pop(chance.randrange(4))
        elif change == 7:
            chance.shuffle(headers)
        else:
            return frame(http2.HEADERS, http2.END_HEADERS, stream, chance.randbytes(chance.randrange(80)))
        body = framed(self._messages())
        return self._headers(stream, headers) + frame(http2.DATA, http2.END_STREAM, stream, body)

    def _broken_body(self, stream: int) -> bytes:
        chance = self._chance
        body = framed(self._messages())
        change = chance.randrange(7)
        if change == 0:  # a length that is not the message's
            body = struct.pack(">BI", 0, chance.choice((0, 1, len(body) + 9, 2**31, 2**32 - 1))) + body[5:]
        elif change == 1:  # a flag that says compressed, and no encoding
            body = b"\x01" + body[1:]
        elif change == 2:
            body = bytes((chance.randrange(256),)) + body[1:]
        elif change == 3:  # cut short
            body = body[: chance.randrange(len(body))]
        elif change == 4:  # two messages where one is asked for
            body += framed(self._messages())
        elif change == 5:  # given up, at some point
            opened = self._headers(stream, headers_of()) + frame(http2.DATA, 0, stream, body[: chance.randrange(9)])
            return opened + frame(http2.RST_STREAM, 0, stream, struct.pack(">I", chance.randrange(16)))
        else:  # padding longer than the frame
            return self._headers(stream, headers_of()) + frame(http2.DATA, 0x8, stream, b"\xff" + body)
        return self._headers(stream, headers_of()) + frame(http2.DATA, http2.END_STREAM, stream, body)

    def _noise(self, stream: int) -> bytes:
        chance = self._chance
        change = chance.randrange(6)
        if change == 0:
            return frame(chance.choice(_KINDS), chance.randrange(256), stream, chance.randbytes(chance.randrange(40)))
        if change == 1:
            return frame(http2.SETTINGS, 0, 0, struct.pack(">HI", chance.randrange(9), chance.getrandbits(32)))
        if change == 2:
            return frame(WINDOW_UPDATE, 0, chance.choice((0, stream)), struct.pack(">I", chance.getrandbits(32)))
        if change == 3:
            return frame(http2.PING, 0, 0, chance.randbytes(chance.choice((8, 7, 0))))
        if change == 4:
            return frame(http2.CONTINUATION, chance.randrange(8), stream, chance.randbytes(20))
        return chance.randbytes(chance.randrange(30))
