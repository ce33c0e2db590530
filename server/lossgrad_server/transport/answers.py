"""Makes a ComputeLossResponse of a computed job."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from lossgrad_api.codec import (
    EMPTY,
    Buffer,
    ResponseForm,
    ResultForm,
    ResultView,
    StatsView,
    TensorForm,
    WireTensor,
    encode_stats,
    result_parts,
)
from lossgrad_api.raw_bytes import IS_SUPPORTED
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.batching.job import Computed
from lossgrad_server.jobs import DataType, JobPlan, Role, unpack_header
from lossgrad_server.metrics import NonFinite
from lossgrad_server.transport.answer_memory import AnswerMemory
from lossgrad_server.work import SPEC_RESULT, WorkResult, unpack_totals

# Whether any of the floating-point elements in these bytes is NaN.
HasNan = Callable[[Buffer, DataType], bool]

_NONE: Final = bytes(8)
_ONE_SPEC: Final = SPEC_RESULT.size
_NONFINITE_AT: Final = _ONE_SPEC - 8


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
    if result.totals:
        more = [b"\x1a" + bytes((len(key),)) + key] if (key := idempotency_key.encode()) else []  # 128 bytes at most
        return [stats, *_fields_with_totals(header, WorkResult(result.scalars, tuple(outputs), result.totals)), *more]
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


def result_fields(header: bytes, result: WorkResult) -> list[Buffer]:
    """Return the results alone, each as the field numbered 2 of what holds them, as parts to join."""
    if result.totals:
        return _fields_with_totals(header, result)
    return response_form(header).parts(b"", result.scalars, result.outputs)


def result_head(header: bytes, result: WorkResult) -> bytes:
    """Return what stands before the data of the results' one tensor, for `AnswerMemory.finish`."""
    return response_form(header).head(b"", result.scalars)


def _fields_with_totals(header: bytes, result: WorkResult) -> list[Buffer]:
    """Return the results of a job that wanted totals, each with its own where its spec asks for it."""
    plan = unpack_header(header)
    tensors: dict[tuple[int, Role], WireTensor] = {}
    for output, data in zip(plan.outputs, result.outputs, strict=True):
        tensors[output.spec_index, output.role] = WireTensor(output.tensor.data_type, output.tensor.shape, data)
    parts: list[Buffer] = []
    records = zip(plan.specs, SPEC_RESULT.iter_unpack(result.scalars), unpack_totals(result.totals), strict=True)
    for index, (spec, (scalar, element_count, weight_sum, nonfinite_count), total) in enumerate(records):
        state = pb.LossState(
            partial_sums=total.partials,
            element_count=element_count,
            weight_sum=weight_sum,
            min=total.minimum + 0.0,  # never -0.0
            max=total.maximum + 0.0,
            nonfinite_count=nonfinite_count,
            weight_partial_sums=total.weight_partials,
        )
        parts += result_parts(
            ResultView(
                scalar if spec.reduction.is_scalar else None,
                tensors.get((index, Role.LOSS)),
                element_count,
                weight_sum,
                nonfinite_count,
                tensors.get((index, Role.TARGET_GRADIENT)),
                tensors.get((index, Role.INPUT_GRADIENT)),
                state.SerializeToString() if spec.include_total else None,
            )
        )
    return parts


def stats_bytes(computed: Computed, device: str) -> bytes:
    """Return the response's ComputeStats; equal for all jobs of a batch that waited equally long."""
    return encode_stats(StatsView(computed.queue_ns, *computed.batch[:5], device))


def nonfinite_kind(plan: JobPlan, result: WorkResult, has_nan: HasNan) -> NonFinite:
    """Return what a result holds that has a NaN or an infinity among its elements' losses: NaN, if there is one."""
    losses = {output.spec_index: index for index, output in enumerate(plan.outputs) if output.role is Role.LOSS}
    for index, (scalar, _, _, nonfinite_count) in enumerate(SPEC_RESULT.iter_unpack(result.scalars)):
        if not nonfinite_count:
            continue
        output = losses.get(index)
        if math.isnan(scalar) if output is None else has_nan(result.outputs[output], plan.result_type):
            return NonFinite.NAN
    return NonFinite.INFINITE


def has_nonfinite(computed: Computed) -> bool:
    """Return whether any loss of any element is NaN or infinite."""
    scalars = computed.result.scalars
    if len(scalars) == _ONE_SPEC:
        return scalars[_NONFINITE_AT:] != _NONE
    return any(scalars[at : at + 8] != _NONE for at in range(_NONFINITE_AT, len(scalars), _ONE_SPEC))
