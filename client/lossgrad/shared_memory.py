"""Requests whose tensors stay where caller and server both see them: what `LossClient(shared_memory=True)` does.

The caller sees none of it. Operands are copied once, into a region that the server computes in, or not at all where they
lie in one already; gradients come back in a region, and the arrays of the result lie there. Where memory cannot be shared
the tensors travel in the message, and one line in the log says why.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from lossgrad.calls import Answer
from lossgrad.errors import LossgradError
from lossgrad.losses import Loss
from lossgrad.segments import SegmentPool, Use
from lossgrad.shared_requests import SharedRequest
from lossgrad.tensors import FLOATS, ITEMSIZES, NUMPY, is_array, promote, read_mask, read_pair, read_weight
from lossgrad_api.codec import Buffer, WireTensor, encode_compute_request
from lossgrad_api.shared_codec import OUTPUT_ALIGNMENT, SharedTensor, encode_shared_request
from lossgrad_api.shared_form import SharedForm, shared_form
from lossgrad_api.v1 import loss_service_pb2 as pb

logger = logging.getLogger(__name__)

# Below this, tensors travel faster than they are put into shared memory; measured by bench.shared_memory.
SHARED_BYTES: Final = 256 * 1024
# Operands below this stay in the message beside larger ones that do not.
_INLINE_BYTES: Final = 4096
# So many segments may be in use at a time before results are copied out of theirs.
_MAX_IN_USE: Final = 64
# After finding out that memory cannot be shared, it is not tried again for this long.
_AGAIN_SECONDS: Final = 60.0
_MAX_FAILURES: Final = 3
_PART_ALIGNMENT: Final = 8  # of a part, as the server takes it

_MAX_KNOWN: Final = 1024

_NAMES: Final = ("input", "target", "weight", "mask")
_Named = dict[str, Any]
_Send = Callable[[Any, float | None], Answer]  # a request, and the seconds for it
_GONE: Final = frozenset(("UNKNOWN_REGION", "SHARED_MEMORY_OFF"))


class _Known(NamedTuple):
    """What requests for NumPy arrays of the same shapes, types and losses have in common."""

    form: SharedForm
    input_type: int
    target_type: int
    result_type: int
    output_bytes: int


class SharedMemory:
    """What one client knows of sharing memory with its server, and the regions that it has."""

    def __init__(self, ask: Callable[[], bytes] | None = None) -> None:
        """`ask` fetches a GetServerInfoResponse; without it, whoever has this asks while `must_ask` says so."""
        self._ask = ask
        self._asking = threading.Lock()  # one call at a time asks; others go on without
        self._pool: SegmentPool | None = None
        self._again_at = 0.0
        self._failures: list[float] = []  # when
        self._has_told = False
        self._known: dict[tuple[Any, ...], _Known] = {}

    @property
    def must_ask(self) -> bool:
        """Whether the server is to be asked if it shares memory: `offered` takes its answer."""
        return self._pool is None and time.monotonic() >= self._again_at

    def offered(self, info: bytes) -> None:
        """Take a GetServerInfoResponse, and begin to share memory if it offers any."""
        try:
            offer = pb.GetServerInfoResponse.FromString(info).shared_memory
        except DecodeError:
            offer = pb.SharedMemoryInfo()
        if not offer.socket:
            self.unavailable("the server shares none with this client; it takes --allow-shared-memory, and one machine")
            return
        try:
            self._pool = SegmentPool(offer.socket, offer.max_region_bytes)
        except OSError as error:
            self.unavailable(f"the server's socket for it cannot be reached: {error.strerror or error}")

    def unavailable(self, reason: str) -> None:
        """Do without for a while."""
        self._pool = None
        self._again_at = time.monotonic() + _AGAIN_SECONDS
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning("Memory is not shared, tensors travel in messages: %s", reason)

    def compute(
        self, send: _Send, timeout: float | None, input: Any, target: Any, losses: tuple[Loss, ...], **options: Any
    ) -> Answer | None:
        """Send a request whose tensors are in shared memory; None where they had better travel. Raises LossgradError."""
        self.find_out()
        request = self.prepare(input, target, losses, **options)
        return None if request is None else self.send(send, request, timeout)

    def send(self, send: _Send, request: SharedRequest, timeout: float | None) -> Answer | None:
        """Send a request; None where its tensors had better travel after all. Raises LossgradError."""
        try:
            return send(request, timeout)
        except LossgradError as error:
            if self.must_travel(request, error):
                return None
            raise

    def find_out(self) -> None:
        """Ask the server, if it is to be asked."""
        if self._ask is not None and self.must_ask and self._asking.acquire(blocking=False):
            try:
                # Where the server cannot be asked, the call itself will say so better.
                with suppress(LossgradError):
                    self.offered(self._ask())
            finally:
                self._asking.release()

    def prepare(
        self,
        input: Any,
        target: Any,
        losses: tuple[Loss, ...],
        *,
        is_single: bool,
        weight: Any = None,
        mask: Any = None,
        allow_broadcast: bool = False,
        idempotency_key: str = "",
        copies: bool = False,
    ) -> SharedRequest | None:
        """Return the request for these tensors; None where they had better travel. Raises InvalidRequest.

        With `copies` the caller may use the arrays for something else when this returns, those in shared memory too.
        """
        pool = self._pool
        if pool is None or _byte_count(input) + _byte_count(target) < SHARED_BYTES:
            return None
        key: tuple[Any, ...] | None = None
        if weight is None and mask is None and not (idempotency_key or copies) and is_array(input) and is_array(target):
            specs = [loss.serialized for loss in losses]
            key = (input.dtype, input.shape, target.dtype, target.shape, allow_broadcast, *specs)
            known = self._known.get(key)
            request = None
            if known is not None:
                with suppress(OSError):  # which is found again below
                    request = self._again(
                        pool, known, input, target, losses, is_single=is_single, allow_broadcast=allow_broadcast
                    )
            if request is not None:
                return request
        first, second = read_pair(input, target)
        wires = (
            first.wire,
            second.wire,
            None if weight is None else read_weight(weight),
            None if mask is None else read_mask(mask),
        )
        result_type = promote(first.wire.data_type, second.wire.data_type)
        try:
            output_bytes = _most_output_bytes(
                first.wire.data_type, first.wire.shape, second.wire.data_type, second.wire.shape, losses
            )
        except ValueError:  # they do not broadcast, which the server says better
            return None
        try:
            placed = _place(pool, wires, copies=copies)
            outputs = pool.take(output_bytes) if output_bytes >= _INLINE_BYTES else None
        except OSError as error:
            self._failed(f"the server's socket for it failed: {error.strerror or error}")
            return None
        if placed is None or (outputs is None and output_bytes >= _INLINE_BYTES):
            self._tell("the server has no room for more")
            return None
        operands, tensors, named = placed
        specs = [loss.serialized for loss in losses]
        parts = encode_shared_request(
            specs,
            **named,
            outputs=None if outputs is None else outputs.segment.whole,
            allow_broadcast=allow_broadcast,
            idempotency_key=idempotency_key,
        )
        if key is not None and operands is None and first.family is NUMPY and second.family is NUMPY:
            self._remember(key, parts, (first.wire.data_type, second.wire.data_type, result_type, output_bytes))
        return SharedRequest(
            parts,
            # Not the few bytes of the message: what is held until it is answered.
            sum(len(wire.data) for wire in wires if wire is not None) + output_bytes,
            losses,
            is_single,
            first.family,
            second.family,
            result_type,
            memory=self,
            travelling=partial(
                _travelling, tensors, losses, allow_broadcast=allow_broadcast, idempotency_key=idempotency_key
            ),
            operands=operands,
            outputs=outputs,
            copies_results=pool.in_use > _MAX_IN_USE,
        )

    def known_request(self, input: Any, target: Any, loss: Loss) -> SharedRequest | None:
        """Return the request for two arrays that lie in shared memory, if one of its form was made before; or None.

        The shortest way to a request: `prepare` finds the same ones, in twice the time.
        """
        pool = self._pool
        if pool is None or not (is_array(input) and is_array(target)):
            return None
        known = self._known.get((input.dtype, input.shape, target.dtype, target.shape, False, loss.serialized))
        if known is None:
            return None
        try:
            return self._again(pool, known, input, target, (loss,), is_single=True, allow_broadcast=False)
        except OSError:  # which `prepare` finds again
            return None

    def _remember(self, key: tuple[Any, ...], parts: list[Buffer], types: tuple[int, int, int, int]) -> None:
        """Remember how a request is written whose arrays were in shared memory already."""
        message = b"".join(parts)
        form = shared_form(message, 0, len(message))
        if form is not None:
            if len(self._known) >= _MAX_KNOWN:  # rare enough that starting over is the simplest bound
                self._known.clear()
            self._known[key] = _Known(form, *types)

    def _again(
        self,
        pool: SegmentPool,
        known: _Known,
        input: Any,
        target: Any,
        losses: tuple[Loss, ...],
        *,
        is_single: bool,
        allow_broadcast: bool,
    ) -> SharedRequest | None:
        """Return the request for arrays like others before; None where they do not lie as those did. Raises OSError."""
        form, input_type, target_type, result_type, output_bytes = known
        if not (input.flags.c_contiguous and target.flags.c_contiguous):
            return None
        places = [place for place in pool.find_arrays(input, target) if place.offset % _PART_ALIGNMENT == 0]
        if len(places) != 2:
            return None
        outputs = pool.take(output_bytes) if form.outputs is not None else None
        message = form.write(places, None if outputs is None else outputs.segment.whole)
        if message is None:
            if outputs is not None:
                outputs.settle()
            return None

        def travelling() -> list[Buffer]:
            first = WireTensor(input_type, input.shape, input.data.cast("B"))
            second = WireTensor(target_type, target.shape, target.data.cast("B"))
            return _travelling((first, second, None, None), losses, allow_broadcast=allow_broadcast)

        return SharedRequest(
            [message],
            input.nbytes + target.nbytes + output_bytes,
            losses,
            is_single,
            NUMPY,
            NUMPY,
            result_type,
            memory=self,
            travelling=travelling,
            operands=None,
            outputs=outputs,
            copies_results=pool.in_use > _MAX_IN_USE,
        )

    def must_travel(self, request: SharedRequest, error: LossgradError) -> bool:
        """Take note of a request that failed; return whether to send its tensors in a message instead."""
        # With a reason the server has answered, and is done with the request; without one, who knows.
        if error.reason and error.code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            request.settle()
        if error.reason not in _GONE:
            return False
        self._failed(error.message)
        return True

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Return an array in shared memory, or an ordinary one where there is none."""
        self.find_out()
        kind = np.dtype(dtype)
        extents = (shape,) if isinstance(shape, int) else tuple(shape)
        byte_count = kind.itemsize * math.prod(extents)
        use = None
        if self._pool is not None and byte_count >= _INLINE_BYTES and not kind.hasobject:
            try:
                use = self._pool.take(byte_count)
            except OSError as error:
                self._failed(str(error))
        if use is None:
            return np.empty(extents, kind)
        use.settle()
        array: np.ndarray[Any, Any] = use.bytes(0, byte_count).view(kind).reshape(extents)
        return array

    def close(self) -> None:
        """Let go of all that nothing lies in."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _failed(self, reason: str) -> None:
        """Forget all regions: the server has. It may have been restarted; where this goes on, it is left alone."""
        self.close()
        now = time.monotonic()
        self._failures = [when for when in self._failures if when > now - _AGAIN_SECONDS] + [now]
        if len(self._failures) >= _MAX_FAILURES:
            self.unavailable(reason)


def _travelling(
    tensors: tuple[WireTensor | None, ...],
    losses: tuple[Loss, ...],
    *,
    allow_broadcast: bool,
    idempotency_key: str = "",
) -> list[Buffer]:
    """Return the parts of the request whose tensors are in its message."""
    input, target, weight, mask = tensors
    assert input is not None and target is not None  # noqa: S101, PT018 - for the type checker
    return encode_compute_request(
        [loss.serialized for loss in losses],
        input,
        target,
        weight=weight,
        mask=mask,
        allow_broadcast=allow_broadcast,
        idempotency_key=idempotency_key,
    )


def _place(
    pool: SegmentPool, wires: tuple[WireTensor | None, ...], *, copies: bool
) -> tuple[Use | None, tuple[WireTensor | None, ...], _Named] | None:
    """Put tensors into shared memory, as far as they are not small and not there already; None without room.

    Returns what they were copied to, the tensors where they lie now, and how a request names them.
    """
    tensors = list(wires)
    named: dict[str, Any] = dict(zip(_NAMES, wires, strict=True))
    to_copy: list[tuple[int, WireTensor, int]] = []
    end = 0
    for index, wire in enumerate(wires):
        if wire is None or len(wire.data) < _INLINE_BYTES:
            continue
        part = None if copies else pool.find(wire.data)
        if part is not None and part.offset % _PART_ALIGNMENT == 0:
            named[_NAMES[index]] = SharedTensor(wire.data_type, wire.shape, part)
            continue
        to_copy.append((index, wire, end))
        end += -(-len(wire.data) // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
    if not to_copy:
        return None, wires, named
    use = pool.take(end)
    if use is None:
        return None
    for index, wire, offset in to_copy:
        room = use.bytes(offset, len(wire.data))
        np.copyto(room, np.frombuffer(wire.data, np.uint8))  # which lets other threads run
        tensors[index] = WireTensor(wire.data_type, wire.shape, room.data)
        part = use.segment.part(offset, len(wire.data))
        named[_NAMES[index]] = SharedTensor(wire.data_type, wire.shape, part)
    return use, tuple(tensors), named


def _byte_count(value: Any) -> int:
    """Return how many bytes an array has; 0 for what is none, such as a list, which is read when it is sent."""
    byte_count = getattr(value, "nbytes", 0)
    return byte_count if isinstance(byte_count, int) else 0


@lru_cache(maxsize=1024)
def _most_output_bytes(
    input_type: int,
    input_shape: tuple[int, ...],
    target_type: int,
    target_shape: tuple[int, ...],
    losses: tuple[Loss, ...],
) -> int:
    """Return the most bytes that the answer's tensors take. ValueError where the shapes do not broadcast."""
    result_type = promote(input_type, target_type)
    shape = input_shape if input_shape == target_shape else np.broadcast_shapes(input_shape, target_shape)
    sizes: list[int] = []
    for loss in losses:
        if loss.reduction == "none":
            sizes.append(ITEMSIZES[result_type] * math.prod(shape))
        elif loss.reduction.startswith("sample"):
            sizes.append(ITEMSIZES[result_type] * shape[0] if shape else 0)
        if loss.gradient:
            sizes.append(ITEMSIZES[input_type] * math.prod(input_shape))
            if target_type in FLOATS and not (input_shape == target_shape and input_type == result_type):
                sizes.append(ITEMSIZES[target_type] * math.prod(target_shape))
    return sum(-(-size // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT for size in sizes)
