"""The SDK with `shared_memory=True` against a server: the wire's bits, no copy that need not be, the wire where it must."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import lossgrad
from lossgrad import shared_memory as module
from lossgrad_server.shared_memory.segments import why_impossible
from tests.end_to_end.sharing import LARGE, bits, is_shared, pair, pool_of, same, segments
from tests.server.serving import HeldWorker, RunningServer, StartServer, eventually

GRADIENT = lossgrad.SmoothL1(beta=0.5, gradient=True)


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
    gc.collect()
    eventually(lambda: segments(sharing) == 0)


@pytest.fixture
def wire(sharing: RunningServer) -> Iterator[lossgrad.LossClient]:
    with lossgrad.LossClient(sharing.address) as client:
        yield client


CALLS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda c: c.smooth_l1(*pair(), gradient=True),
    "no gradient": lambda c: c.huber(*pair(), reduction="sum"),
    "unreduced": lambda c: c.mse(*pair(), reduction="none", gradient=True),
    "per sample": lambda c: c.l1(*(x.reshape(100, -1) for x in pair()), reduction="sample_mean", gradient=True),
    "float64": lambda c: c.smooth_l1(*pair(dtype=np.float64), gradient=True),
    "float16": lambda c: c.smooth_l1(*pair(dtype=np.float16), gradient=True),
    "bfloat16": lambda c: c.smooth_l1(*pair(dtype=ml_dtypes.bfloat16), reduction="none", gradient=True),
    "several": lambda c: c.compute(*pair(), [GRADIENT, lossgrad.L1(reduction="none"), lossgrad.MSE(gradient=True)]),
    "weight and mask": lambda c: c.smooth_l1(*pair(), weight=abs(pair()[0]), mask=pair()[1] > 0, gradient=True),
    "broadcast": lambda c: c.mse(pair()[0].reshape(100, -1), pair(2000)[0], allow_broadcast=True, gradient=True),
    "a number": lambda c: c.mse(pair()[0], 0.5, allow_broadcast=True, gradient=True),
    "not contiguous": lambda c: c.mse(pair()[0][::2], pair()[1][::-2], gradient=True),
    "odd": lambda c: c.mse(pair(LARGE + 1)[0][1:], pair()[1], gradient=True),
    "another order": lambda c: c.mse(*(x.astype(">f4") for x in pair()), gradient=True),
    "integers": lambda c: c.mse(pair()[0], np.arange(LARGE, dtype=np.int64), gradient=True),
    "mixed": lambda c: c.mse(pair(dtype=np.float16)[0], pair(dtype=np.float64)[1], reduction="none", gradient=True),
    "torch": lambda c: c.smooth_l1(*map(torch.from_numpy, pair()), gradient=True),
    "torch, bfloat16": lambda c: c.l1(
        *(torch.from_numpy(x).to(torch.bfloat16) for x in pair()), reduction="none", gradient=True
    ),
    "torch, a view": lambda c: c.mse(*(torch.from_numpy(x).view(100, -1).t() for x in pair()), gradient=True),
    "NaN": lambda c: c.smooth_l1(np.where(pair()[0] > 2, np.nan, pair()[0]), pair()[1], gradient=True),
    "a name": lambda c: c.smooth_l1(*pair(), gradient=True, idempotency_key="mine"),
    "large": lambda c: c.smooth_l1(*pair(3_000_001), gradient=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_are_those_of_the_wire(
    name: str, client: lossgrad.LossClient, wire: lossgrad.LossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CALLS[name](wire)
    client.smooth_l1(*pair(), gradient=True)  # there is a pool from now on
    pool = pool_of(client)
    take, taken = pool.take, []

    def note(byte_count: int) -> Any:
        taken.append(take(byte_count))
        return taken[-1]

    monkeypatch.setattr(pool, "take", note)
    for _ in range(2):  # the second time in regions that were used before
        taken.clear()
        result = CALLS[name](client)
        assert taken  # its tensors did not travel, whether or not an answer still lies there
        assert all(taken)
        same(result, expected)
        gradient = (result[0] if isinstance(result, tuple) else result).gradient
        assert gradient is None or is_shared(gradient)
        assert gradient is None or pool.in_use >= 1


def test_small_tensors_travel(client: lossgrad.LossClient) -> None:
    assert not is_shared(client.mse(*pair(1000), gradient=True).gradient)


def test_errors_are_those_of_the_wire(client: lossgrad.LossClient, wire: lossgrad.LossClient) -> None:
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda c: c.mse(pair()[0], pair(LARGE - 1)[1]),
        lambda c: c.mse(pair()[0], pair(7)[1], allow_broadcast=True),
        lambda c: c.mse(pair()[0].astype(np.complex64), pair()[1]),
        lambda c: c.mse(np.arange(LARGE), np.arange(LARGE)),
        lambda c: c.mse(*pair(), weight=pair(3)[0]),
        lambda c: c.mse(*pair(), mask=pair()[0]),
        lambda c: c.mse(*pair(), idempotency_key="x" * 1000),
    )
    for call in calls:
        with pytest.raises(lossgrad.LossgradError) as expected:
            call(wire)
        with pytest.raises(type(expected.value)) as caught:
            call(client)
        assert (caught.value.reason, caught.value.field) == (expected.value.reason, expected.value.field)
        assert caught.value.message == expected.value.message


def test_regions_are_used_again(sharing: RunningServer, client: lossgrad.LossClient) -> None:
    x, y = pair()
    for _ in range(20):
        client.smooth_l1(x, y, gradient=True)
    assert segments(sharing) == 2  # the operands' and the answer's


def test_results_are_the_callers_own(client: lossgrad.LossClient, wire: lossgrad.LossClient) -> None:
    x, y = pair()
    first = client.smooth_l1(x, y, gradient=True).gradient
    expected = wire.smooth_l1(x, y, gradient=True).gradient
    for seed in range(5):
        client.mse(*pair(seed=seed), gradient=True)
    assert bits(first) == bits(expected)
    first[:] = 7  # writable
    client.mse(x, y, gradient=True)
    assert (first == 7).all()
    part = first[10:20].reshape(2, 5)
    del first
    gc.collect()
    for seed in range(5):
        client.mse(*pair(seed=seed), gradient=True)
    assert (part == 7).all()


def test_results_outlive_client_and_server(start_server: StartServer) -> None:
    running = start_server(allow_shared_memory=True)
    x, y = pair()
    with lossgrad.LossClient(running.address, shared_memory=True) as client:
        result = client.smooth_l1(x, y, gradient=True)
        tensor = client.smooth_l1(torch.from_numpy(x), torch.from_numpy(y), gradient=True).gradient
        expected = bits(result.gradient)
    assert segments(running) >= 2
    running.stop()
    assert bits(result.gradient) == bits(tensor) == expected


def test_arrays_in_shared_memory_are_not_copied(
    client: lossgrad.LossClient, wire: lossgrad.LossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = pair()
    shared_x, shared_y = client.empty(LARGE), client.empty((100, LARGE // 100), np.float32)
    assert is_shared(shared_x)
    shared_x[:], shared_y.ravel()[:] = x, y
    copied: list[int] = []
    copy = np.copyto

    def count(to: Any, *rest: Any) -> None:
        copied.append(to.nbytes)
        copy(to, *rest)

    monkeypatch.setattr(np, "copyto", count)
    same(client.smooth_l1(shared_x, shared_y.ravel(), gradient=True), wire.smooth_l1(x, y, gradient=True))
    half = shared_x.nbytes // 2
    copied.clear()
    same(client.mse(shared_x[: LARGE // 2], y[: LARGE // 2]), wire.mse(x[: LARGE // 2], y[: LARGE // 2]))
    assert copied == [half]  # y
    copied.clear()
    gradient = client.mse(torch.from_numpy(shared_x), torch.from_numpy(shared_y).view(-1), gradient=True).gradient
    client.mse(gradient, torch.from_numpy(shared_x))  # what came back may be sent again
    assert copied == []
    client.mse(shared_x[1 : LARGE // 2 * 2 : 2], shared_x[::2][: LARGE // 2])
    assert copied == [half, half]  # not as they lie there


def test_arrays_are_plain_where_memory_is_not_shared(wire: lossgrad.LossClient) -> None:
    array = wire.empty((3, 4), "float64")
    assert (array.shape, array.dtype) == ((3, 4), np.float64)
    assert not is_shared(array)


def test_many_kept_results_do_not_take_all_regions(
    sharing: RunningServer, client: lossgrad.LossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_IN_USE", 6)
    x, y = pair()
    kept = [client.mse(x, y, gradient=True).gradient for _ in range(20)]
    assert 4 <= sum(map(is_shared, kept)) <= 7
    assert segments(sharing) <= 9
    assert len({bits(one) for one in kept}) == 1


def test_threads_share_one_client(client: lossgrad.LossClient, wire: lossgrad.LossClient) -> None:
    pairs = [pair(seed=seed) for seed in range(8)]
    expected = [bits(wire.smooth_l1(*one, gradient=True).gradient) for one in pairs]

    def work(number: int) -> bool:
        return all(
            bits(client.smooth_l1(*pairs[number], gradient=True).gradient) == expected[number] for _ in range(15)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_a_server_without_it_is_noticed_once(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    x, y = pair()
    with caplog.at_level(logging.INFO), lossgrad.LossClient(server.address, shared_memory=True) as client:
        asked: list[int] = []
        memory: Any = client._memory
        ask = memory._ask

        def count() -> bytes:
            asked.append(1)
            return bytes(ask())

        memory._ask = count
        for _ in range(3):
            assert not is_shared(client.smooth_l1(x, y, gradient=True).gradient)
        assert not is_shared(client.empty(LARGE))
        assert len(asked) == 1
        memory._again_at = 0.0  # a minute later
        client.smooth_l1(x, y)
        assert len(asked) == 2
    (record,) = [record for record in caplog.records if record.name == "lossgrad.shared_memory"]
    assert record.levelno == logging.WARNING
    assert "--allow-shared-memory" in record.getMessage()


def test_without_room_tensors_travel(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    running = start_server(allow_shared_memory=True, max_shared_memory_bytes=1 << 20)
    with caplog.at_level(logging.WARNING), lossgrad.LossClient(running.address, shared_memory=True) as client:
        for _ in range(3):
            assert client.smooth_l1(*pair(), gradient=True).element_count == LARGE
        assert is_shared(client.mse(*pair(40_000), gradient=True).gradient)
    records = [record.getMessage() for record in caplog.records if record.name == "lossgrad.shared_memory"]
    assert len(records) == 1
    assert "no room" in records[0]


def test_another_server_in_its_place_is_asked_anew(start_server: StartServer) -> None:
    first = start_server(allow_shared_memory=True)
    with lossgrad.LossClient(first.address, shared_memory=True, retries=4) as client:
        x, y = pair()
        expected = bits(client.smooth_l1(x, y, gradient=True).gradient)
        before = client.empty(LARGE)
        before[:] = x
        first.stop()
        second = start_server(allow_shared_memory=True, port=first.server.port)
        eventually(lambda: is_answered(client))
        for input in (x, before):  # memory that this server has not handed out is as any other
            gradient = client.smooth_l1(input, y, gradient=True).gradient
            assert bits(gradient) == expected
        assert is_shared(client.smooth_l1(x, y, gradient=True).gradient)
        assert segments(second) >= 2


def is_answered(client: lossgrad.LossClient) -> bool:
    try:
        client.smooth_l1(*pair(), gradient=True)
    except lossgrad.Unavailable:
        return False
    return True


def test_what_the_server_may_still_write_to_is_never_used_again(start_server: StartServer) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker, allow_shared_memory=True)
    with lossgrad.LossClient(running.address, shared_memory=True, retries=0) as client:
        x, y = pair()
        expected = bits(client.smooth_l1(x, y, gradient=True).gradient)
        worker.wait_for_batch()
        worker.hold()
        with pytest.raises(lossgrad.DeadlineExceeded):
            client.mse(x, y, gradient=True, timeout=0.2)
        worker.wait_for_batch()  # it is at it
        gc.collect()
        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(lambda: bits(client.smooth_l1(x, y, gradient=True).gradient))
            worker.release()
            assert late.result() == expected
        gc.collect()
        client.smooth_l1(x, y)
        assert pool_of(client).in_use == 0
        eventually(lambda: segments(running) == 2)  # the two of the call that was given up are gone


def test_a_forked_child_uses_nothing_of_its_parents(client: lossgrad.LossClient) -> None:
    x, y = pair()
    result = client.smooth_l1(x, y, gradient=True)
    expected = bits(result.gradient)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same_bits = bits(client.smooth_l1(x, y, gradient=True).gradient) == expected == bits(result.gradient)
            os.write(writing, b"y" if same_bits else b"n")
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"y"
    os.close(reading)
    os.waitpid(child, 0)
    assert bits(client.smooth_l1(x, y, gradient=True).gradient) == expected == bits(result.gradient)


async def test_asyncio(sharing: RunningServer, wire: lossgrad.LossClient) -> None:
    pairs = [pair(seed=seed) for seed in range(8)]
    expected = [wire.smooth_l1(*one, gradient=True) for one in pairs]
    async with lossgrad.AsyncLossClient(sharing.address, shared_memory=True) as client:
        for _ in range(2):
            results = await asyncio.gather(*(client.smooth_l1(*one, gradient=True) for one in pairs))
            for result, other in zip(results, expected, strict=True):
                same(result, other)
                assert is_shared(result.gradient)
        array = await client.empty(LARGE)
        assert is_shared(array)
        array[:] = pairs[0][0]
        same(await client.smooth_l1(array, pairs[0][1], gradient=True), expected[0])
        task = asyncio.ensure_future(client.smooth_l1(*pairs[0], gradient=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        same(await client.smooth_l1(*pairs[1], gradient=True), expected[1])
        with pytest.raises(lossgrad.InvalidRequest):
            await client.smooth_l1(pairs[0][0], pairs[0][1][1:])
        streamed = [result async for result in client.stream(pairs, GRADIENT)]
        assert all(is_shared(result.gradient) for result in streamed)
    async with lossgrad.AsyncLossClient(sharing.address) as client:
        assert not is_shared(await client.empty(LARGE))


def test_a_stream_gives_the_same_and_lets_arrays_be_used_again(
    client: lossgrad.LossClient, wire: lossgrad.LossClient
) -> None:
    expected = [wire.compute(*pair(seed=seed), GRADIENT) for seed in range(30)]
    buffer = client.empty(LARGE)

    def pairs() -> Iterator[tuple[Any, Any]]:
        for seed in range(30):
            x, y = pair(seed=seed)
            buffer[:] = x
            yield buffer, y

    for result, other in zip(client.stream(pairs(), GRADIENT, in_flight=4), expected, strict=True):
        same(result, other)
        assert is_shared(result.gradient)


def test_a_stream_whose_memory_is_gone_goes_on_with_messages(
    sharing: RunningServer, client: lossgrad.LossClient, wire: lossgrad.LossClient
) -> None:
    memory = sharing.server._core.shared_memory
    assert memory is not None

    def pairs() -> Iterator[tuple[Any, Any]]:
        for seed in range(12):
            if seed == 5:
                pull = threading.Event()
                sharing.run(forget(memory.segments))
                pull.set()
            yield pair(seed=seed)

    async def forget(segments: Any) -> None:
        segments.close()

    for seed, result in enumerate(client.stream(pairs(), GRADIENT, in_flight=3)):
        same(result, wire.compute(*pair(seed=seed), GRADIENT))


def test_over_a_unix_socket(tmp_path: Path, start_server: StartServer) -> None:
    running = start_server(host=f"unix:{tmp_path}/s", allow_shared_memory=True)
    with lossgrad.LossClient(f"unix:{tmp_path}/s", shared_memory=True) as client:
        assert is_shared(client.smooth_l1(*pair(), gradient=True).gradient)
    assert (tmp_path / "s.memory").exists()
    running.stop()
    assert not (tmp_path / "s.memory").exists()


def test_drop_in_modules_take_it_too(client: lossgrad.LossClient) -> None:
    x, y = (torch.from_numpy(one) for one in pair())
    x.requires_grad_()
    lossgrad.nn.SmoothL1Loss(beta=0.5, client=client)(x, y).backward()
    ours, x.grad = x.grad, None
    torch.nn.SmoothL1Loss(beta=0.5)(x, y).backward()
    assert ours is not None
    torch.testing.assert_close(ours, x.grad)


def test_the_environment_turns_it_on(sharing: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSGRAD_SHARED_MEMORY", "1")
    with lossgrad.LossClient(sharing.address) as client:
        assert is_shared(client.smooth_l1(*pair(), gradient=True).gradient)
    with lossgrad.LossClient(sharing.address, shared_memory=False) as client:
        assert not is_shared(client.smooth_l1(*pair(), gradient=True).gradient)
