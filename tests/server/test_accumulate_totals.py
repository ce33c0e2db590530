"""Totals of slices: to the bit those of one request over everything, in any order and any sharding; right, too."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossgrad_api.accumulation import Accumulation, LossTotal
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.accumulate_calls import CHUNK, MSE, SMOOTH_L1, SUM, accumulate, config, numbers, parts_of, slice_of
from tests.server.calling import stub_on
from tests.server.requests import array, request
from tests.server.serving import PATIENCE_SECONDS, RunningServer

LENGTH = 9 * CHUNK + 123
ENGINES = ["fused", "plain"]


@pytest.fixture(scope="module", params=ENGINES)
def stub(request: pytest.FixtureRequest) -> Iterator[LossServiceStub]:
    """Return a stub to a server with each engine."""
    with RunningServer(engine=request.param) as running, grpc.insecure_channel(running.address) as channel:
        yield stub_on(channel)


def whole(stub: LossServiceStub, *arguments: object, **more: object) -> list[pb.LossResult]:
    """Return what one request over everything answers."""
    response = stub.ComputeLoss(request(*arguments, **more), timeout=PATIENCE_SECONDS)  # type: ignore[arg-type]
    return list(response.results)


def assert_is_total_of(total: LossTotal, result: pb.LossResult, *, is_mean: bool) -> None:
    """Check a total against one request's result, to the bit."""
    assert repr(total.mean if is_mean else total.sum) == repr(result.scalar)
    assert repr(total.weight_sum) == repr(result.weight_sum)
    assert total.element_count == result.element_count
    assert total.nonfinite_count == result.nonfinite_count


# ---- The same bits as one request ----


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("operands", ["plain", "weight", "mask", "weight and mask"])
def test_any_partition_at_whole_chunks_in_any_order_and_sharding_has_the_bits_of_one_request(
    stub: LossServiceStub, dtype: str, operands: str
) -> None:
    x, y = numbers(LENGTH, 1, dtype), numbers(LENGTH, 2, dtype)
    weight = np.abs(numbers(LENGTH, 3, dtype)) if "weight" in operands else None
    mask = np.random.default_rng(4).random(LENGTH) < 0.7 if "mask" in operands else None
    specs = (SMOOTH_L1, SUM)
    expected = whole(stub, x, y, *specs, dtype=dtype, weight=weight, mask=mask)
    states: set[bytes] = set()

    @settings(max_examples=10)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        parts = data.draw(st.permutations(parts_of(LENGTH, data.draw(st.sets(st.integers(1, 9))))))
        slices = [
            slice_of(
                sequence,
                x[part],
                y[part],
                dtype=dtype,
                weight=None if weight is None else weight[part],
                mask=None if mask is None else mask[part],
            )
            for sequence, part in enumerate(parts, 1)
        ]
        cut = data.draw(st.integers(0, len(slices)))
        shards = [accumulate(stub, config(*specs), shard).state for shard in (slices[:cut], slices[cut:])]
        merged = Accumulation.merge(data.draw(st.permutations(shards)))
        states.add(merged.to_bytes())
        for total, result, is_mean in zip(merged.overall, expected, (True, False), strict=True):
            assert_is_total_of(total, result, is_mean=is_mean)

    check()
    assert len(states) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_slices_are_those_of_one_request(stub: LossServiceStub, dtype: str) -> None:
    x, y = numbers(LENGTH, 5, dtype), numbers(LENGTH, 6, dtype)
    specs = [
        pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5), include_gradient=True, gradient_scale=3.0),
        pb.LossSpec(huber=pb.HuberLoss(), include_gradient=True, reduction=pb.REDUCTION_SUM),
        pb.LossSpec(mse=pb.MseLoss(), include_gradient=True, denominator=77.0),
        pb.LossSpec(l1=pb.L1Loss(), include_gradient=True, reduction=pb.REDUCTION_NONE),
    ]
    parts = parts_of(LENGTH, (1, 4, 5))
    slices = [slice_of(number, x[part], y[part], dtype=dtype) for number, part in enumerate(parts, 1)]
    answers = accumulate(stub, config(*specs, element_count=LENGTH), slices)
    expected = whole(stub, x, y, *specs, dtype=dtype)
    for index, result in enumerate(expected):
        gradients = [one.results[index].input_gradient.data for one in answers.results]
        assert b"".join(gradients) == result.input_gradient.data
    assert b"".join(one.results[3].tensor.data for one in answers.results) == expected[3].tensor.data
    # The scalar of a mean with its gradient is the slice's share: the shares add up to the whole.
    for index in (0, 2):
        shares = [one.results[index].scalar for one in answers.results]
        assert math.isclose(math.fsum(shares), expected[index].scalar, rel_tol=1e-14)
    overall = answers.state.overall
    assert overall[0].mean == expected[0].scalar
    assert overall[1].sum == expected[1].scalar
    assert overall[2].mean_over(77.0) == expected[2].scalar


