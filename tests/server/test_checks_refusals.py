"""What is refused before the queue, and with what code, reason, field and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.tensor_pb2 import DataType as WireType
from lossgrad_api.v1.tensor_pb2 import Tensor
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.jobs import JobPlan
from lossgrad_server.transport.checks import RequestChecker
from tests.server import wire_messages as wire
from tests.server.requests import L1, SMOOTH_L1, request, zeros

LIMIT = 1 << 20
INVALID, EXHAUSTED = Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED
FLOAT32, INT32 = WireType.DATA_TYPE_FLOAT32, WireType.DATA_TYPE_INT32


def check(message: pb.ComputeLossRequest) -> JobPlan:
    plan, _, _ = RequestChecker(LIMIT).check(message.SerializeToString())
    return plan


def refusal(message: pb.ComputeLossRequest | bytes, limit: int = LIMIT) -> RequestError:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(RequestError) as caught:
        RequestChecker(limit).check(data)
    return caught.value


def spec(**fields: object) -> pb.LossSpec:
    return pb.LossSpec(**{"l1": pb.L1Loss(), **fields})  # type: ignore[arg-type]


def smooth_l1(beta: float) -> pb.LossSpec:
    return pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=beta))


def huber(delta: float) -> pb.LossSpec:
    return pb.LossSpec(huber=pb.HuberLoss(delta=delta))


def with_reduction(number: int) -> pb.LossSpec:
    """Return a spec whose reduction has a number that the generated class would not write."""
    return pb.LossSpec.FromString(L1.SerializeToString() + wire.key(5, 0) + wire.varint(number))


def with_type(number: int) -> Tensor:
    return Tensor.FromString(wire.key(1, 0) + wire.varint(number) + wire.delimited(3, b"1234"))


X = zeros(2)


@dataclass(frozen=True)
class Refused:
    """A request that is refused, and what its caller is told. Every text must be part of the message."""

    request: pb.ComputeLossRequest
    reason: Reason
    field: str | None
    texts: tuple[str, ...]
    code: Code = INVALID


REFUSED: dict[str, Refused] = {
    # specs
    "no spec": Refused(
        pb.ComputeLossRequest(input=X, target=X), Reason.SPEC_COUNT, "specs", ("has 0 specs", "1 to 16")
    ),
    "17 specs": Refused(request(X, X, *[L1] * 17), Reason.SPEC_COUNT, "specs", ("has 17 specs", "1 to 16")),
    "a spec without a loss": Refused(
        request(X, X, L1, pb.LossSpec()), Reason.UNKNOWN_LOSS, "specs[1].function", ("specs[1]", "smooth_l1, huber")
    ),
    **{
        f"beta {beta}": Refused(
            request(X, X, L1, smooth_l1(beta)),
            Reason.BAD_PARAMETER,
            "specs[1].smooth_l1.beta",
            (f"specs[1].smooth_l1.beta is {beta!r}", "at least 0"),
        )
        for beta in (-0.5, math.nan, -math.inf, -5e-324)
    },
    **{
        f"delta {delta}": Refused(
            request(X, X, huber(delta)),
            Reason.BAD_PARAMETER,
            "specs[0].huber.delta",
            (f"specs[0].huber.delta is {delta!r}", "above 0"),
        )
        for delta in (0.0, -0.0, -1.0, math.nan, -math.inf)
    },
    **{
        f"reduction {number}": Refused(
            request(X, X, with_reduction(number)),
            Reason.UNKNOWN_REDUCTION,
            "specs[0].reduction",
            (f"reduction is {number}", "5 (sample_sum)"),
        )
        for number in (6, 9, -1)
    },
    **{
        f"denominator {value}": Refused(
            request(X, X, spec(denominator=value)),
            Reason.BAD_PARAMETER,
            "specs[0].denominator",
            (f"denominator is {value!r}", "finite and above 0"),
        )
        for value in (0.0, -2.0, math.nan, math.inf)
    },
    **{
        f"a denominator with {name}": Refused(
            request(X, X, spec(reduction=f"REDUCTION_{name.upper()}", denominator=2.0)),
            Reason.BAD_PARAMETER,
            "specs[0].denominator",
            ("denominator is 2.0", f"reduction is {name}"),
        )
        for name in ("none", "sum", "sample_sum")
    },
    **{
        f"gradient_scale {value}": Refused(
            request(X, X, spec(gradient_scale=value)),
            Reason.BAD_PARAMETER,
            "specs[0].gradient_scale",
            (f"gradient_scale is {value!r}", "finite"),
        )
        for value in (math.inf, -math.inf, math.nan)
    },
    # tensors
    "no input": Refused(
        pb.ComputeLossRequest(specs=[L1], target=X),
        Reason.MISSING_FIELD,
        "input",
        ("no input", "send input and target"),
    ),
    "no target": Refused(pb.ComputeLossRequest(specs=[L1], input=X), Reason.MISSING_FIELD, "target", ("no target",)),
    **{
        f"data type {number}": Refused(
            pb.ComputeLossRequest(specs=[L1], input=X, target=with_type(number)),
            Reason.UNKNOWN_DATA_TYPE,
            "target.data_type",
            (f"target.data_type is {number}", "float16, bfloat16, float32, float64"),
        )
        for number in (0, 11, 99, -1)
    },
    "two integer tensors": Refused(
        request(zeros(2, dtype="int32"), zeros(2, dtype="bool"), L1),
        Reason.UNSUPPORTED_DATA_TYPE,
        "input.data_type",
        ("input is int32", "target is bool", "float64"),
    ),
    "the gradient of an integer input": Refused(
        request(zeros(2, dtype="int64"), X, L1, SMOOTH_L1),
        Reason.UNSUPPORTED_DATA_TYPE,
        "input.data_type",
        ("specs[1] includes the gradient", "input is int64"),
    ),
    "17 dimensions": Refused(
        request(Tensor(data_type=FLOAT32, shape=[1] * 17, data=bytes(4)), X),
        Reason.BAD_SHAPE,
        "input.shape",
        ("input has 17 dimensions", "at most 16"),
    ),
    "too few bytes": Refused(
        request(X, Tensor(data_type=FLOAT32, shape=[2], data=bytes(7))),
        Reason.DATA_LENGTH_MISMATCH,
        "target.data",
        ("target.data has 7 bytes", "[2] of float32 needs 8"),
    ),
    "too many bytes": Refused(
        request(Tensor(data_type=FLOAT32, data=bytes(8)), X),
        Reason.DATA_LENGTH_MISMATCH,
        "input.data",
        ("input.data has 8 bytes", "[] of float32 needs 4"),
    ),
    **{
        f"shape {shape}": Refused(
            request(Tensor(data_type=FLOAT32, shape=shape, data=bytes(4)), X),
            Reason.DATA_LENGTH_MISMATCH,
            "input.data",
            ("input.data has 4 bytes", f"{shape} of float32 needs {math.prod(shape) * 4}"),
        )
        # Products of these are 0, 1 or 4 modulo 2^64, or negative as int64.
        for shape in (
            [1 << 63],
            [1 << 32, 1 << 32],
            [1 << 62],
            [(1 << 64) - 1],
            [(1 << 64) - 1] * 2,
            [(1 << 64) - 1] * 16,
            [0],
        )
    },
    **{
        f"empty with shape {shape}": Refused(
            request(Tensor(data_type=FLOAT32, shape=shape), Tensor(data_type=FLOAT32, shape=shape), L1),
            Reason.BAD_SHAPE,
            "input.shape",
            ("input is empty", f"{shape}"),
        )
        for shape in ([0, 1 << 63], [1 << 48, 0], [0, 1 << 24, 1 << 24])
    },
    "an empty result with huge dimensions": Refused(
        request(
            Tensor(data_type=FLOAT32, shape=[0, 1 << 40, 1]),
            Tensor(data_type=FLOAT32, shape=[0, 1, 1 << 40]),
            allow_broadcast=True,
        ),
        Reason.BAD_SHAPE,
        "target.shape",
        ("the result is empty", f"[0, {1 << 40}, {1 << 40}]"),
    ),
    # shapes
    "unequal shapes": Refused(
        request(zeros(2, 3), zeros(3)),
        Reason.SHAPE_MISMATCH,
        "target.shape",
        ("[3]", "input [2, 3]", "allow_broadcast"),
    ),
    "shapes that do not broadcast": Refused(
        request(zeros(2, 3), zeros(4), allow_broadcast=True),
        Reason.SHAPE_MISMATCH,
        "target.shape",
        ("[4]", "input [2, 3]", "do not broadcast"),
    ),
    "a per-sample reduction of a scalar": Refused(
        request(zeros(), zeros(), L1, spec(reduction="REDUCTION_SAMPLE_SUM")),
        Reason.BAD_SHAPE,
        "specs[1].reduction",
        ("specs[1].reduction is sample_sum", "shape []"),
    ),
    # weight and mask
    "an integer weight": Refused(
        pb.ComputeLossRequest(specs=[L1], input=X, target=X, weight=zeros(2, dtype="int32")),
        Reason.UNSUPPORTED_DATA_TYPE,
        "weight.data_type",
        ("weight is int32", "float16, bfloat16, float32, float64"),
    ),
    "a weight of unknown type": Refused(
        pb.ComputeLossRequest(specs=[L1], input=X, target=X, weight=with_type(77)),
        Reason.UNKNOWN_DATA_TYPE,
        "weight.data_type",
        ("weight.data_type is 77",),
    ),
    "a mask of bytes": Refused(
        pb.ComputeLossRequest(specs=[L1], input=X, target=X, mask=zeros(2, dtype="uint8")),
        Reason.UNSUPPORTED_DATA_TYPE,
        "mask.data_type",
        ("mask is uint8", "send it as bool"),
    ),
    "a weight of another shape": Refused(
        request(zeros(2, 3), zeros(2, 3), weight=[1, 1, 1]),
        Reason.SHAPE_MISMATCH,
        "weight.shape",
        ("weight has shape [3]", "the result [2, 3]", "allow_broadcast"),
    ),
    "a mask that does not broadcast": Refused(
        request(zeros(2, 3), zeros(2, 3), mask=[1, 1], allow_broadcast=True),
        Reason.SHAPE_MISMATCH,
        "mask.shape",
        ("mask has shape [2]", "the result [2, 3]"),
    ),
    "a weight that would extend the result": Refused(
        request(zeros(1, 3), zeros(1, 3), weight=[[1.0] * 3] * 2, allow_broadcast=True),
        Reason.SHAPE_MISMATCH,
        "weight.shape",
        ("weight has shape [2, 3]", "the result [1, 3]"),
    ),
    "a mask of higher rank": Refused(
        request(zeros(3), zeros(3), mask=[[1, 1, 1]], allow_broadcast=True),
        Reason.SHAPE_MISMATCH,
        "mask.shape",
        ("mask has shape [1, 3]", "the result [3]"),
    ),
    # sizes
    "a broadcast to far more than was sent": Refused(
        request(zeros(1000, 1), zeros(1, 1000), spec(reduction="REDUCTION_SUM"), allow_broadcast=True),
        Reason.RESULT_TOO_LARGE,
        None,
        ("[1000, 1000]", "4000000 bytes", f"at most {LIMIT}"),
        EXHAUSTED,
    ),
    "an answer over the limit": Refused(
        request(zeros(50_000), zeros(50_000), *[SMOOTH_L1] * 6),
        Reason.RESULT_TOO_LARGE,
        None,
        (f"{6 * (200_000 + 1024)} bytes", f"at most {LIMIT} fit a message"),
        EXHAUSTED,
    ),
    # the key
    "a key of 129 bytes": Refused(
        request(X, X, idempotency_key="k" * 129),
        Reason.BAD_PARAMETER,
        "idempotency_key",
        ("129 bytes", "at most 128"),
    ),
    "a key of 43 characters, 129 bytes": Refused(
        request(X, X, idempotency_key="€" * 43),
        Reason.BAD_PARAMETER,
        "idempotency_key",
        ("129 bytes", "at most 128"),
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_with_its_reason_its_field_and_both_values(case: Refused) -> None:
    error = refusal(case.request)
    assert (error.code, error.reason, error.field) == (case.code, case.reason, case.field)
    for text in case.texts:
        assert text in error.message
    assert len(error.message) < 1000  # messages travel in headers


def test_bytes_that_are_no_request_are_refused() -> None:
    error = refusal(b"\x3a\x7f")
    assert (error.code, error.reason) == (INVALID, Reason.MALFORMED_MESSAGE)
    assert "127 bytes, only 0 are left" in error.message
    assert refusal(b"\x3a\x03\x12\x01\x01").reason == Reason.MALFORMED_MESSAGE


def test_a_header_over_64_kib_is_refused_as_such() -> None:
    error = refusal(wire.delimited(15, bytes(70_000)))
    assert (error.code, error.reason) == (INVALID, Reason.HEADER_TOO_LARGE)
    assert "70004 bytes" in error.message
    assert "65536" in error.message


def test_an_error_carries_the_callers_key_unless_it_is_too_long() -> None:
    assert refusal(request(X, X, smooth_l1(-1.0), idempotency_key="mine")).request_id == "mine"
    assert refusal(request(X, X, smooth_l1(-1.0), idempotency_key="k" * 60_000)).request_id == ""
