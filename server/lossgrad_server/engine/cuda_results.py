"""From what a CUDA device brought back to a job's result: outputs, numbers, and the exact sums of chunks."""

from __future__ import annotations

import numpy as np

from lossgrad_server.engine.cuda_layout import ByteArray, Layout
from lossgrad_server.engine.cuda_template import SUMS, Chunks, Place, Region, Template
from lossgrad_server.engine.exact_sums import rounded
from lossgrad_server.engine.host_sums import HostSums
from lossgrad_server.work import SPEC_RESULT, Buffer, SpecTotal, WorkResult


def result_of(layout: Layout, job: int, received: ByteArray, sums: HostSums, *, copy: bool) -> WorkResult:
    """Return a job's result out of what was downloaded; with outputs of their own, or views of it."""
    template = layout.templates[job]
    spec_count = len(template.plan.specs)
    memory = received.data
    numbers = int(layout.starts[job, Region.NUMBERS]) - layout.download.start
    start = int(layout.starts[job, Region.OUTPUT]) - layout.download.start
    scalars = bytes(memory[numbers : numbers + SPEC_RESULT.size * spec_count])
    if template.weight_sum is not None:
        scalars = _with_weight_sum(scalars, memory, numbers + template.weight_sum.offset)
    totals = b""
    if template.chunks is not None:
        scalars, totals = _ChunkSums(template, template.chunks, received, start, sums).complete(scalars)
    outputs: list[Buffer] = []
    for place, output in zip(template.outputs, template.plan.outputs, strict=True):
        offset = start + place.offset
        part = memory[offset : offset + output.tensor.byte_count]
        outputs.append(bytes(part) if copy else part.toreadonly())
    return WorkResult(scalars, tuple(outputs), totals)


def _with_weight_sum(scalars: bytes, memory: memoryview, offset: int) -> bytes:
    """Put the weight sum and the count of unmasked elements, computed once for all specs, into each spec's record."""
    weight_sum, count = SUMS.unpack_from(memory, offset)
    return b"".join(
        SPEC_RESULT.pack(scalar, count, weight_sum, nonfinite_count)
        for scalar, _, _, nonfinite_count in SPEC_RESULT.iter_unpack(scalars)
    )


class _ChunkSums:
    """What the host makes of a job's chunks."""

    def __init__(self, template: Template, chunks: Chunks, received: ByteArray, start: int, sums: HostSums) -> None:
        """`start` is where in `received` the job's outputs are."""
        self._template = template
        self._chunks = chunks
        self._received = received
        self._start = start
        self._address = received.ctypes.data + start
        self._sums = sums

    def complete(self, scalars: bytes) -> tuple[bytes, bytes]:
        """Return the SPEC_RESULT records with what is a sum over several chunks, and the SPEC_TOTAL records."""
        plan, chunks = self._template.plan, self._chunks
        records: list[bytes] = []
        totals: list[bytes] = []
        weights = None if chunks.weights is None else self._total(chunks.weights)
        for spec, place, extremes, numbers in zip(
            plan.specs, chunks.sums, chunks.extremes, SPEC_RESULT.iter_unpack(scalars), strict=True
        ):
            scalar, count, weight_sum, nonfinite_count = numbers
            if weights is not None:
                weight_sum = rounded(weights)
            if place is not None and spec.reduction.is_scalar:
                divisor = 1.0
                if spec.reduction.is_mean:
                    divisor = weight_sum if spec.denominator is None else spec.denominator
                scalar = self._sums.quotient(self._address + place.offset, chunks.count, divisor)
            records.append(SPEC_RESULT.pack(scalar, count, weight_sum, nonfinite_count))
            if place is not None and extremes is not None:
                own_weights = ((float(count),) if count else ()) if weights is None else weights
                totals.append(SpecTotal(*self._extremes(*extremes), self._total(place), own_weights).pack())
        return b"".join(records), b"".join(totals)

    def _total(self, place: Place) -> tuple[float, ...]:
        return self._sums.total(self._address + place.offset, self._chunks.count)

    def _extremes(self, least: Place, greatest: Place) -> tuple[float, float]:
        # A weight may be negative, and -0.0 and 0.0 are one number.
        low = self._numbers(least).min(initial=np.inf) + 0.0
        high = self._numbers(greatest).max(initial=-np.inf) + 0.0
        return float(low), float(high)

    def _numbers(self, place: Place) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        offset = self._start + place.offset
        return self._received[offset : offset + 8 * self._chunks.count].view(np.float64)
