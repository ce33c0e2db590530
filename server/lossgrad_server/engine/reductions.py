"""Sums whose bits depend on the values and their positions only: not on threads, pieces, devices or company.

torch.sum promises no order: it follows the thread count on a CPU and the launch shape on a GPU. Here every row is cut
into chunks of CHUNK_ELEMENTS from its own start, and each chunk is folded in half until one partial is left: elementwise
additions, which IEEE 754 fixes to the bit. The partials are added exactly, in Python, or folded likewise on their device.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from lossgrad_server.engine.exact_sums import exact_sum, rounded

CHUNK_ELEMENTS: Final = 4096


class RowSums:
    """The float64 sum of each row of a matrix that arrives piece by piece.

    A piece holds whole rows, or a part of one row that starts on a chunk boundary and, unless it is the row's last,
    ends on one.
    """

    def __init__(self, row_count: int, row_length: int, device: torch.device) -> None:
        chunk_count = math.ceil(row_length / CHUNK_ELEMENTS)
        self._partials = torch.zeros((row_count, chunk_count), dtype=torch.float64, device=device)

    def add(self, values: Tensor, first_row: int, first_column: int) -> None:
        """Take in the piece whose first element stands at that row and column. `values` is overwritten."""
        row_count, column_count = values.shape
        partials = self._partials[first_row : first_row + row_count, first_column // CHUNK_ELEMENTS :]
        whole_chunks, rest = divmod(column_count, CHUNK_ELEMENTS)
        if whole_chunks:
            chunks = values[:, : whole_chunks * CHUNK_ELEMENTS].view(row_count, whole_chunks, CHUNK_ELEMENTS)
            partials[:, :whole_chunks] = _fold(chunks)
        if rest:
            partials[:, whole_chunks] = _fold(values[:, whole_chunks * CHUNK_ELEMENTS :])

    def total(self) -> tuple[float, ...]:
        """Return the exact sum of the partials of a matrix's only row, when the last piece was added. Waits for it."""
        (partials,) = self._partials.tolist()
        return exact_sum(partials)

    def totals(self) -> Tensor:
        """Return the exact sum of each row's partials, rounded once; 0 for a row without elements.

        Waits for the last piece where rows have more than one chunk.
        """
        if self._partials.shape[1] == 1:
            return self._partials[:, 0]
        totals = [rounded(exact_sum(partials)) for partials in self._partials.tolist()]
        return torch.tensor(totals, dtype=torch.float64, device=self._partials.device)

    def folded(self) -> Tensor:
        """Return each row's sum as `totals` does, but folded on the device. To be called once, after the last piece."""
        if self._partials.shape[1] == 0:
            return self._partials.new_zeros(self._partials.shape[0])
        return _fold(self._partials)


def sum_to_shape(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum a float64 tensor over the dimensions along which `shape` was broadcast to get the tensor's shape.

    The result is flat, in row-major order of `shape`.
    """
    own_shape = (1,) * (values.dim() - len(shape)) + shape
    kept = [dim for dim, extent in enumerate(own_shape) if extent == values.shape[dim]]
    summed = [dim for dim, extent in enumerate(own_shape) if extent != values.shape[dim]]
    row_count = math.prod(own_shape[dim] for dim in kept)
    row_length = math.prod(values.shape[dim] for dim in summed)
    sums = RowSums(row_count, row_length, values.device)
    if row_count and row_length:
        # The copy puts the elements that are summed together side by side, and is what may be overwritten.
        rows = values.permute(kept + summed).clone(memory_format=torch.contiguous_format)
        sums.add(rows.view(row_count, row_length), 0, 0)
    return sums.folded()


def _fold(values: Tensor) -> Tensor:
    """Sum over the last dimension, of at least one element, by adding its second half to its first until one is left.

    The first half is the largest power of two below the length, so the order depends on the length alone.
    `values` is overwritten.
    """
    while (length := values.shape[-1]) > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        values.narrow(-1, 0, length - half).add_(values.narrow(-1, half, length - half))
        values = values.narrow(-1, 0, half)
    return values.select(-1, 0)
