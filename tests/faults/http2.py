"""A raw HTTP/2 peer: what it sends is decided frame by frame, so that it can do what no gRPC client does."""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
from h2.events import StreamEnded, StreamReset
from h2.settings import SettingCodes
from hpack import Encoder

from lossgrad_api.codec import COMPUTE_LOSS

__all__ = ["Peer", "StreamEnded", "StreamReset", "frame", "framed", "headers_of"]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x9
END_STREAM, END_HEADERS = 0x1, 0x4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def headers_of(path: str = COMPUTE_LOSS, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """Return a gRPC call's headers."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]


def framed(message: bytes) -> bytes:
    """Return a message as gRPC sends it: not compressed, after its length."""
    return b"\x00" + struct.pack(">I", len(message)) + message


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


class Peer:
    """One connection to a server at "host:port"."""

    def __init__(self, address: str, *, window: int | None = None, receive_buffer: int | None = None) -> None:
        """Connect. `window` is the flow-control window for what the server sends on each stream."""
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10)
        self.socket.connect((host, int(port)))
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        if window is not None:
            self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.encoder = Encoder()  # for frames that h2 would refuse to make
        self.flush()
        while window is not None and self._h2.local_settings.initial_window_size != window:
            assert self.until(h2.events.SettingsAcknowledged, 10)

    def flush(self) -> None:
        """Send what h2 has to send."""
        self.socket.sendall(self._h2.data_to_send())

    def open(self, headers: list[tuple[str, str]], *, end: bool = False) -> int:
        """Open a stream; return its number."""
        number = self._h2.get_next_available_stream_id()
        self._h2.send_headers(number, headers, end_stream=end)
        self.flush()
        return number

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send data on a stream, as far as the server's windows let it; wait for them."""
        at = 0
        while at < len(data) or (end and not data):
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, len(data) - at)
            if room <= 0 and data:
                self.receive(10)
                continue
            is_last = at + room == len(data)
            self._h2.send_data(stream, data[at : at + room], end_stream=end and is_last)
            self.flush()
            at += room
            if is_last:
                return

    def reset(self, stream: int) -> None:
        """Give a stream up."""
        self._h2.reset_stream(stream, 8)
        self.flush()

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def receive(self, seconds: float) -> list[h2.events.Event]:
        """Wait for what comes next; return what it is. A closed connection is a ConnectionTerminated."""
        self.socket.settimeout(max(0.001, seconds))
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        finally:
            self.socket.settimeout(10)
        if not data:
            return [h2.events.ConnectionTerminated()]
        events = self._h2.receive_data(data)
        self.flush()
        return events

    def until(self, kind: type[h2.events.Event], seconds: float) -> h2.events.Event | None:
        """Wait for an event of a kind; None where the time passes without."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for event in self.receive(left):
                if isinstance(event, kind):
                    return event
                if isinstance(event, h2.events.ConnectionTerminated):
                    return None
        return None

    def status(self, seconds: float = 10) -> tuple[str, str]:
        """Wait for a call's end; return its gRPC status and message."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for event in self.receive(left):
                if isinstance(event, (h2.events.TrailersReceived, h2.events.ResponseReceived)):
                    fields: dict[Any, Any] = dict(event.headers or ())
                    if "grpc-status" in fields:
                        return str(fields["grpc-status"]), str(fields.get("grpc-message", ""))
                if isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)):
                    return type(event).__name__, str(getattr(event, "error_code", ""))
        return "none", ""

    def is_cut(self, seconds: float) -> bool:
        """Wait until the server has closed the connection, reading nothing of what it may have sent before."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()
