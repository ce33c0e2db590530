"""lossgrad.nn beside torch.nn: the same values and gradients, types, looks; one round trip."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import lossgrad
from lossgrad import AsyncLossClient, LossClient
from lossgrad import nn as served
from tests.client.modules import MODULES, REDUCTIONS, SHAPES, TOLERANCES, both, close, tensors
from tests.client.peer import Peer

X, Y = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "options"), MODULES)
def test_values_and_gradients_are_torchs(
    client: LossClient, name: str, options: dict[str, float], reduction: str, dtype: torch.dtype
) -> None:
    ours, theirs = both(client, name, reduction=reduction, **options)
    for shapes in SHAPES:
        x, y = tensors(shapes, dtype, dtype)
        loss, expected = ours(x, y), theirs(x, y)
        assert loss.dtype == expected.dtype
        close(loss, expected, dtype)
        grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        gradients = torch.autograd.grad(loss, (x, y), grad_output)
        for gradient, own, wanted in zip(
            gradients, (x, y), torch.autograd.grad(expected, (x, y), grad_output), strict=True
        ):
            assert gradient.shape == own.shape
            assert gradient.dtype == dtype
            close(gradient, wanted, dtype)


def test_one_round_trip_forward_and_none_backward(client: LossClient, peer: Peer) -> None:
    x, y = tensors(((4,), (4,)), torch.float32, torch.float32)
    loss = served.MSELoss(client=client)(x, y)
    assert len(peer.requests) == 1
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.backward([gradient.sum(), loss])
    assert len(peer.requests) == 1


def test_no_gradient_travels_where_none_is_needed(client: LossClient, peer: Peer) -> None:
    criterion = served.SmoothL1Loss(client=client)
    x, y = tensors(((4,), (4,)), torch.float32, torch.float32)
    assert not criterion(x.detach(), y.detach()).requires_grad
    with torch.no_grad():
        assert not criterion(x, y).requires_grad
    with torch.inference_mode():
        criterion(x, y)
    assert [request.specs[0].include_gradient for request in peer.requests] == [False] * 3
    criterion(x, y)
    assert peer.requests[-1].specs[0].include_gradient


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_either_operand_alone_may_need_a_gradient(client: LossClient, needs: tuple[bool, bool]) -> None:
    outcomes = []
    for module in both(client, "HuberLoss", delta=0.3):
        pair = tensors(((6,), (6,)), torch.float32, torch.float32)
        for tensor, need in zip(pair, needs, strict=True):
            tensor.requires_grad_(need)
        module(*pair).backward()
        outcomes.append([tensor.grad for tensor in pair])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_tensor_may_be_both_operands(client: LossClient) -> None:
    x = torch.ones(3, requires_grad=True)
    served.MSELoss(client=client)(x * 2, x).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2 / 3))


def test_backward_may_run_again_and_sees_changes_in_place(client: LossClient) -> None:
    x, y = tensors(((3,), (3,)), torch.float32, torch.float32)
    wide = x * 1
    loss = served.L1Loss(client=client)(wide, y)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, x, retain_graph=True))
    wide.data.add_(1)
    with torch.no_grad():
        wide.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MIXED = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.int64),
    (torch.float32, torch.bool),
    (torch.bfloat16, torch.uint8),
    (torch.int32, torch.float32),
]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("first", "second"), MIXED, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["SmoothL1Loss", "HuberLoss", "MSELoss"])
def test_mixed_types_promote_as_in_torch_and_gradients_keep_their_own(
    client: LossClient, name: str, reduction: str, first: torch.dtype, second: torch.dtype
) -> None:
    result = torch.promote_types(first, second)
    narrowest = max((first, second), key=lambda dtype: TOLERANCES.get(dtype, 0))
    for shapes in (((5,), (5,)), ((2, 3), (3,))):
        x, y = tensors(shapes, first, second)
        ours, theirs = both(client, name, reduction=reduction)
        loss = ours(x, y)
        assert loss.dtype == result
        # torch's Huber fails in the backward pass of mixed types, so the reference is one type throughout.
        wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x, y)]
        expected = theirs(*wide)
        close(loss.double(), expected, result)
        needing = [(own, other) for own, other in zip((x, y), wide, strict=True) if own.requires_grad]
        grad_output = torch.full_like(loss, 0.75)
        for create_graph in (False, True):
            gradients = torch.autograd.grad(
                loss, [own for own, _ in needing], grad_output, create_graph=create_graph, retain_graph=True
            )
            wanted = torch.autograd.grad(
                expected, [other for _, other in needing], grad_output.double(), retain_graph=True
            )
            for gradient, want, (own, _) in zip(gradients, wanted, needing, strict=True):
                assert gradient.dtype == own.dtype
                close(gradient.double(), want, narrowest)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["SmoothL1Loss", "HuberLoss", "L1Loss", "MSELoss"])
def test_autocast_gives_float32_losses_and_gradients_in_the_inputs_type(
    client: LossClient, name: str, reduction: str, half: torch.dtype
) -> None:
    outcomes = []
    for module in both(client, name, reduction=reduction):
        x, y = tensors(((5,), (5,)), half, torch.float32)
        with torch.autocast("cpu", dtype=half):
            losses = [module(x, y), module(x, y.to(half)), module(x.detach(), y.detach())]
        for loss in losses:
            assert loss.dtype == torch.float32
        outcomes.append((*losses, *torch.autograd.grad(losses[0].sum() + losses[1].sum(), (x, y))))
        assert outcomes[-1][-2].dtype == half
        assert outcomes[-1][-1].dtype == torch.float32
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_half_precision_does_not_underflow_under_a_scaled_loss(client: LossClient) -> None:
    # 1 / N is 0 in float16 beyond 3.3e7, and nearly so here; grad_output makes up for it, if it comes in first.
    count = 200_000
    x = torch.linspace(-3, 3, count).half().requires_grad_()
    for name in ("SmoothL1Loss", "HuberLoss", "MSELoss"):
        ours, theirs = both(client, name)
        loss = ours(x, torch.zeros_like(x))
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(32768.0).half())
        wide = x.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad(theirs(wide, torch.zeros_like(wide)), wide, torch.tensor(32768.0).double())
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-3, atol=1e-7)


@pytest.mark.usefixtures("quiet")
def test_half_precision_does_not_overflow_where_broadcasting_adds_up(client: LossClient) -> None:
    x = torch.ones(100_000, dtype=torch.float16)
    bias = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    served.SmoothL1Loss(client=client)(x, bias).backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.tensor([-1.0], dtype=torch.float16))


def test_modules_look_like_torchs(client: LossClient) -> None:
    for name, options in MODULES:
        ours, theirs = both(client, name, **options)
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, type(theirs))
        assert ours.state_dict() == {}
        assert {key for key in vars(ours) if not key.startswith("_")} == {
            key for key in vars(theirs) if not key.startswith("_")
        }
        assert list(ours.parameters()) == []


def test_a_copy_shares_the_client_and_a_pickle_leaves_it_out(client: LossClient) -> None:
    model = torch.nn.ModuleDict({"loss": served.SmoothL1Loss(beta=0.5, client=client)})
    copied = copy.deepcopy(model)["loss"]
    assert isinstance(copied, served.SmoothL1Loss)
    assert copied is not model["loss"]
    assert copied._client is client
    assert copied(X, Y) == model["loss"](X, Y)
    loaded = pickle.loads(pickle.dumps(model["loss"]))  # noqa: S301
    assert loaded.beta == 0.5
    assert loaded._client is None


def test_without_a_client_the_process_has_one_from_the_environment(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_default_client", None)
    monkeypatch.setenv("LOSSGRAD_TARGET", target)
    assert served.L1Loss()(X, Y) == 1.0
    assert served.default_client() is served.default_client()
    assert target in repr(served.default_client())
    served.default_client().close()


def test_a_client_that_must_be_awaited_is_refused(target: str) -> None:
    with pytest.raises(TypeError, match=r"client is a AsyncLossClient; .* give a lossgrad.LossClient"):
        served.MSELoss(client=AsyncLossClient(target))  # type: ignore[arg-type]


def test_functional_transforms_work_or_say_that_they_do_not(client: LossClient) -> None:
    ours, theirs = both(client, "SmoothL1Loss")
    x, y = torch.tensor([0.2, 3.0, -0.5]), torch.zeros(3)

    def penalty(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.func.grad(lambda x: module(x, y))(x).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(lambda x: ours(x, y))(x), torch.func.grad(lambda x: theirs(x, y))(x))
    torch.testing.assert_close(torch.func.grad(penalty(ours))(x), torch.func.grad(penalty(theirs))(x))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(lambda x: ours(x, y[0])))(x)


def test_errors_of_the_call_come_through(client: LossClient, peer: Peer) -> None:
    with LossClient("127.0.0.1:1", retries=0) as nowhere, pytest.raises(lossgrad.Unavailable):
        served.L1Loss(client=nowhere)(X, Y)


def test_a_model_learns_from_served_gradients_alone(client: LossClient) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 3, generator=generator)
    truth = features @ torch.tensor([[1.0], [-2.0], [0.5]])
    weight = torch.zeros(3, 1, requires_grad=True)
    criterion = served.SmoothL1Loss(client=client)
    losses = []
    for _ in range(100):
        loss = criterion(features @ weight, truth)
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= gradient
        losses.append(loss.item())
    assert losses[-1] < 1e-3 < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_losses_and_gradients_stay_on_the_device(client: LossClient) -> None:
    x, y = torch.ones(3, device="cuda", requires_grad=True), torch.zeros(3, device="cuda")
    loss = served.SmoothL1Loss(client=client)(x, y)
    loss.backward()
    assert x.grad is not None
    assert loss.device == x.grad.device == x.device
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3))
