"""Calls that do not fit one message are cut, and give the bits of one; LossMetric and sweeps over the same server."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lossgrad import L1, AsyncLossClient, Huber, InvalidRequest, LossClient, LossMetric, SmoothL1
from tests.server.serving import RunningServer, StartServer

RANDOM = np.random.default_rng(3)
INPUT, TARGET = (RANDOM.normal(size=(300, 257)).astype(np.float32) for _ in range(2))
WEIGHT = RANDOM.random((300, 257)).astype(np.float32)
MASK = RANDOM.random((300, 257)) < 0.7
LIMIT = 200_000


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[LossClient]:
    with LossClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def small(server: RunningServer) -> Iterator[LossClient]:
    with LossClient(server.address, max_message_bytes=LIMIT) as client:
        yield client


def assert_same_bits(one: Any, other: Any) -> None:
    for name in ("loss", "gradient", "target_gradient"):
        first, second = getattr(one, name), getattr(other, name)
        if first is None or second is None:
            assert first is second, name
        else:
            assert (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes()), name
    for name in ("value", "element_count", "weight_sum", "nonfinite_count"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sample_mean", "sample_sum"])
def test_a_call_that_is_cut_has_the_bits_of_one_message(
    client: LossClient, small: LossClient, reduction: str, gradient: bool
) -> None:
    loss = SmoothL1(beta=0.5, reduction=reduction, gradient=gradient)
    for options in ({}, {"weight": WEIGHT}, {"mask": MASK}, {"weight": WEIGHT, "mask": MASK}):
        for dtype in (np.float32, np.float64, np.float16):
            pair = INPUT.astype(dtype), TARGET.astype(np.float32 if dtype is np.float16 else dtype)
            assert_same_bits(small.compute(*pair, loss, **options), client.compute(*pair, loss, **options))


def test_several_losses_of_a_call_that_is_cut(client: LossClient, small: LossClient) -> None:
    losses = [
        L1(gradient=True),
        Huber(reduction="sum", denominator=None),
        L1(denominator=3.0),
        SmoothL1(reduction="none"),
    ]
    for one, other in zip(small.compute(INPUT, TARGET, losses), client.compute(INPUT, TARGET, losses), strict=True):
        assert_same_bits(one, other)


async def test_a_smaller_server_is_asked_for_its_limit(start_server: StartServer, client: LossClient) -> None:
    server = start_server(max_message_bytes=LIMIT)
    with LossClient(server.address) as blocking:
        assert_same_bits(blocking.l1(INPUT, TARGET, gradient=True), client.l1(INPUT, TARGET, gradient=True))
    async with AsyncLossClient(server.address) as awaited:
        assert_same_bits(await awaited.l1(INPUT, TARGET, gradient=True), client.l1(INPUT, TARGET, gradient=True))
        report = await awaited.evaluate([(INPUT, TARGET)] * 3)
    assert report.accumulation == client.evaluate([(INPUT, TARGET)] * 3).accumulation


def test_a_gradient_is_written_where_the_caller_says(client: LossClient, small: LossClient) -> None:
    expected = client.l1(INPUT, TARGET, gradient=True).gradient
    for each in (client, small):
        out = np.empty_like(INPUT)
        result = each.l1(INPUT, TARGET, gradient=True, gradient_out=out)
        assert result.gradient is out
        np.testing.assert_array_equal(out, expected)
        with pytest.raises(InvalidRequest, match="gradient_out has shape"):
            each.l1(INPUT, TARGET, gradient=True, gradient_out=out[:2])
        with pytest.raises(InvalidRequest, match="asks for no gradient"):
            each.l1(INPUT, TARGET, gradient_out=out)


def test_a_metric_is_the_evaluation_of_its_updates(client: LossClient) -> None:
    batches = [(torch.tensor(INPUT[i : i + 50]), torch.tensor(TARGET[i : i + 50])) for i in range(0, 300, 50)]
    expected = client.evaluate(batches, L1())[0].value
    whole, even, odd = (LossMetric(L1(), client=client) for _ in range(3))
    for number, batch in enumerate(batches):
        whole.update(*batch)
        (odd if number % 2 else even).update(*batch)
    assert whole.compute() == expected
    assert whole.compute().dtype == torch.float64
    odd.merge_state(even)
    assert odd.compute() == pickle.loads(pickle.dumps(odd)).compute() == expected  # noqa: S301
    assert even(*batches[1]) == client.l1(*batches[1]).value
    with pytest.raises(InvalidRequest):
        even(batches[0][0], batches[0][1][:1])
    even.reset()
    assert even.compute().isnan()
    for metric in (whole, even, odd):
        metric.close()


def test_a_sweep_is_a_call_for_each_beta(client: LossClient) -> None:
    betas = np.linspace(0.0, 2.0, 35)
    result = client.sweep(INPUT, TARGET, betas, weight=WEIGHT)
    assert result.losses.tolist() == [client.smooth_l1(INPUT, TARGET, beta=b, weight=WEIGHT).value for b in betas]
    assert result.best.loss == result.losses.min()
    assert client.sweep(INPUT, TARGET, [0.5], loss=Huber).parameter == "delta"
    with pytest.raises(InvalidRequest, match="betas is empty"):
        client.sweep(INPUT, TARGET, [])
