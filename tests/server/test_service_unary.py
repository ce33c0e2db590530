"""ComputeLoss and GetServerInfo through the generated stubs: torch's values, and all that an answer carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import lossgrad_server
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2 import Reduction
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_api.v1.tensor_pb2 import DataType
from tests.server.calling import Connect, results_of, stub_on
from tests.server.requests import L1, SMOOTH_L1, array, request
from tests.server.serving import HeldWorker, StartServer, eventually

RANDOM = np.random.default_rng(1)
INPUT = RANDOM.normal(size=(7, 5)).astype("float32")
TARGET = RANDOM.normal(size=(7, 5)).astype("float32")

LOSSES: dict[str, tuple[pb.LossSpec, Callable[..., Any]]] = {
    "smooth_l1": (
        pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5)),
        lambda x, y, reduction: functional.smooth_l1_loss(x, y, beta=0.5, reduction=reduction),
    ),
    "huber": (
        pb.LossSpec(huber=pb.HuberLoss(delta=0.5)),
        lambda x, y, reduction: functional.huber_loss(x, y, delta=0.5, reduction=reduction),
    ),
    "l1": (pb.LossSpec(l1=pb.L1Loss()), lambda x, y, reduction: functional.l1_loss(x, y, reduction=reduction)),
    "mse": (pb.LossSpec(mse=pb.MseLoss()), lambda x, y, reduction: functional.mse_loss(x, y, reduction=reduction)),
}
REDUCTIONS = {"mean": Reduction.REDUCTION_MEAN, "sum": Reduction.REDUCTION_SUM, "none": Reduction.REDUCTION_NONE}


def with_reduction(spec: pb.LossSpec, reduction: str) -> pb.LossSpec:
    copy = pb.LossSpec()
    copy.CopyFrom(spec)
    copy.reduction = REDUCTIONS[reduction]
    copy.include_gradient = True
    return copy


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_and_gradients_are_torchs(stub: LossServiceStub, loss: str, reduction: str) -> None:
    spec, torch_loss = LOSSES[loss]
    (result,) = stub.ComputeLoss(request(INPUT, TARGET, with_reduction(spec, reduction))).results
    x = torch.tensor(INPUT, dtype=torch.float64, requires_grad=True)
    expected = torch_loss(x, torch.tensor(TARGET, dtype=torch.float64), reduction)
    expected.sum().backward()
    assert x.grad is not None
    if reduction == "none":
        np.testing.assert_allclose(array(result.tensor), expected.detach().numpy(), rtol=1e-6, atol=1e-7)
    else:
        assert result.scalar == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(array(result.input_gradient), x.grad.numpy(), rtol=1e-6, atol=1e-7)
    assert result.input_gradient.data_type == DataType.DATA_TYPE_FLOAT32
    assert not result.HasField("target_gradient")  # it is the negated input's
    assert (result.element_count, result.weight_sum, result.nonfinite_count) == (35, 35.0, 0)


def test_several_losses_are_answered_in_the_order_of_their_specs(stub: LossServiceStub) -> None:
    specs = [spec for spec, _ in LOSSES.values()]
    together = stub.ComputeLoss(request(INPUT, TARGET, *specs))
    alone = [stub.ComputeLoss(request(INPUT, TARGET, spec)).results[0] for spec in specs]
    assert list(together.results) == alone
    assert len({result.scalar for result in alone}) == 4


def test_weights_masks_denominator_and_scale_are_applied(stub: LossServiceStub) -> None:
    """By hand: losses 1, 2, 4 with weights 1, 3, 5, the last masked away; (1*1 + 3*2) / 7 = 1."""
    spec = pb.LossSpec(
        l1=pb.L1Loss(), reduction=Reduction.REDUCTION_MEAN, include_gradient=True, denominator=7.0, gradient_scale=14.0
    )
    message = request([1.0, 2.0, np.nan], [0.0, 0.0, 0.0], spec, weight=[1.0, 3.0, 5.0], mask=[1, 1, 0])
    (result,) = stub.ComputeLoss(message).results
    assert result.scalar == 1.0
    assert array(result.input_gradient).tolist() == [2.0, 6.0, 0.0]
    assert (result.element_count, result.weight_sum, result.nonfinite_count) == (2, 4.0, 0)


def test_the_targets_gradient_is_sent_where_it_is_not_the_negated_inputs(stub: LossServiceStub) -> None:
    spec = pb.LossSpec(mse=pb.MseLoss(), reduction=Reduction.REDUCTION_SUM, include_gradient=True)
    (result,) = stub.ComputeLoss(request([[1.0], [3.0]], [0.0, 1.0], spec, allow_broadcast=True)).results
    assert array(result.input_gradient).tolist() == [[2.0], [10.0]]  # 2 * (1 + 0), 2 * (3 + 2)
    assert array(result.target_gradient).tolist() == [-8.0, -4.0]  # -2 * (1 + 3), -2 * (0 + 2)


def test_losses_that_are_not_finite_are_counted(stub: LossServiceStub) -> None:
    (result,) = stub.ComputeLoss(request([np.inf, np.nan, 1.0], [0.0, 0.0, 0.0], L1)).results
    assert result.nonfinite_count == 2
    assert result.element_count == 3


def test_an_answer_carries_the_key_the_device_and_where_the_time_went(stub: LossServiceStub) -> None:
    response = stub.ComputeLoss(request(INPUT, TARGET, idempotency_key="evaluation 7"))
    assert response.idempotency_key == "evaluation 7"
    assert response.stats.device == "cpu"
    assert (response.stats.batch_request_count, response.stats.batch_element_count) == (1, 35)
    times = [getattr(response.stats, name) for name in ("queue_ns", "pack_ns", "compute_ns", "unpack_ns")]
    assert all(0 < time < 60e9 for time in times)


def test_a_large_answer_arrives_whole(stub: LossServiceStub) -> None:
    """Larger than what is joined in the event loop's thread."""
    values = np.arange(1 << 18, dtype="float32")
    (result,) = stub.ComputeLoss(request(values, np.zeros_like(values), SMOOTH_L1)).results
    expected = np.where(values == 0, 0.0, 1.0) / np.float32(values.size)
    np.testing.assert_array_equal(array(result.input_gradient), expected.astype("float32"))


