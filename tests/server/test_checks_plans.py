"""What a checked request becomes, and that requests which were checked before change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.tensor_pb2 import DataType as WireType
from lossgrad_api.v1.tensor_pb2 import Tensor
from lossgrad_server.errors import RequestError
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.transport.checks import RequestChecker
from tests.server import wire_messages as wire
from tests.server.requests import L1, request, tensor, zeros

LIMIT = 1 << 20
FLOAT32, INT32 = WireType.DATA_TYPE_FLOAT32, WireType.DATA_TYPE_INT32
X = zeros(2)


def check(message: pb.ComputeLossRequest) -> JobPlan:
    plan, _, _ = RequestChecker(LIMIT).check(message.SerializeToString())
    return plan


def smooth_l1(beta: float) -> pb.LossSpec:
    return pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=beta))


def test_a_request_at_every_limit_is_taken() -> None:
    assert len(check(request(X, X, *[L1] * 16)).specs) == 16
    deep = Tensor(data_type=FLOAT32, shape=[1] * 16, data=bytes(4))
    assert check(request(deep, deep)).result_shape == (1,) * 16
    *_, key = RequestChecker(LIMIT).check(request(X, X, idempotency_key="€" * 42 + "kk").SerializeToString())
    assert len(key.encode()) == 128
    empty = Tensor(data_type=FLOAT32, shape=[0, 1 << 47])
    assert check(request(empty, empty)).element_count == 0


# ---- What a good request becomes ----


def test_unset_parameters_are_torchs_defaults() -> None:
    plan = check(
        request(
            X,
            X,
            pb.LossSpec(smooth_l1=pb.SmoothL1Loss()),
            pb.LossSpec(huber=pb.HuberLoss()),
            pb.LossSpec(mse=pb.MseLoss()),
        )
    )
    assert plan.specs == (
        SpecPlan(LossKind.SMOOTH_L1, 1.0, Reduction.MEAN),
        SpecPlan(LossKind.HUBER, 1.0, Reduction.MEAN),
        SpecPlan(LossKind.MSE, 0.0, Reduction.MEAN),
    )


def test_every_field_of_a_request_is_in_its_plan() -> None:
    message = pb.ComputeLossRequest(
        specs=[
            pb.LossSpec(
                smooth_l1=pb.SmoothL1Loss(beta=0.25),
                reduction=pb.REDUCTION_SAMPLE_MEAN,
                include_gradient=True,
                denominator=7.0,
                gradient_scale=-3.0,
            ),
            pb.LossSpec(huber=pb.HuberLoss(delta=math.inf), reduction=pb.REDUCTION_NONE),
        ],
        allow_broadcast=True,
        input=tensor([[1, 2, 3], [4, 5, 6]], "float16"),
        target=tensor([1, 2, 3], "float64"),
        weight=tensor([[1], [2]], "float32"),
        mask=tensor([[1, 0, 1]], "bool"),
        idempotency_key="mine",
    )
    plan, item, key = RequestChecker(LIMIT).check(message.SerializeToString())
    assert plan == JobPlan(
        specs=(
            SpecPlan(LossKind.SMOOTH_L1, 0.25, Reduction.SAMPLE_MEAN, True, 7.0, -3.0),
            SpecPlan(LossKind.HUBER, math.inf, Reduction.NONE),
        ),
        input=TensorPlan(DataType.FLOAT16, (2, 3)),
        target=TensorPlan(DataType.FLOAT64, (3,)),
        weight=TensorPlan(DataType.FLOAT32, (2, 1)),
        mask=TensorPlan(DataType.BOOL, (1, 3)),
    )
    assert item.header == plan.header
    assert [bytes(operand) for operand in item.operands] == [
        getattr(message, name).data for name in ("input", "target", "weight", "mask")
    ]
    assert key == "mine"


@pytest.mark.parametrize(("weight", "mask"), [(None, [1, 0]), ([1.0, 2.0], None), (None, None)])
def test_only_the_operands_that_are_there_go_to_the_worker(weight: list[float] | None, mask: list[int] | None) -> None:
    message = request([1, 2], [3, 4], weight=weight, mask=mask)
    plan, item, _ = RequestChecker(LIMIT).check(message.SerializeToString())
    assert [len(operand) for operand in item.operands] == [operand.byte_count for operand in plan.operands]
    assert (plan.weight is None, plan.mask is None) == (weight is None, mask is None)


@pytest.mark.parametrize("number", range(1, 11))
def test_every_data_type_is_taken_beside_a_floating_point_one(number: int) -> None:
    data_type = DataType(number)
    other = Tensor.FromString(
        wire.key(1, 0)
        + bytes((number,))
        + wire.delimited(2, b"\2" + bytes(7))
        + wire.delimited(3, bytes(2 * data_type.itemsize))
    )
    assert check(request(other, X, L1)).input.data_type == data_type
    assert check(request(X, other)).target.data_type == data_type


# ---- Remembered plans ----

VALUES = st.sampled_from([bytes(8), b"\x00\x00\x80?" * 2, b"\x12\x08\x1a\x08\x08\x01\x32\x01"])


def variants() -> st.SearchStrategy[bytes]:
    """Give requests of which many have equal lengths, and headers or elements that differ in a byte or two."""

    def build(
        beta: float, type_number: int, shape: tuple[int, ...], key: str, order: bool, first: bytes, second: bytes
    ) -> bytes:
        extents = b"".join(extent.to_bytes(8, "little") for extent in shape)

        def of(data: bytes) -> bytes:
            return bytes((8, type_number)) + wire.delimited(2, extents) + wire.delimited(3, data)

        head = wire.delimited(1, smooth_l1(beta).SerializeToString()) + wire.delimited(3, key.encode())
        tensors = wire.delimited(7, of(first)) + wire.delimited(6, of(second))
        return tensors + head if order else head + tensors

    return st.builds(
        build,
        st.sampled_from([0.5, 1.5, -0.5]),
        st.sampled_from([FLOAT32, INT32, WireType.DATA_TYPE_INT16]),
        st.sampled_from([(2, 1), (1, 2), (2, 2), (4, 1)]),
        st.sampled_from(["", "ab"]),
        st.booleans(),
        VALUES,
        VALUES,
    )


def outcome(checker: RequestChecker, data: bytes) -> object:
    try:
        plan, item, key = checker.check(data)
    except RequestError as error:
        return error.reason, error.field, error.message, error.request_id
    return plan, item.header, [bytes(operand) for operand in item.operands], key


@given(st.lists(variants(), max_size=12))
def test_what_was_checked_before_changes_nothing(messages: list[bytes]) -> None:
    seasoned = RequestChecker(LIMIT)
    for data in messages:
        assert outcome(seasoned, data) == outcome(RequestChecker(LIMIT), data)


@given(st.lists(wire.request_bytes, max_size=5), st.data())
def test_what_was_checked_before_changes_nothing_for_any_legal_form(
    messages: list[bytes], choice: st.DataObject
) -> None:
    good = request([1.0, 2.0], [3.0, 4.0]).SerializeToString()
    seasoned = RequestChecker(LIMIT)
    for data in [good, *(good + message for message in messages), *messages]:
        at = choice.draw(st.integers(0, len(data)))
        changed = data[:at] + choice.draw(st.binary(max_size=2)) + data[at + 2 :]
        for one in (data, changed, data):
            assert outcome(seasoned, one) == outcome(RequestChecker(LIMIT), one)


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message.specs[0].smooth_l1.__setattr__("beta", 2.0),
        lambda message: message.input.__setattr__("data_type", WireType.DATA_TYPE_INT32),
        lambda message: (
            message.input.shape.__setitem__(slice(None), [2, 1]),
            message.target.shape.__setitem__(slice(None), [2, 1]),
        ),
        lambda message: message.specs[0].__setattr__("reduction", pb.REDUCTION_SUM),
    ],
    ids=["beta", "type", "shape", "reduction"],
)
def test_a_request_of_equal_length_and_another_header_is_checked_anew(
    change: Callable[[pb.ComputeLossRequest], object],
) -> None:
    message = request(zeros(1, 2), zeros(1, 2), spec_with_mean())
    checker = RequestChecker(LIMIT)
    first = checker.check(message.SerializeToString())[0]
    length = message.ByteSize()
    change(message)
    assert message.ByteSize() == length
    second = checker.check(message.SerializeToString())[0]
    assert second != first
    assert second == check(message)


def spec_with_mean() -> pb.LossSpec:
    return pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=1.0), reduction=pb.REDUCTION_MEAN)


def test_a_remembered_request_gives_views_of_its_own_bytes_where_it_stands() -> None:
    checker = RequestChecker(LIMIT)
    checker.check(request([1.0, 2.0], [3.0, 4.0], weight=[5.0, 6.0], mask=[1, 0]).SerializeToString())
    other = request([7.0, 8.0], [9.0, 10.0], weight=[11.0, 12.0], mask=[0, 1])
    data = other.SerializeToString()
    message = b"before" + data + b"behind"
    _, item, _ = checker.check(message, 6, 6 + len(data))
    assert [bytes(operand) for operand in item.operands] == [
        getattr(other, name).data for name in ("input", "target", "weight", "mask")
    ]
    assert all(isinstance(operand, memoryview) and operand.obj is message for operand in item.operands)
