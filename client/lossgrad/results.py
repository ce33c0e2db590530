"""What calls give back, as frozen values. Their repr shows shapes and types, never tensor data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, cast

from lossgrad.losses import Loss
from lossgrad_api.codec import StatsView


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a call's time went, and the batch that it was part of.

    The first four are the server's: waiting in its queue, copying in, computing, copying out. `round_trip_seconds` is
    the caller's: from sending to having the answer; for an item of a stream, waiting for a place in a message included.
    """

    queue_seconds: float
    pack_seconds: float
    compute_seconds: float
    unpack_seconds: float
    batch_request_count: int
    batch_element_count: int
    device: str
    round_trip_seconds: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LossResult:
    """One loss, computed.

    `loss` is of the input's family and device, and of the type that input and target promote to: a NumPy scalar or 0-d
    torch tensor for the reductions mean and sum, otherwise a tensor. `value` is a mean or sum as the float64 that the
    server computed, None for other reductions. `gradient` is with respect to input, None unless asked for;
    `target_gradient` is None also where it is just -gradient: where the shapes are equal and no type is widened.
    `element_count` are the unmasked elements, `weight_sum` their weights, `nonfinite_count` their losses that are NaN or
    infinite. `spec` is what was computed.
    """

    loss: Any
    value: float | None
    gradient: Any
    target_gradient: Any
    element_count: int
    weight_sum: float
    nonfinite_count: int
    timing: Timing
    spec: Loss
    idempotency_key: str = ""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("value", "timing") or value is None or (isinstance(value, str) and not value):
                continue
            if field.name == "loss" and self.value is not None:
                shown.append(f"loss={self.value!r} ({_type_name(value)})")
            elif field.name in ("loss", "gradient", "target_gradient"):
                shown.append(f"{field.name}={_type_name(value)}{list(value.shape)}")
            else:
                shown.append(f"{field.name}={value!r}")
        return f"LossResult({', '.join(shown)})"


@dataclass(slots=True, eq=False)
class _NewTiming:
    queue_seconds: float
    pack_seconds: float
    compute_seconds: float
    unpack_seconds: float
    batch_request_count: int
    batch_element_count: int
    device: str
    round_trip_seconds: float


@dataclass(slots=True, eq=False)
class _NewLossResult:
    loss: Any
    value: float | None
    gradient: Any
    target_gradient: Any
    element_count: int
    weight_sum: float
    nonfinite_count: int
    timing: Timing
    spec: Loss
    idempotency_key: str


def new_timing(stats: StatsView, round_trip_seconds: float) -> Timing:
    """Return the Timing of an answer."""
    # Made as a twin with the same slots that is not frozen, and then turned into the real thing: a frozen dataclass sets
    # each field through a function, which takes five times as long, and every answer has one of these.
    queue, pack, compute, unpack, batch_request_count, batch_element_count, device = _seconds(stats)
    timing: Any = _NewTiming(
        queue, pack, compute, unpack, batch_request_count, batch_element_count, device, round_trip_seconds
    )
    timing.__class__ = Timing
    return cast(Timing, timing)


@lru_cache(maxsize=64)
def _seconds(stats: StatsView) -> tuple[float, float, float, float, int, int, str]:
    """Return what Timing has of a ComputeStats; it is equal for many answers that come one after another."""
    queue_ns, pack_ns, compute_ns, unpack_ns, batch_request_count, batch_element_count, device = stats
    return (
        queue_ns / 1e9,
        pack_ns / 1e9,
        compute_ns / 1e9,
        unpack_ns / 1e9,
        batch_request_count,
        batch_element_count,
        device,
    )


def new_loss_result(
    loss: Any,
    value: float | None,
    gradient: Any,
    target_gradient: Any,
    element_count: int,
    weight_sum: float,
    nonfinite_count: int,
    timing: Timing,
    spec: Loss,
    idempotency_key: str,
) -> LossResult:
    """Return a LossResult, as `new_timing` does."""
    result: Any = _NewLossResult(
        loss,
        value,
        gradient,
        target_gradient,
        element_count,
        weight_sum,
        nonfinite_count,
        timing,
        spec,
        idempotency_key,
    )
    result.__class__ = LossResult
    return cast(LossResult, result)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server refuses to go beyond."""

    max_message_bytes: int
    max_queued_requests: int
    max_queued_bytes: int
    max_stream_requests: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is. Two servers of equal `determinism` give bit-identical results."""

    server_version: str
    torch_version: str
    device: str
    data_types: tuple[str, ...]
    limits: ServerLimits
    determinism: str


def _type_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")
