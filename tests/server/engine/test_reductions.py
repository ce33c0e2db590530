"""The fixed-order sums: exact where sums are exact, close where not, and independent of how the rows were cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lossgrad_server.engine.reductions import CHUNK_ELEMENTS, RowSums, sum_to_shape

CPU = torch.device("cpu")


def row_sums(values: torch.Tensor, piece: int) -> list[float]:
    sums = RowSums(values.shape[0], values.shape[1], CPU)
    for row in range(values.shape[0]):
        for column in range(0, values.shape[1], piece):
            sums.add(values[row : row + 1, column : column + piece].clone(), row, column)
    return [float(total) for total in sums.totals()]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 4095, 4096, 4097, 8192, 12_289, 70_001])
def test_integers_sum_exactly(length: int) -> None:
    values = torch.arange(2 * length, dtype=torch.float64).view(2, length)
    expected = [math.fsum(row) for row in values.tolist()]
    sums = RowSums(2, length, CPU)
    if length:
        sums.add(values.clone(), 0, 0)
    assert sums.totals().tolist() == expected


def test_no_element_is_lost_or_counted_twice() -> None:
    # A power of two for each residue: the sum tells which elements took part.
    length = 3 * CHUNK_ELEMENTS + 37
    for position in (0, 1, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, length - 37, length - 1):
        values = torch.zeros(1, length, dtype=torch.float64)
        values[0, position] = 3.25
        assert row_sums(values, CHUNK_ELEMENTS) == [3.25]


@pytest.mark.parametrize("length", [5, 5000, 100_003])
def test_how_a_row_is_cut_changes_no_bits(length: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, length)) * 1e3)
    whole = RowSums(3, length, CPU)
    whole.add(values.clone(), 0, 0)
    expected = whole.totals().tolist()
    for chunks in (1, 2, 7):
        assert row_sums(values, chunks * CHUNK_ELEMENTS) == expected
    assert expected == [float(row_sums(values[row : row + 1], length)[0]) for row in range(3)]
    for row, total in enumerate(expected):
        exact = math.fsum(values[row].tolist())
        assert abs(total - exact) <= 1e-15 * float(values[row].abs().sum())


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((3, 4), (4,)),
        ((3, 4), (3, 1)),
        ((3, 4), ()),
        ((3, 4), (3, 4)),
        ((2, 3, 4), (2, 1, 4)),
        ((2, 3, 4), (3, 1)),
        ((0, 3), (1, 3)),
        ((0, 3), (0, 1)),
        ((5000, 2), (2,)),
    ],
)
def test_sums_back_to_a_shape(shape: tuple[int, ...], own: tuple[int, ...]) -> None:
    values = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    before = values.clone()
    expected = values.sum_to_size(own)
    assert sum_to_shape(values, own).tolist() == expected.flatten().tolist()
    assert torch.equal(values, before)