def test_without_its_gradient_the_scalar_of_a_mean_is_the_slices_own(stub: LossServiceStub) -> None:
    x, y = numbers(2 * CHUNK, 7), numbers(2 * CHUNK, 8)
    parts = parts_of(x.size, (1,))
    slices = [slice_of(number, x[part], y[part]) for number, part in enumerate(parts, 1)]
    answers = accumulate(stub, config(MSE, element_count=x.size), slices)
    for one, part in zip(answers.results, parts, strict=True):
        (expected,) = whole(stub, x[part], y[part], MSE)
        assert one.results[0].scalar == expected.scalar


def test_sixteen_losses_over_several_groups(stub: LossServiceStub) -> None:
    specs = [
        pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.1 * index), reduction=pb.REDUCTION_SUM) for index in range(1, 15)
    ]
    specs += [MSE, pb.LossSpec(huber=pb.HuberLoss(delta=3.0))]
    x, y = numbers(12 * CHUNK, 9), numbers(12 * CHUNK, 10)
    parts = parts_of(x.size, range(12))
    groups = ["b", "a", "", "ü", "a", "b", "b", "", "ü", "a", "a", "a"]
    slices = [
        slice_of(number, x[part], y[part], group=group)
        for number, (part, group) in enumerate(zip(parts, groups, strict=True), 1)
    ]
    state = accumulate(stub, config(*specs), slices).state
    assert list(state.groups) == ["", "a", "b", "ü"]
    for group, totals in state.groups.items():
        own = [part for part, name in zip(parts, groups, strict=True) if name == group]
        expected = whole(
            stub, np.concatenate([x[part] for part in own]), np.concatenate([y[part] for part in own]), *specs
        )
        for index, (total, result) in enumerate(zip(totals.totals, expected, strict=True)):
            assert_is_total_of(total, result, is_mean=index >= 14)
    for index, (total, result) in enumerate(zip(state.overall, whole(stub, x, y, *specs), strict=True)):
        assert_is_total_of(total, result, is_mean=index >= 14)


# ---- Right ----


def test_totals_are_right_to_float64(stub: LossServiceStub) -> None:
    x, y = numbers(LENGTH, 11), numbers(LENGTH, 12)
    weight = np.abs(numbers(LENGTH, 13))
    mask = np.arange(LENGTH) % 3 > 0
    state = accumulate(
        stub,
        config(SUM),
        [
            slice_of(number, x[part], y[part], weight=weight[part], mask=mask[part])
            for number, part in enumerate(parts_of(LENGTH, (2, 3, 7)), 1)
        ],
    ).state
    losses = (np.abs((x - y).astype("float64")) * weight)[mask]  # differences are formed in float32
    (total,) = state.overall
    assert math.isclose(total.sum, math.fsum(losses), rel_tol=1e-14)
    assert math.isclose(total.weight_sum, math.fsum(weight[mask].astype("float64")), rel_tol=1e-14)
    assert math.isclose(total.min, losses.min(), rel_tol=1e-6)
    assert math.isclose(total.max, losses.max(), rel_tol=1e-6)
    assert (total.element_count, state.element_count) == (mask.sum(), LENGTH)


def test_nan_and_infinity_are_counted_and_the_extremes_leave_nan_out(stub: LossServiceStub) -> None:
    x = [1.0, math.nan, 3.0, math.inf]
    state = accumulate(
        stub,
        config(SUM),
        slice_of(1, x[:2], [0.0, 0.0], group="nan"),
        slice_of(2, x[2:], [0.0, 0.0], group="inf"),
        slice_of(3, [2.0, math.nan], [0.0, 0.0], group="masked", mask=[True, False]),
    ).state
    by_group = {name: group.totals[0] for name, group in state.groups.items()}
    assert [by_group[name].nonfinite_count for name in ("nan", "inf", "masked")] == [1, 1, 0]
    assert math.isnan(by_group["nan"].sum)
    assert (by_group["nan"].min, by_group["nan"].max) == (1.0, 1.0)
    assert (by_group["inf"].sum, by_group["inf"].min, by_group["inf"].max) == (math.inf, 3.0, math.inf)
    assert (by_group["masked"].sum, by_group["masked"].max, by_group["masked"].element_count) == (2.0, 2.0, 1)
    assert math.isnan(state.overall[0].sum)


