"""ComputeLoss with include_total: the exact total behind each loss, which the totals of its parts add up to."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from operator import add

import grpc
import numpy as np
import pytest

from lossgrad_api.loss_totals import LossTotal
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2 import Reduction
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.requests import L1, request

RANDOM = np.random.default_rng(5)
INPUT = (RANDOM.normal(size=20_000) * 10.0 ** RANDOM.integers(-3, 3, 20_000)).astype("float32")
TARGET = RANDOM.normal(size=20_000).astype("float32")
WEIGHT = RANDOM.random(20_000).astype("float32")
MASK = RANDOM.random(20_000) < 0.8
SUM = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5), reduction=Reduction.REDUCTION_SUM, include_total=True)
MEAN = pb.LossSpec(huber=pb.HuberLoss(delta=2.0), include_gradient=True, include_total=True)
NONE = pb.LossSpec(mse=pb.MseLoss(), reduction=Reduction.REDUCTION_NONE, include_total=True)
PLAIN = pb.LossSpec(l1=pb.L1Loss(), include_total=True)


def totals_of(stub: LossServiceStub, part: slice) -> tuple[list[LossTotal], pb.ComputeLossResponse]:
    response = stub.ComputeLoss(
        request(INPUT[part], TARGET[part], SUM, MEAN, NONE, weight=WEIGHT[part], mask=MASK[part])
    )
    return [LossTotal.from_message(result.total) for result in response.results], response


def test_a_total_holds_what_the_answer_says_and_the_least_and_the_most(stub: LossServiceStub) -> None:
    totals, response = totals_of(stub, slice(None))
    difference = np.abs(INPUT.astype(float) - TARGET)[MASK]
    losses = np.where(difference < 0.5, difference**2, difference - 0.25) * WEIGHT[MASK]  # 0.5 d^2 / 0.5
    assert totals[0].sum == response.results[0].scalar
    assert totals[1].mean == response.results[1].scalar
    assert totals[0].sum == pytest.approx(math.fsum(losses), rel=1e-6)
    assert totals[0].min == pytest.approx(losses.min(), rel=1e-5, abs=1e-12)
    assert totals[0].max == pytest.approx(losses.max(), rel=1e-5)
    for total, result in zip(totals, response.results, strict=True):
        assert total.element_count == result.element_count == MASK.sum()
        assert total.weight_sum == result.weight_sum == pytest.approx(math.fsum(WEIGHT[MASK]), rel=1e-12)
        assert total.nonfinite_count == 0


def test_the_totals_of_parts_cut_at_multiples_of_4096_add_up_to_the_bit(stub: LossServiceStub) -> None:
    whole, _ = totals_of(stub, slice(None))
    cuts = [0, 4096, 3 * 4096, 4 * 4096, len(INPUT)]
    parts = [totals_of(stub, slice(*each))[0] for each in itertools.pairwise(cuts)]
    for index, total in enumerate(whole):
        assert reduce(add, [part[index] for part in reversed(parts)]).to_message() == total.to_message()


def test_no_total_is_sent_unasked(stub: LossServiceStub) -> None:
    asked, other = stub.ComputeLoss(request(INPUT, TARGET, PLAIN, L1)).results
    assert asked.HasField("total")
    assert not other.HasField("total")
    assert not stub.ComputeLoss(request(INPUT, TARGET, L1)).results[0].HasField("total")


def test_nothing_but_masked_elements_has_an_empty_total(stub: LossServiceStub) -> None:
    (result,) = stub.ComputeLoss(request([1.0], [2.0], PLAIN, mask=[False])).results
    assert LossTotal.from_message(result.total) == LossTotal()


def test_not_a_number_and_infinity_are_told(stub: LossServiceStub) -> None:
    (result,) = stub.ComputeLoss(request([math.nan, math.inf, 3.0], [0.0] * 3, PLAIN)).results
    total = LossTotal.from_message(result.total)
    assert math.isnan(total.sum)
    assert (total.min, total.max, total.nonfinite_count) == (3.0, math.inf, 2)


def test_a_per_sample_reduction_has_no_total(stub: LossServiceStub) -> None:
    spec = pb.LossSpec(l1=pb.L1Loss(), reduction=Reduction.REDUCTION_SAMPLE_SUM, include_total=True)
    with pytest.raises(grpc.RpcError, match=r"specs\[1\].include_total") as caught:
        stub.ComputeLoss(request([1.0], [2.0], L1, spec))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
