"""`lossgrad.embedded()`: the client over a server in this process, without a network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

import lossgrad
from lossgrad import L1, MSE, InvalidRequest, LossClient, SmoothL1


@pytest.fixture(scope="module")
def embedded() -> Iterator[LossClient]:
    with lossgrad.embedded(device="cpu") as client:
        yield client


def test_it_computes_what_torch_computes(embedded: LossClient) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.zeros(50)
    result = embedded.smooth_l1(x, y, beta=0.5, gradient=True)
    expected = functional.smooth_l1_loss(x, y, beta=0.5)
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.gradient, *torch.autograd.grad(expected, x))
    assert result.timing.device == "cpu"


def test_it_streams_asks_and_answers_errors_like_any_server(embedded: LossClient) -> None:
    pairs = [(np.full(3, float(number)), np.zeros(3)) for number in range(200)]
    assert [result.value for result in embedded.stream(pairs, L1())] == list(range(200))
    outcomes = embedded.compute_many([*pairs[:2], (np.ones(2), np.ones(3))], [L1(), MSE()], on_error="return")
    assert isinstance(outcomes[2], InvalidRequest)
    assert outcomes[2].reason == "SHAPE_MISMATCH"
    stream = embedded.stream(pairs * 10, L1())
    assert next(stream).value == 0.0
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="shape"):
        embedded.compute(np.ones(2), np.ones(3), SmoothL1())
    assert embedded.info().device == "cpu"
    assert 0 < embedded.ping() < 10


def test_double_backward_through_it(embedded: LossClient) -> None:
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    criterion = lossgrad.nn.SmoothL1Loss(beta=0.3, client=embedded)
    target = torch.zeros(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: criterion(x, target), (x,))
    assert torch.autograd.gradgradcheck(lambda x: criterion(x, target), (x,))


def test_it_ends_with_the_block() -> None:
    with lossgrad.embedded(device="cpu") as client:
        client.l1([1.0], [0.0])
    with pytest.raises(RuntimeError, match="this client is closed"):
        client.l1([1.0], [0.0])
