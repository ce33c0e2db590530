"""Pairs of a stream -> requests in its window -> results to give back: what both clients' `stream` share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lossgrad.calls import Answer, Losses, Request, as_losses, deadline_seconds, prepare, split_pair, stream_ended
from lossgrad.channel import ChannelSettings
from lossgrad.errors import LossgradError
from lossgrad.exchange import FRAME_BYTES
from lossgrad.losses import Loss
from lossgrad.throttle import throttle_of
from lossgrad.window import DEFAULT_IN_FLIGHT, DEFAULT_IN_FLIGHT_BYTES, StreamWindow

if TYPE_CHECKING:
    from lossgrad.shared_memory import SharedMemory

OnError = Literal["raise", "return"]


class ComputeOptions(TypedDict, total=False):
    """The options of `compute`; the methods `smooth_l1`, `huber`, `l1` and `mse` explain them."""

    weight: Any
    mask: Any
    allow_broadcast: bool
    timeout: float | None
    idempotency_key: str
    gradient_out: Any


class StreamOptions(TypedDict, total=False):
    """The options of `stream`, which explains them; `on_error` apart, because the results' type depends on it."""

    in_flight: int
    in_flight_bytes: int
    allow_broadcast: bool
    timeout: float | None


class PairFeed:
    """Feeds one stream's window from the caller's pairs, and gives results or raises, as `on_error` says."""

    def __init__(
        self,
        settings: ChannelSettings,
        losses: Losses,
        on_error: OnError,
        *,
        in_flight: int = DEFAULT_IN_FLIGHT,
        in_flight_bytes: int = DEFAULT_IN_FLIGHT_BYTES,
        allow_broadcast: bool = False,
        timeout: float | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'return'")
        self.metrics = settings.metrics_of("stream")
        self._target = settings.target
        self._specs: Sequence[Loss]
        self._specs, self._is_single = as_losses(losses)
        self._is_raising = on_error == "raise"
        self._allow_broadcast = allow_broadcast
        self.memory = memory
        self._max_request_bytes = settings.max_message_bytes - FRAME_BYTES
        self.window = StreamWindow(
            max_requests=in_flight,
            max_bytes=in_flight_bytes,
            max_message_bytes=settings.max_message_bytes,
            timeout=deadline_seconds(timeout, settings.timeout),
            retries=settings.retries,
            clock=time.perf_counter,
            metrics=self.metrics,
            throttle=throttle_of(settings.target),
        )

    def add(self, pair: Any) -> list[bytes]:
        """Add the caller's next pair; return the messages to send now."""
        try:
            input, target, options = split_pair(pair)
            form = {"is_single": self._is_single, "allow_broadcast": self._allow_broadcast, **options}
            request: Request | None = None
            if self.memory is not None:
                request = self.memory.prepare(input, target, tuple(self._specs), copies=True, **form)
            if request is None:
                limit = self._max_request_bytes
                request = prepare(input, target, tuple(self._specs), max_message_bytes=limit, **form)
        except LossgradError as error:
            self.window.add_failed(error)
            return []
        return self.window.add(request)

    def take(self, received: bytes | Exception | None, *, is_closed: bool) -> float | None:
        """Hand the window what came on the stream: a message, or what the stream ended with, None where its server did.

        Returns None where all goes on, or else after how many seconds to open another stream and resend. Raises what the
        stream ended with where it is not to be opened again: `is_closed` says that the client is closed.
        """
        window = self.window
        if isinstance(received, bytes):
            window.receive(received)
            return 0.0 if window.must_reopen else None
        error = stream_ended(received, self._target)
        seconds = None if is_closed else window.break_stream(error)
        if seconds is None:
            raise error from received
        return seconds

    def take_ready(self) -> Iterator[Answer | LossgradError]:
        """Give the results that are ready, in order; raise the first error unless errors are to be given back."""
        for outcome in self.window.take_ready():
            if self._is_raising and isinstance(outcome, LossgradError):
                raise outcome
            yield outcome
