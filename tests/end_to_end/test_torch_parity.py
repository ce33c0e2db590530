"""Loss and gradient through the wire equal torch's: unary and streamed, sync and async, embedded, over every corner."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

import lossgrad
from tests.end_to_end.parity import DTYPES, LOSSES, Case, cases, check
from tests.server.serving import RunningServer


@pytest.fixture
def client(server: RunningServer) -> Iterator[lossgrad.LossClient]:
    with lossgrad.LossClient(server.address) as client:
        yield client


def by_broadcast(loss: str, dtype: str) -> Iterator[tuple[bool, tuple[lossgrad.Loss, ...], list[Case]]]:
    """Give cases grouped by what one stream has in common: its losses and whether it broadcasts."""
    groups: dict[tuple[bool, tuple[lossgrad.Loss, ...]], list[Case]] = {}
    for case in cases(loss, DTYPES[dtype]):
        groups.setdefault((case.options["allow_broadcast"], case.losses), []).append(case)
    for (allow_broadcast, losses), group in groups.items():
        yield allow_broadcast, losses, group


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_unary_calls_give_what_torch_gives(client: lossgrad.LossClient, loss: str, dtype: str) -> None:
    for case in cases(loss, DTYPES[dtype]):
        check(case, client.compute(case.input, case.target, case.losses, **case.options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_streams_give_what_torch_gives(client: lossgrad.LossClient, loss: str, dtype: str) -> None:
    for allow_broadcast, losses, group in by_broadcast(loss, dtype):
        pairs = ((case.input, case.target) for case in group)
        results = list(client.stream(pairs, losses, allow_broadcast=allow_broadcast))
        for case, result in zip(group, results, strict=True):
            check(case, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
async def test_async_calls_and_streams_give_what_torch_gives(server: RunningServer, loss: str, dtype: str) -> None:
    async with lossgrad.AsyncLossClient(server.address) as client:
        every = list(cases(loss, DTYPES[dtype]))
        calls = (client.compute(case.input, case.target, case.losses, **case.options) for case in every)
        for case, result in zip(every, await asyncio.gather(*calls), strict=True):
            check(case, result)
        for allow_broadcast, losses, group in by_broadcast(loss, dtype):
            pairs = ((case.input, case.target) for case in group)
            results = [result async for result in client.stream(pairs, losses, allow_broadcast=allow_broadcast)]
            for case, result in zip(group, results, strict=True):
                check(case, result)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_embedded_server_gives_the_same_bits_as_the_wire(client: lossgrad.LossClient, loss: str) -> None:
    with lossgrad.embedded(device="cpu") as embedded:
        for case in cases(loss, DTYPES["f32"]):
            near = embedded.compute(case.input, case.target, case.losses, **case.options)
            far = client.compute(case.input, case.target, case.losses, **case.options)
            for one, other in zip(near, far, strict=True):
                assert bits(one.loss) == bits(other.loss)
                assert bits(one.gradient) == bits(other.gradient)
                assert bits(one.target_gradient) == bits(other.target_gradient)
                assert (one.element_count, one.weight_sum, one.nonfinite_count) == (
                    other.element_count,
                    other.weight_sum,
                    other.nonfinite_count,
                )


def bits(tensor: object) -> bytes | None:
    return None if tensor is None else np.asarray(tensor).tobytes()


def test_a_bad_request_in_a_stream_leaves_its_neighbours_bits_unchanged(client: lossgrad.LossClient) -> None:
    generator = np.random.default_rng(7)
    good = [(generator.standard_normal(100, np.float32), generator.standard_normal(100, np.float32)) for _ in range(50)]
    loss = lossgrad.SmoothL1(gradient=True)
    alone = [client.compute(input, target, loss) for input, target in good]
    mixed = [pair for input, target in good for pair in ((input, target), (input, target[:99]))]
    outcomes = client.compute_many(mixed, loss, on_error="return")
    for index, expected in enumerate(alone):
        neighbour, refused = outcomes[2 * index], outcomes[2 * index + 1]
        assert isinstance(refused, lossgrad.InvalidRequest)
        assert refused.field == "target.shape"
        assert isinstance(neighbour, lossgrad.LossResult)
        assert neighbour.value == expected.value
        assert bits(neighbour.gradient) == bits(expected.gradient)
