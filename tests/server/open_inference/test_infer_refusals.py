"""What ModelInfer refuses: with Triton's codes, and a text that names the tensor, both values and what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.server.open_inference.asking import Value, infer_request, pair, refusal, set_parameters

INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED = 3, 5, 12
MASK = {"MASK": np.ones((2, 3), "?")}


def good(model: str = "smooth_l1_grad", **more: Any) -> Any:
    return infer_request(model, pair(2, 3), **more)


def with_parameters(model: str, **values: Value) -> Any:
    return good(model, parameters=values)


def changed(change: Callable[[Any], Any], model: str = "smooth_l1_grad") -> Any:
    """Return a good request after a change."""
    request = good(model)
    change(request)
    return request


def masked(name: str, array: Any) -> Any:
    return infer_request("l1_masked", pair(2, 3) | {name: array})


def without(index: int) -> Any:
    def take_out(request: Any) -> None:
        del request.inputs[index]
        del request.raw_input_contents[index]

    return changed(take_out)


def in_region(tensor: Any, **values: Value) -> None:
    set_parameters(tensor.parameters, values)


def target_in_region(size: int) -> Any:
    def move(request: Any) -> None:
        in_region(request.inputs[1], shared_memory_region="r", shared_memory_byte_size=size)
        del request.raw_input_contents[1]

    return changed(move)


REFUSALS: dict[str, tuple[Any, int, str, str]] = {
    "no model": (good(""), NOT_FOUND, "UNKNOWN_MODEL", "there is no model ''; send one of smooth_l1, smooth_l1_grad, "),
    "another model": (good("resnet"), NOT_FOUND, "UNKNOWN_MODEL", "there is no model 'resnet'; send one of smooth_l1"),
    "another version": (
        good(model_version="2"),
        NOT_FOUND,
        "UNKNOWN_MODEL",
        "model smooth_l1_grad has no version '2'; send '1', or none for the newest",
    ),
    "no input": (
        without(0),
        INVALID_ARGUMENT,
        "MISSING_FIELD",
        "the request has no input INPUT; model smooth_l1_grad takes INPUT, TARGET",
    ),
    "no target": (
        without(1),
        INVALID_ARGUMENT,
        "MISSING_FIELD",
        "the request has no input TARGET; model smooth_l1_grad takes INPUT, TARGET",
    ),
    "an input that the model has not": (
        infer_request("l1", pair(2, 3) | MASK),
        INVALID_ARGUMENT,
        "UNKNOWN_TENSOR",
        "model l1 has no input 'MASK'; it takes INPUT, TARGET, and l1_masked takes MASK",
    ),
    "an input twice": (
        changed(lambda request: setattr(request.inputs[1], "name", "INPUT")),
        INVALID_ARGUMENT,
        "UNKNOWN_TENSOR",
        "input INPUT comes twice; send it once",
    ),
    "an output that the model has not": (
        good("smooth_l1", outputs=["LOSS", "GRAD"]),
        INVALID_ARGUMENT,
        "UNKNOWN_TENSOR",
        "model smooth_l1 has no output 'GRAD'; it gives LOSS, COUNT, and smooth_l1_grad gives GRAD",
    ),
    "an output twice": (
        good(outputs=["LOSS", "LOSS"]),
        INVALID_ARGUMENT,
        "UNKNOWN_TENSOR",
        "output LOSS is asked for twice; ask once",
    ),
    "a classification": (
        changed(lambda request: set_parameters(request.outputs.add(name="LOSS").parameters, {"classification": 3})),
        UNIMPLEMENTED,
        "UNIMPLEMENTED",
        "output LOSS asks for a classification, which a loss has not; leave the parameter out",
    ),
    "an unknown data type": (
        changed(lambda request: setattr(request.inputs[0], "datatype", "FP8")),
        INVALID_ARGUMENT,
        "UNKNOWN_DATA_TYPE",
        "input INPUT has datatype 'FP8'; send it as FP16, BF16, FP32, FP64, INT64",
    ),
    "a data type of no use": (
        changed(lambda request: setattr(request.inputs[1], "datatype", "BYTES")),
        INVALID_ARGUMENT,
        "UNSUPPORTED_DATA_TYPE",
        "input TARGET has datatype 'BYTES'; send it as FP16, BF16, FP32, FP64, INT64",
    ),
    "a mask of numbers": (
        masked("MASK", np.ones((2, 3), "<f4")),
        INVALID_ARGUMENT,
        "UNSUPPORTED_DATA_TYPE",
        "input MASK has datatype 'FP32'; send it as BOOL",
    ),
    "a weight of integers": (
        masked("WEIGHT", np.ones((2, 3), "<i4")),
        INVALID_ARGUMENT,
        "UNSUPPORTED_DATA_TYPE",
        "input WEIGHT has datatype 'INT32'; send it as FP16, BF16, FP32, FP64",
    ),
    "two integer tensors": (
        infer_request("l1", {name: np.ones((2, 3), "<i4") for name in ("INPUT", "TARGET")}),
        INVALID_ARGUMENT,
        "UNSUPPORTED_DATA_TYPE",
        "INPUT is INT32 and TARGET is INT32; send at least one of them as FP16, BF16, FP32, FP64",
    ),
    "the gradient of an integer input": (
        infer_request("l1_grad", pair(2, 3) | {"INPUT": np.ones((2, 3), "<i4")}),
        INVALID_ARGUMENT,
        "UNSUPPORTED_DATA_TYPE",
        "INPUT is INT32, which has no gradient; send it as FP16, BF16, FP32, FP64",
    ),
    "a target of another shape": (
        infer_request("l1", pair(2, 3) | {"TARGET": np.zeros((3, 2), "<f4")}),
        INVALID_ARGUMENT,
        "SHAPE_MISMATCH",
        "TARGET has shape [3, 2], INPUT [2, 3]; send equal shapes",
    ),
    "a mask that would have to be broadcast": (
        masked("MASK", np.ones((1, 3), "?")),
        INVALID_ARGUMENT,
        "SHAPE_MISMATCH",
        "MASK has shape [1, 3], INPUT [2, 3]; send equal shapes, or one element a row, [2, 1]",
    ),
    "too few bytes": (
        changed(lambda request: request.raw_input_contents.__setitem__(1, bytes(20))),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "input TARGET: it came with 20 bytes; shape [2, 3] of FP32 needs 24; send the elements row-major, little-endian "
        "and unpadded",
    ),
    "too many bytes": (
        changed(lambda request: request.raw_input_contents.__setitem__(0, bytes(28))),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "input INPUT: it came with 28 bytes; shape [2, 3] of FP32 needs 24",
    ),
    "a raw entry too few": (
        changed(lambda request: request.raw_input_contents.__delitem__(1)),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "the request has 1 raw_input_contents and 2 inputs that are not in shared memory; send one for each",
    ),
    "a raw entry too many": (
        changed(lambda request: request.raw_input_contents.append(b"")),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "the request has 3 raw_input_contents and 2 inputs that are not in shared memory",
    ),
    "no elements at all": (
        changed(lambda request: request.ClearField("raw_input_contents")),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "input INPUT: it came with 0 bytes; shape [2, 3] of FP32 needs 24",
    ),
    "typed and raw contents": (
        changed(lambda request: request.inputs[0].contents.fp32_contents.extend([1.0] * 6)),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "input INPUT has typed contents beside raw_input_contents; send its elements in one way",
    ),
    "a negative extent": (
        changed(lambda request: request.inputs[0].shape.__setitem__(0, -1)),
        INVALID_ARGUMENT,
        "BAD_SHAPE",
        "input INPUT has shape [-1, 3]; extents must be at least 0, and not as large as that",
    ),
    "extents that overflow": (
        changed(lambda request: request.inputs[0].shape.extend([1 << 40, 1 << 40])),
        INVALID_ARGUMENT,
        "BAD_SHAPE",
        "input INPUT has shape [2, 3, 1099511627776, 1099511627776]; extents must be",
    ),
    "an empty tensor whose other extents overflow": (
        changed(lambda request: request.inputs[0].shape.extend([0, 1 << 62])),
        INVALID_ARGUMENT,
        "BAD_SHAPE",
        "input INPUT has shape [2, 3, 0, 4611686018427387904]; extents must be",
    ),
    "seventeen dimensions": (
        changed(lambda request: request.inputs[0].shape.extend([1] * 15)),
        INVALID_ARGUMENT,
        "BAD_SHAPE",
        "input INPUT has 17 dimensions, at most 16 are taken; reshape it",
    ),
    "rows of a tensor without dimensions": (
        infer_request("l1", {"INPUT": np.array(1.0, "<f4"), "TARGET": np.array(1.0, "<f4")}),
        INVALID_ARGUMENT,
        "BAD_SHAPE",
        "INPUT has shape [], which has no rows; send at least one dimension, or parameter reduction as mean, sum or none",
    ),
    "a parameter in capitals": (
        with_parameters("smooth_l1", Beta="0.5"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "there is no parameter 'Beta'; send it as beta",
    ),
    "a parameter with a space": (
        with_parameters("l1", **{"reduction ": "sum"}),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "there is no parameter 'reduction '; send it as reduction",
    ),
    "delta for smooth_l1": (
        with_parameters("smooth_l1", delta=1.0),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter delta does not go with model smooth_l1, which has beta instead; leave it out",
    ),
    "beta for mse": (
        with_parameters("mse", beta="1"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta does not go with model mse, which has no such parameter; leave it out",
    ),
    "a negative beta": (
        with_parameters("smooth_l1", beta=-0.5),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta is -0.5; it must be at least 0",
    ),
    "a beta that is no number": (
        with_parameters("smooth_l1", beta="nan"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta is nan; it must be at least 0",
    ),
    "a delta of zero": (
        with_parameters("huber", delta=0),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter delta is 0.0; it must be above 0",
    ),
    "a beta of words": (
        with_parameters("smooth_l1", beta="one"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta is 'one'; it must be a number",
    ),
    "a beta as Python writes numbers": (
        with_parameters("smooth_l1", beta="1_0"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta is '1_0'; it must be a number",
    ),
    "a beta that is true": (
        with_parameters("smooth_l1", beta=True),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter beta is True; it must be a number, sent as double_param, int64_param, uint64_param or string_param",
    ),
    "an unknown reduction": (
        with_parameters("mse", reduction="median"),
        INVALID_ARGUMENT,
        "UNKNOWN_REDUCTION",
        "parameter reduction is 'median'; send one of none, mean, sum, sample_mean, sample_sum as string_param",
    ),
    "a reduction by number": (
        with_parameters("mse", reduction=2),
        INVALID_ARGUMENT,
        "UNKNOWN_REDUCTION",
        "parameter reduction is '2'; send one of none, mean",
    ),
    "a denominator of a sum": (
        with_parameters("mse", reduction="sum", denominator=2),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter denominator is 2.0, but reduction sum divides by nothing; leave it out, or ask for mean or sample_mean",
    ),
    "a denominator of zero": (
        with_parameters("mse", denominator=0.0),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter denominator is 0.0; it must be finite and above 0",
    ),
    "an infinite gradient scale": (
        with_parameters("mse_grad", gradient_scale="inf"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter gradient_scale is inf; it must be finite",
    ),
    "a negative timeout": (
        with_parameters("mse", timeout=-1),
        INVALID_ARGUMENT,
        "BAD_TIMEOUT",
        "parameter timeout is -1; send 0 for none, or how long you will wait in microseconds",
    ),
    "a timeout of words": (
        with_parameters("mse", timeout="soon"),
        INVALID_ARGUMENT,
        "BAD_PARAMETER",
        "parameter timeout came as string_param; send it as int64_param or uint64_param",
    ),
    "shared memory where there is none": (
        target_in_region(24),
        UNIMPLEMENTED,
        "SHARED_MEMORY_OFF",
        "this server shares no memory with its callers (--allow-shared-memory); send the tensors in raw_input_contents",
    ),
    "shared memory of another size": (
        target_in_region(20),
        INVALID_ARGUMENT,
        "DATA_LENGTH_MISMATCH",
        "input TARGET: its place in shared memory has 20 bytes; shape [2, 3] of FP32 needs 24",
    ),
    "shared memory without a size": (
        changed(lambda request: in_region(request.inputs[0], shared_memory_region="r")),
        INVALID_ARGUMENT,
        "BAD_REGION",
        "input INPUT: parameter shared_memory_byte_size is missing or not a number of bytes; send it as int64_param, at "
        "least 0",
    ),
    "shared memory at a negative offset": (
        changed(
            lambda request: in_region(
                request.outputs.add(name="GRAD"),
                shared_memory_region="r",
                shared_memory_byte_size=24,
                shared_memory_offset=-8,
            )
        ),
        INVALID_ARGUMENT,
        "BAD_REGION",
        "output GRAD: parameter shared_memory_offset is missing or not a number of bytes",
    ),
    "an output larger than its shared memory": (
        changed(
            lambda request: in_region(
                request.outputs.add(name="GRAD"), shared_memory_region="r", shared_memory_byte_size=20
            )
        ),
        INVALID_ARGUMENT,
        "BAD_REGION",
        "output GRAD: its place in shared memory has 20 bytes; shape [2, 3] of FP32 needs 24; give it as many",
    ),
    "a region that is a number": (
        changed(lambda request: in_region(request.inputs[0], shared_memory_region=1)),
        INVALID_ARGUMENT,
        "BAD_REGION",
        "input INPUT: send parameter shared_memory_region as string_param",
    ),
}


@pytest.mark.parametrize(("request_", "code", "reason", "text"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_is_refused_with_code_reason_and_text(
    triton: Any, request_: Any, code: int, reason: str, text: str
) -> None:
    error = refusal(triton, request_)
    assert error.message.startswith(text)
    assert (error.code, error.info.reason) == (code, reason)
    assert error.info.domain == "lossgrad"