def test_nothing_and_empty_slices_add_up_to_nothing(stub: LossServiceStub) -> None:
    state = accumulate(stub, config(element_count=0)).state
    assert (len(state.groups), state.element_count, state.last_sequence) == (0, 0, 0)
    with_gradient = pb.LossSpec(mse=pb.MseLoss(), include_gradient=True)
    answers = accumulate(stub, config(with_gradient, element_count=0), slice_of(4, np.zeros((0, 3)), np.zeros((0, 3))))
    (total,) = answers.state.overall
    assert (total.sum, total.element_count, total.min, total.max) == (0.0, 0, math.inf, -math.inf)
    assert math.isnan(total.mean)
    assert answers.results[0].results[0].input_gradient.shape == [0, 3]


def test_shapes_broadcast_where_the_config_says_so(stub: LossServiceStub) -> None:
    x = numbers(5 * 4, 14).reshape(5, 4)
    per_column = np.array([1.0, 2.0, 0.5, 1.0], "float32")
    target = numbers(4, 15)
    answers = accumulate(
        stub,
        config(SUM, allow_broadcast=True, element_count=20),
        slice_of(1, x[:2], target, weight=per_column),
        slice_of(2, x[2:], target, weight=per_column),
    )
    losses = np.abs((x - target).astype("float64")) * per_column
    assert math.isclose(answers.state.overall[0].sum, losses.sum(), rel_tol=1e-12)
    refused = accumulate(stub, config(SUM), slice_of(1, x, target))
    assert refused.failure is not None
    assert refused.failure.info.reason == "SHAPE_MISMATCH"


def test_integer_targets_and_mixed_types_are_promoted_as_in_one_request(stub: LossServiceStub) -> None:
    labels = np.arange(CHUNK) % 7
    scores = numbers(CHUNK, 16)
    message = slice_of(1, scores, request([0], [0]).target)
    message.slice.target.CopyFrom(request(labels, labels, dtype="int64").target)
    (total,) = accumulate(stub, config(MSE), message).state.overall
    expected = np.square((scores - labels.astype("float32")).astype("float64")).mean()
    assert math.isclose(total.mean, expected, rel_tol=1e-12)


def test_gradients_come_in_the_shape_and_type_of_their_tensors(stub: LossServiceStub) -> None:
    x = numbers(6, 17, "float16").reshape(2, 3)
    answers = accumulate(
        stub,
        config(pb.LossSpec(l1=pb.L1Loss(), include_gradient=True, reduction=pb.REDUCTION_SUM)),
        slice_of(1, x, np.zeros((2, 3)), dtype="float16"),
    )
    gradient = array(answers.results[0].results[0].input_gradient)
    assert (gradient.shape, gradient.dtype) == ((2, 3), np.dtype("float16"))
    assert (gradient == np.sign(x)).all()


def test_sums_that_are_hard_to_round_have_the_engines_bits(stub: LossServiceStub) -> None:
    """What is left of the exact sum rounds to half a unit of its nearest float64: a tie."""
    x = np.zeros(3 * CHUNK)
    x[::CHUNK] = 1.0
    weight = np.ones(x.size)
    weight[::CHUNK] = 1.0 + 2.0**-52, 2.0**-53, -(2.0**-200)
    specs = (SUM, pb.LossSpec(l1=pb.L1Loss(), denominator=3.0))
    operands = {"dtype": "float64", "weight": weight}
    expected = whole(stub, x, np.zeros(x.size), *specs, **operands)
    slices = [
        slice_of(number, x[part], np.zeros(CHUNK), dtype="float64", weight=weight[part])
        for number, part in enumerate(parts_of(x.size, (1, 2)), 1)
    ]
    sum_total, mean_total = accumulate(stub, config(*specs), slices).state.overall
    assert sum_total.exact_sum.partials == (1.0 + 2.0**-52, 2.0**-53, -(2.0**-200))
    assert (sum_total.sum, mean_total.mean_over(3.0)) == (expected[0].scalar, expected[1].scalar)
