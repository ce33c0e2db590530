"""Tensors of a request or a slice that are in shared memory: where the operands are, and where the answer's are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Final, NamedTuple, Protocol

from lossgrad_api.codec import RequestView
from lossgrad_api.shared_codec import OUTPUT_ALIGNMENT
from lossgrad_api.shared_form import SharedForm, shared_form
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
    return request.HasField("outputs") or has_shared_operands(request)


def has_shared_operands(request: pb.ComputeLossRequest | pb.Slice) -> bool:
    """Whether any operand is in shared memory."""
    return any(getattr(request, name).HasField("shared_memory") for name in _OPERANDS)


def with_shared_operands(
    request: pb.ComputeLossRequest | pb.Slice, view: RequestView, memory: SharedMemoryParts | None
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
    spans = _output_spans(plan)
    end = spans[-1][1] if spans else 0
    if end > len(part):
        raise InvalidRequest(
            f"the answer's tensors take {end} bytes, outputs has {len(part)}; make it larger, or leave it out",
            reason=Reason.BAD_REGION,
            field="outputs.byte_count",
        )
    return tuple([part[begin:end] for begin, end in spans])


class _Known(NamedTuple):
    form: SharedForm
    plan: JobPlan
    output_spans: tuple[tuple[int, int], ...]  # of each output in the place that is given for all


class KnownSharedRequests:
    """Remembers the plans of requests with tensors in shared memory, for others that differ in the places only.

    Parsing and checking such a request takes ten times as long as finding it here. Its places are checked every time.
    """

    _MAX_KNOWN: Final = 4096
    _MAX_LAYOUTS_OF_ONE_LENGTH: Final = 4

    def __init__(self, memory: SharedMemoryParts) -> None:
        self._memory = memory
        self._count = 0
        # By length, then by layout, then by what all requests of a form have in common. Shapes have a fixed width, so that
        # requests for tensors of any size are of one length, and mostly of one layout.
        self._known: dict[int, dict[str, dict[Any, _Known]]] = {}

    def remember(self, data: bytes, start: int, end: int, plan: JobPlan) -> None:
        """Remember the plan of `data[start:end]`, which was checked without an error; no tensor of it is empty."""
        form = shared_form(data, start, end)
        if form is None:
            return
        if self._count >= self._MAX_KNOWN:  # rare enough that starting over is the simplest bound
            self._known.clear()
            self._count = 0
        layouts = self._known.setdefault(end - start, {})
        if form.layout not in layouts and len(layouts) >= self._MAX_LAYOUTS_OF_ONE_LENGTH:
            self._count -= len(layouts.pop(next(iter(layouts))))
        alike = layouts.setdefault(form.layout, {})
        before = len(alike)
        alike[form.fixed(form.values)] = _Known(form, plan, _output_spans(plan))
        self._count += len(alike) - before

    def find(self, data: bytes, start: int, end: int) -> tuple[JobPlan, WorkItem] | None:
        """Return the plan and what the worker needs; None for a request that is not known. Raises RequestError."""
        for alike in self._known.get(end - start, _NOTHING).values():
            first = next(iter(alike.values())).form
            values = first.unpack(data, start)
            known = alike.get(first.fixed(values))
            if known is None:
                continue
            form, plan, output_spans = known
            placed, outputs = form.places(values, data, start)
            part = self._memory.part
            operands: list[Buffer] = [
                part(name, *place).toreadonly() if isinstance(place, tuple) else place
                for name, place in zip(form.names, placed, strict=True)
            ]
            if outputs is None:
                return plan, WorkItem(plan.header, tuple(operands))
            room = part("outputs", *outputs)
            return plan, WorkItem(plan.header, tuple(operands), tuple([room[begin:end] for begin, end in output_spans]))
        return None


_NOTHING: Final[dict[str, dict[Any, _Known]]] = {}


def _output_spans(plan: JobPlan) -> tuple[tuple[int, int], ...]:
    """Return where each of the plan's outputs is in the place that is given for all of them."""
    spans: list[tuple[int, int]] = []
    end = 0
    for output in plan.outputs:
        begin = -(-end // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
        end = begin + output.tensor.byte_count
        spans.append((begin, end))
    return tuple(spans)


class Placing(NamedTuple):
    """How many bytes are to be copied, and what copies them, which may raise RequestError; where, if not in any thread."""

    byte_count: int
    place: Callable[[], None]
    executor: Executor | None = None


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
