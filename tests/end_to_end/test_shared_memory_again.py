"""Calls like others before, over arrays in shared memory: written from what is remembered, and answered as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import lossgrad
from lossgrad import shared_memory as module
from lossgrad_api.codec import WireTensor
from lossgrad_api.shared_codec import SharedPart, SharedTensor, encode_shared_request
from lossgrad_api.shared_form import shared_form
from lossgrad_server.shared_memory.segments import why_impossible
from tests.end_to_end.sharing import LARGE, is_shared, same
from tests.server.serving import RunningServer, StartServer

FLOAT32 = 3
SPEC = lossgrad.SmoothL1(gradient=True).serialized


@pytest.fixture(autouse=True)
def needs_memfd() -> None:
    if reason := why_impossible():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def sharing() -> Iterator[RunningServer]:
    with RunningServer(allow_shared_memory=True) as running:
        yield running


@pytest.fixture
def client(sharing: RunningServer) -> Iterator[lossgrad.LossClient]:
    with lossgrad.LossClient(sharing.address, shared_memory=True) as client:
        yield client


@pytest.fixture
def wire(sharing: RunningServer) -> Iterator[lossgrad.LossClient]:
    with lossgrad.LossClient(sharing.address) as client:
        yield client


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each request that was encoded field by field."""
    calls: list[int] = []

    def encode(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return encode_shared_request(*arguments, **options)

    monkeypatch.setattr(module, "encode_shared_request", encode)
    return calls


def filled(client: lossgrad.LossClient, *, rows: int = 2, seed: int = 0) -> Any:
    """Return rows of numbers in shared memory."""
    room = client.empty((rows, LARGE))
    room[:] = np.random.default_rng(seed).normal(size=room.shape)
    return room


def test_what_is_written_is_what_encoding_gives() -> None:
    def encode(regions: tuple[bytes, bytes, bytes], offsets: tuple[int, int, int], **options: Any) -> bytes:
        parts = [SharedPart(region, offset, 4096) for region, offset in zip(regions, offsets, strict=True)]
        tensors = [SharedTensor(FLOAT32, (4, 256), part) for part in parts[:2]]
        return b"".join(encode_shared_request([SPEC, SPEC], *tensors, outputs=parts[2], **options))

    first = encode((b"a" * 16, b"b" * 16, b"c" * 16), (0, 8, 16))
    form = shared_form(first, 0, len(first))
    assert form is not None
    regions, offsets = (b"\0" * 16, bytes(range(16)), b"\xff" * 16), (2**63, 0, 2**64 - 8)
    parts = [SharedPart(region, offset, 4096) for region, offset in zip(regions, offsets, strict=True)]
    assert form.write(parts[:2], parts[2]) == encode(regions, offsets)
    assert form.write(parts[:2], None) is None
    assert form.write(parts[:1], parts[2]) is None
    assert form.write([parts[0], parts[1]._replace(byte_count=4104)], parts[2]) is None
    assert form.write(parts[:2], parts[2]._replace(byte_count=8192)) is None


def test_tensors_that_come_along_are_not_written_from_memory() -> None:
    small = WireTensor(FLOAT32, (2,), bytes(8))
    part = SharedPart(b"a" * 16, 8, 8)
    message = b"".join(encode_shared_request([SPEC], SharedTensor(FLOAT32, (2,), part), small))
    form = shared_form(message, 0, len(message))
    assert form is not None
    assert form.write([part, part], None) is None


def test_every_call_has_the_arrays_that_it_was_given(
    client: lossgrad.LossClient, wire: lossgrad.LossClient, encoded: list[int]
) -> None:
    one, other = filled(client, rows=3), filled(client, rows=3, seed=1)
    pairs = [(one[0], other[0]), (other[0], one[0]), (one[2], one[1]), (one[1], one[1]), (other[2], other[1])]
    for input, target in pairs:
        result = client.smooth_l1(input, target, gradient=True)
        same(result, wire.smooth_l1(input, target, gradient=True))
        assert is_shared(result.gradient)
    assert len(encoded) == 1
    kept = client.smooth_l1(one[0], other[0], gradient=True).gradient
    again = client.smooth_l1(kept, one[1], gradient=True)  # a gradient, where it came
    same(again, wire.smooth_l1(kept, one[1], gradient=True))
    assert len(encoded) == 1


@pytest.mark.parametrize(
    "change",
    {
        "another loss": lambda c, x, y: c.huber(x, y, gradient=True),
        "another parameter": lambda c, x, y: c.smooth_l1(x, y, beta=0.25, gradient=True),
        "another reduction": lambda c, x, y: c.smooth_l1(x, y, reduction="none", gradient=True),
        "no gradient": lambda c, x, y: c.smooth_l1(x, y),
        "another shape": lambda c, x, y: c.smooth_l1(x.reshape(4, -1), y.reshape(4, -1), gradient=True),
        "another type": lambda c, x, y: c.smooth_l1(x.view(np.float16), y.view(np.float16), gradient=True),
        "a weight": lambda c, x, y: c.smooth_l1(x, y, weight=abs(y), gradient=True),
        "a mask": lambda c, x, y: c.smooth_l1(x, y, mask=y > 0, gradient=True),
        "a name": lambda c, x, y: c.smooth_l1(x, y, gradient=True, idempotency_key="mine"),
        "a copy": lambda c, x, y: c.smooth_l1(x.copy(), y, gradient=True),
        "another order": lambda c, x, y: c.smooth_l1(x[::-1], y, gradient=True),
        "an odd place": lambda c, x, y: c.smooth_l1(
            x.view(np.uint8)[4:-4].view(np.float32), y.view(np.uint8)[8:].view(np.float32), gradient=True
        ),
        "read-only": lambda c, x, y: c.smooth_l1(
            np.frombuffer(memoryview(x).toreadonly(), np.float32), y, gradient=True
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_differs_is_not_taken_for_the_same(
    change: tuple[str, Callable[..., Any]], client: lossgrad.LossClient, wire: lossgrad.LossClient
) -> None:
    room = filled(client)
    for _ in range(2):
        client.smooth_l1(room[0], room[1], gradient=True)
        same(change[1](client, *room), change[1](wire, *room))


def test_where_the_memory_is_gone_the_arrays_travel(start_server: StartServer) -> None:
    """The server gives the regions up: the call after that finds its request known, and sends the arrays themselves."""
    running = start_server(allow_shared_memory=True)
    with lossgrad.LossClient(running.address, shared_memory=True) as client:
        room = filled(client)
        expected = client.mse(room[0], room[1], gradient=True)
        shared = running.server._core.shared_memory
        assert shared is not None

        async def give_up() -> None:
            shared.segments.close()

        running.run(give_up())
        same(client.mse(room[0], room[1], gradient=True), expected)
