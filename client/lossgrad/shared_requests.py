"""A request whose tensors are in memory shared with the server, and how its answer's tensors are found there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lossgrad.calls import Answer, Request
from lossgrad.errors import LossgradError
from lossgrad.segments import Use
from lossgrad.tensors import ITEMSIZES, NUMPY, Family
from lossgrad_api.codec import Buffer, ResponseView, ResultView, WireTensor
from lossgrad_api.shared_codec import OUTPUT_ALIGNMENT

if TYPE_CHECKING:
    from lossgrad.shared_memory import SharedMemory


@dataclass(slots=True, eq=False)
class SharedRequest(Request):
    """A request whose tensors are in shared memory. Its answer's tensors come in `outputs`, if that is set."""

    memory: SharedMemory
    travelling: Callable[[], list[Buffer]]  # the parts of the request whose tensors travel
    operands: Use | None
    outputs: Use | None
    copies_results: bool

    def read_view(self, view: ResponseView, round_trip_seconds: float) -> Answer:
        """Return what an answer says, in the caller's kind of arrays, which lie in shared memory."""
        self.settle()
        if self.outputs is not None:
            view = ResponseView(view.stats, _placed(view.results, self.outputs), view.idempotency_key)
            if not self.copies_results:
                self.input_family = _adopting(self.input_family)
                self.target_family = _adopting(self.target_family)
        # Not super(): a dataclass with slots is another class than the one that was written.
        return Request.read_view(self, view, round_trip_seconds)

    def instead(self, error: LossgradError) -> Request | None:
        """Return the request whose tensors travel, where this one failed because memory is not shared any more."""
        if not self.memory.must_travel(self, error):
            return None
        parts = self.travelling()
        byte_count = sum(map(len, parts))
        return Request(
            parts, byte_count, self.losses, self.is_single, self.input_family, self.target_family, self.result_type
        )

    def settle(self) -> None:
        """Take note that the server is done with this request."""
        for use in (self.operands, self.outputs):
            if use is not None:
                use.settle()


class _Adopting:
    """A family whose tensors lie where the answer's do."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.scalar = family.scalar

    def tensor(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer, in the memory that it came in."""
        return self._family.adopt(wire)

    adopt = tensor


_ADOPTING_NUMPY: Final = _Adopting(NUMPY)


def _adopting(family: Family) -> Family:
    return _ADOPTING_NUMPY if family is NUMPY else _Adopting(family)


def _placed(results: tuple[ResultView, ...], outputs: Use) -> tuple[ResultView, ...]:
    """Return the results with the bytes of their tensors, which lie in `outputs` one behind the other."""
    offset = 0

    def find(tensor: WireTensor | None) -> WireTensor | None:
        nonlocal offset
        if tensor is None or len(tensor.data):
            return tensor
        byte_count = ITEMSIZES.get(tensor.data_type, 0) * math.prod(tensor.shape)
        if not byte_count:
            return tensor
        begin = -(-offset // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
        offset = begin + byte_count
        data = outputs.bytes(begin, byte_count).data if offset <= outputs.segment.byte_count else tensor.data
        return WireTensor(tensor.data_type, tensor.shape, data)

    return tuple(
        ResultView(
            result.scalar,
            find(result.tensor),
            result.element_count,
            result.weight_sum,
            result.nonfinite_count,
            find(result.target_gradient),
            find(result.input_gradient),
        )
        for result in results
    )
