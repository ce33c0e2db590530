"""The arrays of a large answer: in the memory that the answer came in, where nobody else has it."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import lossgrad
from lossgrad import LossClient, SmoothL1
from lossgrad.calls import OWNED_BYTES, Request, prepare
from lossgrad_api.codec import ResultView, StatsView, WireTensor, encode_compute_response
from lossgrad_api.raw_bytes import IS_SUPPORTED, address_of

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="only CPython's bytes can be had as writable memory")

STATS = StatsView(1, 2, 3, 4, 1, 1, "cpu")
COUNT = OWNED_BYTES // 4 + 1000


def request(*losses: lossgrad.losses.Loss, family: Any = np) -> Request:
    array = family.zeros(COUNT, dtype=family.float32)
    return prepare(array, array, losses, is_single=len(losses) == 1, max_message_bytes=1 << 30)


def answer(values: np.ndarray[Any, Any], count: int = 1, misalign: int = 0) -> bytes:
    """Return an answer with as many gradients, of which the first begins at a multiple of 16 bytes, and as much more."""
    tensor = WireTensor(int(lossgrad.tensors.FLOAT32), values.shape, values.data.cast("B"))
    result = ResultView(0.5, None, values.size, float(values.size), 0, None, tensor)
    parts = encode_compute_response(STATS, [result] * count)
    head = sum(map(len, parts[: next(index for index, part in enumerate(parts) if len(part) == values.nbytes)]))
    room = (-head - 2 + misalign) % 16 + (16 if (-head - 2 + misalign) % 16 == 1 else 0)
    padding = bytes((15 << 3 | 2, room)) + bytes(room)  # ComputeLossResponse.padding
    return b"".join([padding, *parts])


def is_within(array: Any, message: bytes) -> bool:
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    return address_of(message) <= address < address_of(message) + len(message)


@pytest.fixture
def values() -> np.ndarray[Any, Any]:
    return np.arange(COUNT, dtype=np.float32)


@pytest.mark.parametrize("family", [np, torch])
def test_one_large_tensor_is_not_copied_and_is_writable(values: np.ndarray[Any, Any], family: Any) -> None:
    message = answer(values)
    result: Any = request(SmoothL1(gradient=True), family=family).read(message, 0.0, is_own=True)
    assert is_within(result.gradient, message)
    del message
    gc.collect()
    np.testing.assert_array_equal(np.asarray(result.gradient), values)
    result.gradient[:] = 7.0
    assert float(result.gradient.sum()) == 7.0 * COUNT


def test_a_message_that_somebody_else_may_have_is_copied(values: np.ndarray[Any, Any]) -> None:
    message = answer(values)
    before = bytes(bytearray(message))
    result: Any = request(SmoothL1(gradient=True)).read(message, 0.0)
    assert not is_within(result.gradient, message)
    result.gradient[:] = 7.0
    assert message == before


def test_of_several_tensors_each_is_a_copy_which_keeps_nothing_else_alive(values: np.ndarray[Any, Any]) -> None:
    message = answer(values, count=3)
    results: Any = request(*[SmoothL1(gradient=True)] * 3).read(message, 0.0, is_own=True)
    for result in results:
        assert not is_within(result.gradient, message)
        np.testing.assert_array_equal(result.gradient, values)


def test_a_tensor_that_is_not_aligned_is_copied(values: np.ndarray[Any, Any]) -> None:
    message = answer(values, misalign=3)
    result: Any = request(SmoothL1(gradient=True)).read(message, 0.0, is_own=True)
    assert not is_within(result.gradient, message)
    assert result.gradient.flags.aligned
    np.testing.assert_array_equal(result.gradient, values)


def test_a_small_answer_is_copied() -> None:
    values = np.arange(100, dtype=np.float32)
    array = np.zeros(100, np.float32)
    message = answer(values)
    small = prepare(array, array, (SmoothL1(gradient=True),), is_single=True, max_message_bytes=1 << 20)
    result: Any = small.read(message, 0.0, is_own=True)
    assert not is_within(result.gradient, message)


def test_the_memory_of_an_answer_is_freed_with_its_array(values: np.ndarray[Any, Any]) -> None:
    large = request(SmoothL1(gradient=True))
    tracemalloc.start()
    try:
        for _ in range(5):
            large.read(answer(values), 0.0, is_own=True)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < values.nbytes
    finally:
        tracemalloc.stop()


def test_the_clients_own_channel_has_its_answers_to_itself_and_a_given_one_has_not(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    read = Request.read

    def spy(self: Request, message: bytes, seconds: float, *, is_own: bool = False) -> Any:
        seen.append(is_own)
        return read(self, message, seconds, is_own=is_own)

    monkeypatch.setattr(Request, "read", spy)
    ones = np.ones(COUNT, np.float32)
    with LossClient(target) as client, LossClient.from_channel(grpc.insecure_channel(target)) as given:
        for each in (client, given):
            result = each.l1(ones, ones * 3, gradient=True, reduction="sum")
            np.testing.assert_array_equal(result.gradient, -ones)
            result.gradient[:] = 0
    assert seen == [True, False]
