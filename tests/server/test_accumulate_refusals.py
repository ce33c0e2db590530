"""What an accumulation refuses: each with a reason, the field, both values and what to do; nothing of it is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from lossgrad_api import codec
from lossgrad_api.accumulation import Accumulation, LossFunction, LossTotal
from lossgrad_api.exact_sums import ExactSum
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.accumulate_calls import MSE, SMOOTH_L1, SUM, accumulate, config, slice_of
from tests.server.calling import Connect, Failure, failure_of, stub_on
from tests.server.requests import tensor
from tests.server.serving import PATIENCE_SECONDS, RunningServer, StartServer

INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8
GOOD = slice_of(1, [1.0, 2.0], [3.0, 5.0])
GRADIENT = pb.LossSpec(mse=pb.MseLoss(), include_gradient=True)
OF_MSE = LossFunction("mse")
TOTAL = LossTotal(ExactSum([3.0]), ExactSum([2.0]), 2, 0, 1.0, 2.0)


@pytest.fixture(scope="module")
def stub() -> Iterator[LossServiceStub]:
    with RunningServer() as running, grpc.insecure_channel(running.address) as channel:
        yield stub_on(channel)


def refusal(stub: LossServiceStub, *messages: pb.AccumulateLossRequest) -> Failure:
    answers = accumulate(stub, *messages)
    assert answers.failure is not None
    assert answers.total is None
    return answers.failure


def state(loss: LossFunction = OF_MSE, **more: int) -> pb.Accumulation:
    """Return a state of one group."""
    accumulation = Accumulation([loss])
    accumulation.add(1, "a", 2, [TOTAL])
    message = accumulation.to_message()
    for name, value in more.items():
        setattr(message, name, value)
    return message


def per_sample(reduction: pb.Reduction) -> pb.LossSpec:
    return pb.LossSpec(mse=pb.MseLoss(), reduction=reduction)


# ---- The config ----


@pytest.mark.parametrize(
    ("first", "reason", "field", "text"),
    [
        (GOOD, "UNEXPECTED_PART", "config", "the first message is slice 1; send the config first"),
        (pb.AccumulateLossRequest(), "UNEXPECTED_PART", "config", "the first message has no part"),
        (
            pb.AccumulateLossRequest(config=pb.AccumulationConfig()),
            "SPEC_COUNT",
            "config.specs",
            "has 0 specs; send 1 to 16",
        ),
        (config(*[MSE] * 17), "SPEC_COUNT", "config.specs", "has 17 specs"),
        (config(pb.LossSpec()), "UNKNOWN_LOSS", "config.specs[0].function", "names no loss"),
        (
            config(MSE, pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=-1.0))),
            "BAD_PARAMETER",
            "config.specs[1].smooth_l1.beta",
            "is -1.0; it must be at least 0",
        ),
        (
            config(MSE, per_sample(pb.REDUCTION_SAMPLE_MEAN)),
            "UNKNOWN_REDUCTION",
            "config.specs[1].reduction",
            "is sample_mean, which has no total; send none, mean or sum",
        ),
        (
            config(per_sample(pb.REDUCTION_SAMPLE_SUM)),
            "UNKNOWN_REDUCTION",
            "config.specs[0].reduction",
            "is sample_sum",
        ),
        (config(MSE, element_count=-1), "BAD_PARAMETER", "config.element_count", "is -1; it must be at least 0"),
        (
            config(MSE, snapshot_every_slices=-3),
            "BAD_PARAMETER",
            "config.snapshot_every_slices",
            "is -3; it must be at least 0",
        ),
        (config(SUM, GRADIENT), "MISSING_FIELD", "config.element_count", "specs[1] asks for the gradient of a mean"),
        (
            config(MSE, resume_from=state(LossFunction("l1"))),
            "BAD_STATE",
            "config.resume_from.specs",
            "is a state of l1, but config.specs are mse; go on with the losses that it was begun with",
        ),
        (
            config(SMOOTH_L1, resume_from=state(LossFunction("smooth_l1", 0.25))),
            "BAD_STATE",
            "config.resume_from.specs",
            "of smooth_l1(beta=0.25), but config.specs are smooth_l1(beta=0.5)",
        ),
        (
            config(MSE, MSE, resume_from=state()),
            "BAD_STATE",
            "config.resume_from.specs",
            "of mse, but config.specs are mse, mse",
        ),
        (
            config(MSE, resume_from=state(element_count=1)),
            "BAD_STATE",
            "config.resume_from.element_count",
            "is 1; it must be what its groups hold, 2, to",
        ),
        (
            config(MSE, resume_from=state(last_sequence=-1)),
            "BAD_STATE",
            "config.resume_from.last_sequence",
            "at least 0",
        ),
        (
            config(MSE, resume_from=pb.Accumulation(last_sequence=1)),
            "BAD_STATE",
            "config.resume_from.specs",
            "is of 0 losses; it must be 1 to 16; send a state as a server gave it",
        ),
    ],
)
def test_configs(stub: LossServiceStub, first: pb.AccumulateLossRequest, reason: str, field: str, text: str) -> None:
    error = refusal(stub, first, GOOD)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, reason)
    assert [path for path, _, _ in error.violations] == [field]
    assert text in error.message


def test_a_state_whose_sums_mix_numbers_and_nan_is_refused(stub: LossServiceStub) -> None:
    hostile = state()
    hostile.groups[0].states[0].partial_sums.append(math.nan)
    error = refusal(stub, config(MSE, resume_from=hostile))
    assert error.info.reason == "BAD_STATE"
    assert [path for path, _, _ in error.violations] == ["config.resume_from.groups[0].states[0].partial_sums"]


def test_an_empty_state_is_nothing_to_go_on_from(stub: LossServiceStub) -> None:
    assert accumulate(stub, config(MSE, resume_from=pb.Accumulation()), GOOD).state.element_count == 2


def test_a_stream_without_a_config_is_refused(stub: LossServiceStub) -> None:
    error = refusal(stub)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "UNEXPECTED_PART")
    assert "ended before its config" in error.message


def test_there_is_one_config(stub: LossServiceStub) -> None:
    answers = accumulate(stub, config(MSE), GOOD, config(MSE))
    assert answers.order == "rs"
    assert answers.failure is not None
    assert answers.failure.info.reason == "UNEXPECTED_PART"
    assert "is a second config; send one config, and then slices" in answers.failure.message
    assert "has no part" in refusal(stub, config(MSE), pb.AccumulateLossRequest()).message


# ---- Slices ----


@pytest.mark.parametrize(
    ("slices", "text"),
    [
        ([0], "slice 0 comes after slice 0; number the slices of a stream ascending, from 1"),
        ([-7], "slice -7 comes after slice 0"),
        ([5, 5], "slice 5 comes after slice 5"),
        ([5, 6, 4], "slice 4 comes after slice 6"),
    ],
)
def test_slices_are_numbered_ascending_from_1(stub: LossServiceStub, slices: list[int], text: str) -> None:
    answers = accumulate(stub, config(MSE), [slice_of(number, [1.0], [2.0]) for number in slices])
    assert len(answers.results) == len(slices) - 1
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (INVALID_ARGUMENT, "BAD_SEQUENCE")
    assert text in answers.failure.message
    assert [path for path, _, _ in answers.failure.violations] == ["slice.sequence"]


def test_numbers_ascend_among_slices_that_the_state_holds_too(stub: LossServiceStub) -> None:
    held = state(last_sequence=9)
    answers = accumulate(stub, config(MSE, resume_from=held), slice_of(4, [1.0], [2.0]), slice_of(3, [1.0], [2.0]))
    assert len(answers.results) == 1
    assert answers.failure is not None
    assert answers.failure.info.reason == "BAD_SEQUENCE"
    assert "s" not in answers.order  # nothing was counted, so there is nothing to tell


def without(name: str) -> pb.AccumulateLossRequest:
    message = slice_of(7, [1.0], [2.0])
    message.slice.ClearField(name)
    return message


def with_tensor(name: str, **fields: Any) -> pb.AccumulateLossRequest:
    message = slice_of(7, [1.0], [2.0])
    for field, value in fields.items():
        setattr(getattr(message.slice, name), field, value)
    return message


@pytest.mark.parametrize(
    ("message", "reason", "field", "text"),
    [
        (without("input"), "MISSING_FIELD", "slice.input", "has no input"),
        (without("target"), "MISSING_FIELD", "slice.target", "has no target"),
        (slice_of(7, [1.0], [2.0, 3.0]), "SHAPE_MISMATCH", "slice.target.shape", "target has shape [2], input [1]"),
        (slice_of(7, [1.0], [2.0], weight=[1.0, 1.0]), "SHAPE_MISMATCH", "slice.weight.shape", "weight has shape [2]"),
        (slice_of(7, [1.0], [2.0], mask=[[True]]), "SHAPE_MISMATCH", "slice.mask.shape", "mask has shape [1, 1]"),
        (with_tensor("input", data=b"123"), "DATA_LENGTH_MISMATCH", "slice.input.data", "has 3 bytes"),
        (with_tensor("target", data_type=99), "UNKNOWN_DATA_TYPE", "slice.target.data_type", "is 99"),
        (slice_of(7, [1], [2], dtype="int32"), "UNSUPPORTED_DATA_TYPE", "slice.input.data_type", "send at least one"),
        (
            slice_of(7, [1.0], [2.0], group="é" * 65),
            "BAD_PARAMETER",
            "slice.group",
            "has 130 bytes; at most 128 are taken",
        ),
    ],
)
def test_slices(stub: LossServiceStub, message: pb.AccumulateLossRequest, reason: str, field: str, text: str) -> None:
    answers = accumulate(stub, config(MSE), GOOD, message, slice_of(8, [1.0], [2.0]))
    assert answers.order == "rs"
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (INVALID_ARGUMENT, reason)
    assert [path for path, _, _ in answers.failure.violations] == [field]
    assert answers.failure.message.startswith("slice 7: ")
    assert text in answers.failure.message
    assert answers.last_snapshot.last_sequence == 1


@pytest.mark.parametrize("operand", ["weight", "mask"])
def test_the_gradient_of_a_mean_over_unknown_weights_is_refused(stub: LossServiceStub, operand: str) -> None:
    operands: dict[str, Any] = {operand: [1.0]}
    slice_ = slice_of(2, [1.0], [2.0], **operands)
    error = refusal(stub, config(SUM, GRADIENT, element_count=3), slice_)
    assert error.info.reason == "MISSING_FIELD"
    assert f"slice 2: it has a {operand}, but config.specs[1] asks for the gradient of a mean" in error.message
    with_denominator = pb.LossSpec(mse=pb.MseLoss(), include_gradient=True, denominator=4.0)
    answers = accumulate(stub, config(with_denominator), slice_)
    assert np.frombuffer(answers.results[0].results[0].input_gradient.data, "f4") == [-0.5]


def test_more_elements_than_were_announced_are_refused_at_once(stub: LossServiceStub) -> None:
    answers = accumulate(stub, config(MSE, element_count=3), GOOD, slice_of(2, [1.0, 2.0], [0.0, 0.0]))
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (INVALID_ARGUMENT, "ELEMENT_COUNT_MISMATCH")
    assert "slice 2: with it the slices hold 4 elements, but config.element_count is 3" in answers.failure.message
    masked = slice_of(2, [1.0], [0.0], mask=[False])
    assert accumulate(stub, config(MSE, element_count=3), GOOD, masked).state.element_count == 3


def test_an_answer_beyond_the_message_limit_is_refused(start_server: StartServer, connect: Connect) -> None:
    stub = stub_on(connect(start_server(max_message_bytes=1 << 16).address))
    specs = [pb.LossSpec(mse=pb.MseLoss(), include_gradient=True, reduction=pb.REDUCTION_SUM)] * 3
    large = slice_of(3, np.zeros(7000), np.zeros(7000))
    error = refusal(stub, config(*specs), large)
    assert (error.code, error.info.reason) == (RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
    assert "slice 3: the answer would have" in error.message
    assert accumulate(stub, config(*specs[:1]), large).failure is None


@pytest.mark.parametrize("data", [b"\x12\x03abc", b"\xff", b"\x12\x04\x12\x02\xff\xfe"])
def test_bytes_that_are_no_message_are_refused(
    start_server: StartServer, connect: Connect, stub: LossServiceStub, data: bytes
) -> None:
    channel = connect(start_server().address)
    call: Any = channel.stream_stream(codec.ACCUMULATE_LOSS)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([config(MSE).SerializeToString(), data]), timeout=PATIENCE_SECONDS))
    error = failure_of(caught.value)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def test_a_header_beyond_the_bound_is_refused(stub: LossServiceStub) -> None:
    message = slice_of(7, [1.0], [2.0])
    message.slice.input.shape.extend([1] * 10_000)
    error = refusal(stub, config(MSE), message)
    assert (error.code, error.info.reason) == (INVALID_ARGUMENT, "HEADER_TOO_LARGE")


# ---- Groups ----


def test_the_number_of_groups_is_bounded(start_server: StartServer, connect: Connect) -> None:
    stub = stub_on(connect(start_server(max_groups=2).address))
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_groups == 2
    slices = [slice_of(number, [1.0], [2.0], group=group) for number, group in enumerate("abaabc", 1)]
    answers = accumulate(stub, config(MSE), slices)
    assert answers.order == "rrrrrs"
    assert answers.failure is not None
    assert (answers.failure.code, answers.failure.info.reason) == (RESOURCE_EXHAUSTED, "TOO_MANY_GROUPS")
    assert "slice 6: with group 'c' there would be 3 groups; at most 2 are taken; use fewer" in answers.failure.message
    assert [path for path, _, _ in answers.failure.violations] == ["slice.group"]
    full = answers.last_snapshot
    again = accumulate(stub, config(MSE, resume_from=full.to_message()), slice_of(6, [1.0], [2.0], group="b"))
    assert sorted(again.state.groups) == ["a", "b"]
    too_many = full.to_message()
    too_many.groups.append(pb.GroupState(group="c", states=[LossTotal().to_message()]))
    error = refusal(stub, config(MSE, resume_from=too_many))
    assert (error.code, error.info.reason) == (RESOURCE_EXHAUSTED, "TOO_MANY_GROUPS")
    assert "the state has more than 2 groups" in error.message


def test_as_many_groups_are_taken_as_are_sure_to_fit_a_message(start_server: StartServer, connect: Connect) -> None:
    limit = 1 << 16
    running = start_server(max_message_bytes=limit)
    with grpc.insecure_channel(running.address, options=[("grpc.max_receive_message_length", limit)]) as channel:
        stub = stub_on(channel)
        slices = [slice_of(number, [1.0], [2.0], group="g" * 125 + f"{number:03}") for number in range(1, 60)]
        answers = accumulate(stub, config(MSE), slices)
        assert answers.failure is not None
        assert answers.failure.info.reason == "TOO_MANY_GROUPS"
        assert f"a message of at most {limit} bytes is sure to hold 51 of them" in answers.failure.message
        assert len(answers.results) == 51
        assert len(answers.last_snapshot.groups) == 51


def test_the_server_says_how_many_groups_it_takes(stub: LossServiceStub) -> None:
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_groups == 4096


def test_tensors_are_only_read_where_the_slice_is_not_held(stub: LossServiceStub) -> None:
    bad = slice_of(1, tensor([1.0]), tensor([1.0, 2.0]))
    assert accumulate(stub, config(MSE, resume_from=state()), bad).failure is None
