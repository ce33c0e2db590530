"""Tensors of a ComputeLossRequest that are in shared memory: where the operands are, and where the answer's are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from lossgrad_api.codec import RequestView
from lossgrad_api.shared_codec import OUTPUT_ALIGNMENT
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.work import Buffer, WorkItem, WorkResult

_OPERANDS: Final = ("input", "target", "weight", "mask")


class SharedMemoryParts(Protocol):
    """The shared memory of a server."""

    def part(self, what: str, token: bytes, offset: int, byte_count: int) -> memoryview:
        """Return part of a region, as writable memory that stays where it is. `what` names it. Raises RequestError."""


def is_shared(request: pb.ComputeLossRequest) -> bool:
    """Whether any of a request is in shared memory."""
    return request.HasField("outputs") or any(getattr(request, name).HasField("shared_memory") for name in _OPERANDS)


def with_shared_operands(
    request: pb.ComputeLossRequest, view: RequestView, memory: SharedMemoryParts | None
) -> RequestView:
    """Return the request's view with the operands that are in shared memory. Raises RequestError."""
    found: dict[str, memoryview] = {}
    for name in _OPERANDS:
        tensor = getattr(request, name)
        if not tensor.HasField("shared_memory"):
            continue
        if len(getattr(view, name)):
            raise InvalidRequest(
                f"{name} has {len(getattr(view, name))} bytes of data, and shared_memory as well; send one of them",
                reason=Reason.BAD_REGION,
                field=f"{name}.shared_memory",
            )
        found[name] = _part(name, f"{name}.shared_memory", tensor.shared_memory, memory).toreadonly()
    input, target, weight, mask = (found.get(name, getattr(view, name)) for name in _OPERANDS)
    return RequestView(view.header, view.idempotency_key, input, target, weight, mask)


def destinations(
    request: pb.ComputeLossRequest, plan: JobPlan, memory: SharedMemoryParts | None
) -> tuple[memoryview, ...]:
    """Return where each of the plan's outputs is wanted; nothing where they belong into the answer. Raises RequestError."""
    if not request.HasField("outputs"):
        return ()
    part = _part("outputs", "outputs", request.outputs, memory)
    spans: list[tuple[int, int]] = []
    end = 0
    for output in plan.outputs:
        begin = -(-end // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
        end = begin + output.tensor.byte_count
        spans.append((begin, end))
    if end > len(part):
        raise InvalidRequest(
            f"the answer's tensors take {end} bytes, outputs has {len(part)}; make it larger, or leave it out",
            reason=Reason.BAD_REGION,
            field="outputs.byte_count",
        )
    return tuple([part[begin:end] for begin, end in spans])


def misplaced(item: WorkItem, result: WorkResult) -> list[tuple[Buffer, Buffer]]:
    """Return the outputs that the worker left in memory of its own, each with where it is wanted."""
    return [
        (output, wanted)
        for output, wanted in zip(result.outputs, item.destinations, strict=True)
        if wanted is not None and output is not wanted
    ]


def copy(pairs: Sequence[tuple[Buffer, Buffer]]) -> None:
    """Copy each first to where its second is."""
    for output, wanted in pairs:
        memoryview(wanted)[:] = output


def _part(what: str, field: str, place: Any, memory: SharedMemoryParts | None) -> memoryview:
    if memory is None:
        raise RequestError(
            f"{what} is in shared memory, and this server shares none (--allow-shared-memory); send the tensor in the "
            "message",
            code=Code.UNIMPLEMENTED,
            reason=Reason.SHARED_MEMORY_OFF,
            field=field,
        )
    return memory.part(what, place.region, place.offset, place.byte_count)
