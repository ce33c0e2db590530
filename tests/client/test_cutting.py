"""Sources give any range of any array's elements; cuts cover the result once, at chunks or rows, within the limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossgrad import L1, MSE, InvalidRequest, RequestTooLarge, SmoothL1
from lossgrad.cutting import CHUNK_ELEMENTS, OVERHEAD_BYTES, Cut, Operands
from lossgrad.sources import Source
from lossgrad.tensors import BFLOAT16, FLOAT32, FLOAT64

SIZES = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)
LAYOUTS: dict[str, Any] = {
    "in C order": SIZES,
    "in Fortran order": np.asfortranarray(SIZES),
    "transposed": SIZES.transpose(2, 0, 3, 1),
    "backwards": SIZES[::-1, :, ::-2],
    "a column": SIZES[:, :, :, 3],
    "one dimension, strided": SIZES.reshape(-1)[::3],
    "big-endian": SIZES.astype(">f4"),
    "broadcast": np.broadcast_to(SIZES[:, :1], SIZES.shape),
    "float64": SIZES.astype(np.float64),
    "torch": torch.tensor(SIZES),
    "torch transposed": torch.tensor(SIZES).transpose(0, 3),
    "torch expanded": torch.tensor(SIZES[:, :, :1]).expand(2, 3, 5, 7),
    "torch bfloat16": torch.tensor(SIZES).bfloat16().transpose(1, 2),
    "torch with a graph": torch.tensor(SIZES, requires_grad=True),
    "torch conjugated twice": torch.tensor(SIZES + 0j).conj().imag,
}


@pytest.mark.parametrize("name", LAYOUTS)
@given(ends=st.tuples(st.integers(0, 210), st.integers(0, 210)).map(sorted))
def test_any_range_of_elements_of_any_layout(name: str, ends: list[int]) -> None:
    array = LAYOUTS[name]
    source = Source(array, "input")
    start, stop = (min(end, source.element_count) for end in ends)
    flat = torch.as_tensor(
        array.astype("f4")
        if name == "big-endian"
        else np.ascontiguousarray(array)
        if isinstance(array, np.ndarray)
        else array
    )
    expected = flat.detach().reshape(-1)[start:stop].clone()
    if not len(expected):
        assert bytes(source.elements(start, stop)) == b""
        return
    read = torch.frombuffer(bytearray(source.elements(start, stop)), dtype=expected.dtype)
    assert torch.equal(read, expected)


def test_elements_that_lie_in_order_are_views() -> None:
    view = Source(SIZES, "input").elements(10, 20)
    assert isinstance(view, memoryview)
    whole: Any = view.obj
    assert whole is SIZES
    halves = Source(SIZES.astype(np.float16), "weight").elements(0, 210)
    assert isinstance(halves, memoryview)


def test_weights_become_floating_point_and_masks_must_be_bool() -> None:
    assert np.frombuffer(Source(np.arange(9), "weight").elements(3, 5)).tolist() == [3.0, 4.0]
    with pytest.raises(InvalidRequest, match="mask is float32; send bool"):
        Source(SIZES, "mask")
    with pytest.raises(InvalidRequest, match="complex64"):
        Source(SIZES + 1j * SIZES, "input")


def test_only_the_range_of_a_memory_map_is_read(tmp_path: Path) -> None:
    file = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (1 << 20,))
    source = Source(file, "input")
    assert isinstance(source.elements(0, 4096), memoryview)
    strided = Source(np.lib.format.open_memmap(tmp_path / "a.npy", "r")[::2], "input")
    assert len(strided.elements(100, 200)) == 400


def test_a_number_takes_the_type_of_the_other_and_can_be_as_large(tmp_path: Path) -> None:
    operands = Operands.of(torch.ones(3, 4, dtype=torch.bfloat16), 1.5)
    assert (operands.target.data_type, operands.target.shape) == (BFLOAT16, ())
    assert operands.target.expanded((3, 4)).elements(2, 5) == b"\xc0\x3f" * 3
    assert Operands.of(2, np.ones(3)).input.data_type == FLOAT64
    assert Operands.of(np.ones(3, np.float32), 2).target.expanded((3,)).data_type == FLOAT32


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple),
    limit=st.integers(0, 60_000),
    by_row=st.booleans(),
)
def test_slices_cover_the_result_once_and_in_order_within_the_limit(
    shape: tuple[int, ...], limit: int, by_row: bool
) -> None:
    if math.prod(shape) > 200_000:
        shape = shape[:1]
    array = np.zeros(shape, np.float16)
    losses = [L1(reduction="sample_sum" if by_row else "mean")]
    limit += OVERHEAD_BYTES
    try:
        cut = Cut(Operands.of(array, array), losses, allow_broadcast=False, slice_bytes=1, max_message_bytes=limit)
    except RequestTooLarge:
        least = math.prod(shape[1:]) if by_row else min(CHUNK_ELEMENTS, array.size)
        assert least * 4 + OVERHEAD_BYTES > limit
        return
    end = 0
    for each in cut.slices():
        assert each.start == end
        assert each.stop > each.start
        end = each.stop
        assert each.start % (math.prod(shape[1:]) if by_row else CHUNK_ELEMENTS) == 0
        assert len(each.input.data) + len(each.target.data) + OVERHEAD_BYTES <= limit
        assert math.prod(each.input.shape) == each.stop - each.start
        assert len(each.input.shape) == (len(shape) if by_row else 1)
    assert end == array.size


def test_slices_aim_at_their_size() -> None:
    array = np.zeros(10_000_000, np.float32)
    cut = Cut(Operands.of(array, array), [L1()], allow_broadcast=False, slice_bytes=1 << 20, max_message_bytes=1 << 28)
    assert {each.stop - each.start for each in cut.slices()} == {1 << 17, 10_000_000 % (1 << 17)}
    with_gradients = Cut(
        Operands.of(array, array),
        [L1(gradient=True), MSE(gradient=True), SmoothL1(gradient=True, reduction="none")],
        allow_broadcast=False,
        slice_bytes=1 << 20,
        max_message_bytes=1 << 28,
    )
    assert next(with_gradients.slices()).stop == (1 << 20) // 28 // CHUNK_ELEMENTS * CHUNK_ELEMENTS


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_nothing_is_one_slice(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape)
    cut = Cut(Operands.of(array, array), [L1()], allow_broadcast=False, slice_bytes=1, max_message_bytes=1 << 20)
    (only,) = cut.slices()
    assert cut.is_whole
    assert (only.start, only.stop) == (0, array.size)
    assert only.input.shape in (shape, (array.size,))


BIG, SMALL = np.zeros((1000, 4096), np.float32), np.zeros((4096,), np.float32)


def cut_of(input: Any, target: Any, *losses: Any, limit: int = 1 << 20, **options: Any) -> Cut:
    operands = Operands.of(input, target, **options)
    return Cut(operands, losses or (L1(),), allow_broadcast=True, slice_bytes=1 << 18, max_message_bytes=limit)


def test_what_is_broadcast_over_the_rows_goes_with_every_slice() -> None:
    slices = list(cut_of(BIG, SMALL, mask=np.ones((1000, 1), bool)).slices())
    assert {each.target.shape for each in slices} == {(4096,)}
    assert {each.input.shape[1] for each in slices} == {4096}
    assert sum(each.mask.shape[0] for each in slices if each.mask is not None) == 1000
    assert slices[-1].stop == BIG.size
    assert slices[1].input_range == (slices[1].start, slices[1].stop)


def test_rows_that_end_between_chunks_are_sent_as_large_as_they_are_broadcast() -> None:
    odd = np.zeros((5000, 257), np.float32)
    slices = list(cut_of(odd, odd[0]).slices())
    assert all(each.target.shape == each.input.shape == (each.stop - each.start,) for each in slices)
    assert all(each.start % CHUNK_ELEMENTS == 0 for each in slices)


@pytest.mark.parametrize(
    ("input", "target", "losses", "says"),
    [
        (
            SMALL,
            BIG,
            [L1(gradient=True)],
            r"input has shape \[4096\] and is broadcast over the first dimension .* expand input",
        ),
        (BIG, SMALL, [L1(gradient=True)], "target has shape .* expand target"),
        (np.zeros((5000, 257)), np.zeros((5000, 1)), [L1(gradient=True)], r"its smallest slice \(4096 rows of shape"),
        (np.zeros((9, 1 << 20)), np.zeros((9, 1)), [L1(reduction="sample_mean")], r"its smallest slice \(one row of"),
        (np.zeros((100_000, 1)), np.zeros(100_000), [L1()], r"broadcast to \[100000, 100000\].*if it is meant"),
        (np.zeros(10**6), np.zeros(10**6), [L1()] * 8 + [L1(gradient=True)] * 8, "its smallest slice .4096 elements"),
    ],
)
def test_what_cannot_be_cut_is_too_large_and_the_error_says_what_to_do(
    input: Any, target: Any, losses: Any, says: str
) -> None:
    with pytest.raises(RequestTooLarge, match=says) as raised:
        cut_of(input, target, *losses, limit=400_000)
    assert raised.value.reason in ("MESSAGE_TOO_LARGE", "RESULT_TOO_LARGE")


@pytest.mark.parametrize(
    ("shapes", "allow_broadcast", "field"),
    [
        (((3, 2), (3,), None), False, "target.shape"),
        (((3, 2), (3,), None), True, "target.shape"),
        (((3, 2), (3, 2), (3, 1)), False, "weight.shape"),
        (((3, 2), (3, 2), (4, 1)), True, "weight.shape"),
        (((3, 1), (3, 1), (3, 2)), True, "weight.shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_as_the_server_does(shapes: Any, allow_broadcast: bool, field: str) -> None:
    arrays = [None if shape is None else np.zeros(shape) for shape in shapes]
    with pytest.raises(InvalidRequest) as raised:
        Cut(Operands.of(*arrays), [L1()], allow_broadcast=allow_broadcast, slice_bytes=1, max_message_bytes=1 << 20)
    assert (raised.value.reason, raised.value.field) == ("SHAPE_MISMATCH", field)
