"""Makes a ComputeLossResponse of a computed job."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from lossgrad_api.codec import EMPTY, Buffer, ResponseForm, ResultForm, StatsView, TensorForm, encode_stats
from lossgrad_api.raw_bytes import IS_SUPPORTED
from lossgrad_server.batching.job import Computed
from lossgrad_server.jobs import unpack_header
from lossgrad_server.transport.answer_memory import AnswerMemory
from lossgrad_server.work import SPEC_RESULT

_NONE: Final = bytes(8)
_NONFINITE_AT: Final = SPEC_RESULT.size - 8


@lru_cache(maxsize=4096)
def response_form(header: bytes, is_placed: bool = False) -> ResponseForm:
    """Return what writes the answers to requests with the plan that a header holds. Cached: callers repeat themselves.

    Tensors that are placed elsewhere have no bytes in the answer.
    """
    plan = unpack_header(header)
    tensors: list[list[TensorForm]] = [[] for _ in plan.specs]
    for output in plan.outputs:
        tensor = output.tensor
        byte_count = 0 if is_placed else tensor.byte_count
        tensors[output.spec_index].append(TensorForm(output.role, tensor.data_type, tensor.shape, byte_count))
    return ResponseForm(
        ResultForm(spec.reduction.is_scalar, tuple(found)) for spec, found in zip(plan.specs, tensors, strict=True)
    )


def response_parts(
    header: bytes, computed: Computed, stats: bytes, idempotency_key: str, *, is_placed: bool = False
) -> list[Buffer]:
    """Return the response as parts to join. `header` is its plan's, `stats` from `stats_bytes`.

    `is_placed`: the tensors are where the caller wanted them, and the response has none.
    """
    result = computed.result
    outputs = [EMPTY] * len(result.outputs) if is_placed else result.outputs
    return response_form(header, is_placed).parts(stats, result.scalars, outputs, idempotency_key)


def answer_memory(header: bytes) -> AnswerMemory | None:
    """Return memory for the worker to write the answer to such a request in; None where it is to be joined."""
    byte_count = response_form(header).in_place_bytes
    if not byte_count or not IS_SUPPORTED:
        return None
    try:
        return AnswerMemory(byte_count)
    except MemoryError:  # the worker may find room, or says what is wrong
        return None


def response_head(header: bytes, computed: Computed, stats: bytes, idempotency_key: str) -> bytes:
    """Return all of the response but its one tensor's data, for `AnswerMemory.finish`."""
    return response_form(header).head(stats, computed.result.scalars, idempotency_key)


def stats_bytes(computed: Computed, device: str) -> bytes:
    """Return the response's ComputeStats; equal for all jobs of a batch that waited equally long."""
    return encode_stats(StatsView(computed.queue_ns, *computed.batch[:5], device))


def has_nonfinite(computed: Computed) -> bool:
    """Return whether any loss of any element is NaN or infinite."""
    scalars = computed.result.scalars
    if len(scalars) == SPEC_RESULT.size:
        return scalars[_NONFINITE_AT:] != _NONE
    return any(scalars[at : at + 8] != _NONE for at in range(_NONFINITE_AT, len(scalars), SPEC_RESULT.size))