def test_what_is_in_the_batch_changes_no_bit_of_an_answer(start_server: StartServer, connect: Connect) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    stub = stub_on(connect(running.address))
    rows = [request(RANDOM.normal(size=size), RANDOM.normal(size=size)) for size in range(1, 20)]
    alone = [results_of(stub.ComputeLoss(row)) for row in rows]
    for _ in rows:
        worker.wait_for_batch()
    worker.hold()
    first = stub.ComputeLoss.future(rows[0])
    worker.wait_for_batch()
    pending = [stub.ComputeLoss.future(row) for row in rows]
    eventually(lambda: running.batcher.waiting_requests == len(rows))
    worker.release()
    responses = [call.result(timeout=30) for call in pending]
    assert first.result(timeout=30).stats.batch_request_count == 1
    assert [response.stats.batch_request_count for response in responses] == [len(rows)] * len(rows)
    assert [results_of(response) for response in responses] == alone


def test_the_server_tells_what_it_is_and_its_limits(start_server: StartServer, connect: Connect) -> None:
    running = start_server(
        max_message_bytes=1 << 20, max_queued_requests=3, max_queued_bytes=4, max_stream_requests=5, max_groups=6
    )
    info = stub_on(connect(running.address)).GetServerInfo(pb.GetServerInfoRequest())
    assert info.server_version == lossgrad_server.__version__
    assert info.torch_version == torch.__version__
    assert info.device == "cpu"
    assert list(info.data_types) == list(range(1, 11))
    assert info.determinism
    assert info.limits == pb.ServerLimits(
        max_message_bytes=1 << 20, max_queued_requests=3, max_queued_bytes=4, max_stream_requests=5, max_groups=6
    )
