"""Second derivatives through lossgrad.nn beside torch.nn's: a gradient is never cut from its graph."""

from __future__ import annotations

import pytest
import torch

from lossgrad import LossClient
from lossgrad import nn as served
from tests.client.modules import MODULES, REDUCTIONS, SHAPES, TOLERANCES, both, close, tensors


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "options"), MODULES)
def test_second_derivatives_are_torchs_also_with_respect_to_grad_output(
    client: LossClient, name: str, options: dict[str, float], reduction: str
) -> None:
    modules = both(client, name, reduction=reduction, **options)
    for shapes in SHAPES:
        outcomes = []
        for module in modules:
            x, y = tensors(shapes, torch.float64, torch.float64)
            loss = module(x, y)
            (grad_output,) = tensors((tuple(loss.shape),), torch.float64, seed=1)
            gradients = torch.autograd.grad(loss, (x, y), grad_output, create_graph=True)
            directions = tensors(shapes, torch.float64, torch.float64, grad=False, seed=2)
            seconds = torch.autograd.grad(gradients, (x, y, grad_output), directions)
            outcomes.append((*gradients, *seconds))
        close(outcomes[0], outcomes[1], torch.float64)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "options"), [*MODULES[:3], *MODULES[4:]])
def test_gradcheck_and_gradgradcheck_pass(
    client: LossClient, name: str, options: dict[str, float], reduction: str
) -> None:
    ours, _ = both(client, name, reduction=reduction, **options)
    for shapes in (((3,), (3,)), ((2, 1), (2,)), ((), ())):
        inputs = tuple(tensors(shapes, torch.float64, torch.float64, seed=3))
        assert torch.autograd.gradcheck(ours, inputs)
        assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("beta", [1e-50, 1e-320])
def test_a_beta_that_vanishes_in_the_type_gives_the_derivatives_of_l1(client: LossClient, beta: float) -> None:
    x = torch.tensor([0.5, -1.0, 0.0], requires_grad=True)
    loss = served.SmoothL1Loss(beta=beta, reduction="sum", client=client)(x, torch.zeros(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.tolist() == [1.0, -1.0, 0.0]
    assert torch.autograd.grad(gradient.sum(), x)[0].tolist()[:2] == [0.0, 0.0]


def test_second_derivatives_at_the_kinks_are_zero_as_torchs(client: LossClient) -> None:
    for name, options in MODULES:
        outcomes = []
        for module in both(client, name, reduction="sum", **options):
            x = torch.tensor([0.0, 0.7, -0.7, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(module(x, torch.zeros_like(x)), x, create_graph=True)
            outcomes.append(torch.autograd.grad(gradient.sum(), x)[0])
        assert torch.equal(*outcomes)


def test_a_gradient_penalty_trains_as_with_torch(client: LossClient) -> None:
    # The usual form: backward(create_graph=True) with a grad_output that has no graph. A gradient cut from its graph
    # would pass unnoticed, and give another result.
    outcomes = []
    for module in both(client, "SmoothL1Loss"):
        weight = torch.tensor([0.5, -0.25, 2.0], requires_grad=True)
        x = torch.tensor([1.0, 2.0, 0.1], requires_grad=True)
        loss = module(weight * x, torch.zeros(3))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.backward(loss + gradient.pow(2).sum())
        outcomes.append(weight.grad)
    torch.testing.assert_close(*outcomes)
    assert outcomes[0] is not None
    assert outcomes[0].abs().sum() > 0


def test_gradients_are_the_same_bits_with_and_without_create_graph(client: LossClient) -> None:
    for dtype in TOLERANCES:
        x, y = tensors(((7,), (7,)), dtype, dtype)
        for reduction in REDUCTIONS:
            loss = served.SmoothL1Loss(reduction=reduction, beta=0.3, client=client)(x, y)
            grad_output = torch.full_like(loss, 1.7)
            plain = torch.autograd.grad(loss, (x, y), grad_output, retain_graph=True)
            linked = torch.autograd.grad(loss, (x, y), grad_output, create_graph=True)
            for one, other in zip(plain, linked, strict=True):
                assert torch.equal(one, other)
                assert other.requires_grad
