"""ModelInfer: its answers have the native service's bits, for every model, data type and reduction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_api.v1.tensor_pb2 import DataType, Tensor
from lossgrad_server.transport.open_inference.infer import count_rows
from tests.server import wire_messages as wire
from tests.server.calling import Connect
from tests.server.open_inference.asking import (
    DTYPES,
    MODEL_INFER,
    Array,
    Value,
    infer,
    infer_request,
    messages,
    outputs_of,
    pair,
)
from tests.server.serving import PATIENCE_SECONDS, RunningServer

KINDS = ("smooth_l1", "huber", "l1", "mse")
MODELS = [kind + masked + grad for kind in KINDS for masked in ("", "_masked") for grad in ("", "_grad")]
FLOATS = ("FP16", "BF16", "FP32", "FP64")
REDUCTIONS = {
    None: pb.REDUCTION_SAMPLE_MEAN,
    "sample_mean": pb.REDUCTION_SAMPLE_MEAN,
    "sample_sum": pb.REDUCTION_SAMPLE_SUM,
    "mean": pb.REDUCTION_MEAN,
    "sum": pb.REDUCTION_SUM,
    "none": pb.REDUCTION_NONE,
}
NATIVE_TYPES = {
    "FP16": DataType.DATA_TYPE_FLOAT16,
    "BF16": DataType.DATA_TYPE_BFLOAT16,
    "FP32": DataType.DATA_TYPE_FLOAT32,
    "FP64": DataType.DATA_TYPE_FLOAT64,
    "INT64": DataType.DATA_TYPE_INT64,
    "INT32": DataType.DATA_TYPE_INT32,
    "INT16": DataType.DATA_TYPE_INT16,
    "INT8": DataType.DATA_TYPE_INT8,
    "UINT8": DataType.DATA_TYPE_UINT8,
    "BOOL": DataType.DATA_TYPE_BOOL,
}
NATIVE_NAMES = {number: name for name, number in NATIVE_TYPES.items()}


def inputs_for(model: str, dtype: str, shape: tuple[int, ...] = (5, 33)) -> dict[str, Array]:
    inputs = pair(*shape, dtype=dtype)
    if "_masked" in model:
        generator = np.random.default_rng(5)
        inputs["WEIGHT"] = generator.uniform(0.1, 2.0, shape).astype(DTYPES[dtype])
        inputs["MASK"] = generator.uniform(size=shape) < 0.7
    return inputs


def native_tensor(array: Array | None) -> Tensor | None:
    if array is None:
        return None
    (name,) = (name for name, dtype in DTYPES.items() if dtype == array.dtype)
    return Tensor(data_type=NATIVE_TYPES[name], shape=array.shape, data=array.tobytes())


def native(
    stub: LossServiceStub, model: str, inputs: dict[str, Array], reduction: str | None, **spec: Any
) -> pb.LossResult:
    """Return what the native service answers to the same request."""
    kind = next(kind for kind in KINDS if model.startswith(kind))
    message = pb.LossSpec(reduction=REDUCTIONS[reduction], include_gradient=model.endswith("_grad"), **spec)
    getattr(message, kind).SetInParent()
    request = pb.ComputeLossRequest(
        specs=[message],
        input=native_tensor(inputs["INPUT"]),
        target=native_tensor(inputs["TARGET"]),
        weight=native_tensor(inputs.get("WEIGHT")),
        mask=native_tensor(inputs.get("MASK")),
    )
    (result,) = stub.ComputeLoss(request, timeout=PATIENCE_SECONDS).results
    assert isinstance(result, pb.LossResult)
    return result


def array_of(tensor: Tensor) -> Array:
    return np.frombuffer(tensor.data, DTYPES[NATIVE_NAMES[tensor.data_type]]).reshape(tuple(tensor.shape))


def check_equal(outputs: dict[str, Array], result: pb.LossResult, inputs: dict[str, Array]) -> None:
    """Check that an answer has the bits of the native one."""
    dtype = inputs["INPUT"].dtype
    loss = outputs["LOSS"]
    if result.HasField("scalar"):
        assert loss.shape == (1,)
        # Rounded once: NumPy rounds a float64 to bfloat16 through float32, so the type's own neighbours decide.
        expected = np.float64(result.scalar)
        distance = abs(loss[0].astype(np.float64) - expected)
        neighbours = [np.nextafter(loss[0], dtype.type(side)) for side in (-np.inf, np.inf)]
        assert all(distance <= abs(one.astype(np.float64) - expected) for one in neighbours)
        assert outputs["COUNT"].tolist() == [result.element_count]
    else:
        of_native = array_of(result.tensor)
        assert loss.tobytes() == of_native.tobytes()
        assert loss.dtype == of_native.dtype
    if result.HasField("input_gradient"):
        gradient = array_of(result.input_gradient)
        assert outputs["GRAD"].shape == gradient.shape == inputs["INPUT"].shape
        assert outputs["GRAD"].tobytes() == gradient.tobytes()
    else:
        assert "GRAD" not in outputs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_model_data_type_and_reduction_has_the_native_bits(
    triton: Any, stub: LossServiceStub, model: str, dtype: str
) -> None:
    inputs = inputs_for(model, dtype)
    for reduction in REDUCTIONS:
        parameters = {} if reduction is None else {"reduction": reduction}
        outputs = infer(triton, infer_request(model, inputs, parameters=parameters))
        assert list(outputs) == ["LOSS", "COUNT", *(["GRAD"] if model.endswith("_grad") else [])]
        check_equal(outputs, native(stub, model, inputs, reduction), inputs)
        if reduction in (None, "sample_mean", "sample_sum"):
            assert outputs["LOSS"].shape == outputs["COUNT"].shape == (5, 1)
            counted = inputs["MASK"].sum(1) if "MASK" in inputs else np.full(5, 33)
            assert outputs["COUNT"].ravel().tolist() == counted.tolist()
        if reduction == "none":
            assert outputs["LOSS"].shape == (5, 33)


@pytest.mark.parametrize("shape", [(1, 1), (7,), (2, 3, 4, 5), (1, 70_000), (0, 4), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("model", ["smooth_l1_grad", "huber_masked_grad"])
def test_awkward_shapes_have_the_native_bits(
    triton: Any, stub: LossServiceStub, model: str, shape: tuple[int, ...]
) -> None:
    inputs = inputs_for(model, "FP32", shape)
    for reduction in REDUCTIONS:
        parameters = {} if reduction is None else {"reduction": reduction}
        outputs = infer(triton, infer_request(model, inputs, parameters=parameters))
        result = native(stub, model, inputs, reduction)
        if result.HasField("scalar") and np.isnan(result.scalar):  # the mean of nothing
            assert np.isnan(outputs["LOSS"]).all()
        else:
            check_equal(outputs, result, inputs)
        if reduction is None:
            assert outputs["LOSS"].shape == outputs["COUNT"].shape == (shape[0], 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_tensor_without_dimensions_is_taken_where_no_rows_are_needed(triton: Any, reduction: str) -> None:
    inputs = {"INPUT": np.array(3.0, "<f4"), "TARGET": np.array(1.0, "<f4")}
    outputs = infer(triton, infer_request("l1_grad", inputs, parameters={"reduction": reduction}))
    assert outputs["LOSS"].ravel().tolist() == [2.0]
    assert outputs["GRAD"].tolist() == 1.0


@pytest.mark.parametrize("other", ["FP16", "BF16", "FP64", "INT64", "INT32", "INT16", "INT8", "UINT8", "BOOL"])
def test_a_target_of_another_type_is_promoted_as_natively(triton: Any, stub: LossServiceStub, other: str) -> None:
    inputs = pair(4, 6)
    inputs["TARGET"] = (np.arange(24).reshape(4, 6) % 2).astype(DTYPES[other])
    outputs = infer(triton, infer_request("smooth_l1_grad", inputs))
    result = native(stub, "smooth_l1_grad", inputs, None)
    assert outputs["LOSS"].tobytes() == result.tensor.data
    assert outputs["LOSS"].dtype == array_of(result.tensor).dtype
    assert outputs["GRAD"].tobytes() == result.input_gradient.data


def test_weight_and_mask_may_each_be_left_out(triton: Any, stub: LossServiceStub) -> None:
    inputs = inputs_for("mse_masked_grad", "FP32")
    for left_out in (["WEIGHT"], ["MASK"], ["WEIGHT", "MASK"]):
        some = {name: array for name, array in inputs.items() if name not in left_out}
        outputs = infer(triton, infer_request("mse_masked_grad", some))
        check_equal(outputs, native(stub, "mse_masked_grad", some, None), some)


@pytest.mark.parametrize("shape", [(5, 33), (3, 4, 5), (1, 7), (300, 1000), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["sample_mean", "sample_sum", "mean", "sum", "none"])
def test_a_weight_or_mask_of_one_element_a_row_is_one_of_the_rows_elements_each(
    triton: Any, shape: tuple[int, ...], reduction: str
) -> None:
    generator = np.random.default_rng(5)
    first = shape[:1] + (1,) * (len(shape) - 1)
    of_rows = {"WEIGHT": generator.uniform(0.1, 2.0, first).astype("<f4"), "MASK": generator.uniform(size=first) < 0.6}
    whole = {name: np.broadcast_to(array, shape).copy() for name, array in of_rows.items()}
    for names in (["WEIGHT"], ["MASK"], ["WEIGHT", "MASK"]):
        answers = []
        for values in (whole, of_rows):
            request = {**pair(*shape), **{name: values[name] for name in names}}
            answers.append(
                infer(triton, infer_request("smooth_l1_masked_grad", request, parameters={"reduction": reduction}))
            )
        for name in ("LOSS", "COUNT", "GRAD"):
            assert answers[0][name].shape == answers[1][name].shape
            assert answers[0][name].tobytes() == answers[1][name].tobytes(), (names, name)


def test_inputs_and_outputs_come_in_any_order(triton: Any) -> None:
    inputs = inputs_for("smooth_l1_masked_grad", "FP32")
    expected = infer(triton, infer_request("smooth_l1_masked_grad", inputs))
    mixed = {name: inputs[name] for name in ("MASK", "TARGET", "WEIGHT", "INPUT")}
    outputs = infer(triton, infer_request("smooth_l1_masked_grad", mixed, outputs=["GRAD", "LOSS"]))
    assert list(outputs) == ["GRAD", "LOSS"]
    assert outputs["GRAD"].tobytes() == expected["GRAD"].tobytes()
    assert outputs["LOSS"].tobytes() == expected["LOSS"].tobytes()


@pytest.mark.parametrize("name", ["LOSS", "COUNT", "GRAD"])
def test_only_what_is_asked_for_comes_back(triton: Any, name: str) -> None:
    outputs = infer(triton, infer_request("smooth_l1_grad", pair(2, 3), outputs=[name]))
    assert list(outputs) == [name]


def test_the_answer_echoes_the_id_and_names_model_and_version(triton: Any) -> None:
    for request_id in ("", "first", "second", "ünïque"):
        for _ in range(2):  # the second time from memory
            response = triton.ModelInfer(infer_request("mse", pair(2, 3), id=request_id, model_version="1"))
            assert (response.id, response.model_name, response.model_version) == (request_id, "mse", "1")


def test_requests_that_differ_in_their_elements_only_get_their_own_answers(triton: Any) -> None:
    for seed in range(8):
        inputs = pair(3, 5, seed=seed)
        outputs = infer(triton, infer_request("l1_grad", inputs, id=str(seed)))
        d = inputs["INPUT"] - inputs["TARGET"]
        np.testing.assert_allclose(outputs["LOSS"], abs(d).mean(1, keepdims=True), rtol=1e-6)
        assert np.array_equal(outputs["GRAD"], np.sign(d) / np.float32(5))


# ---- Parameters ----


@pytest.mark.parametrize("value", [0.25, "0.25", "2.5e-1"])
def test_beta_and_delta_are_taken_as_double_and_as_string(triton: Any, value: float | str) -> None:
    inputs = {"INPUT": np.array([[0.1, 4.0]], "<f4"), "TARGET": np.zeros((1, 2), "<f4")}
    smooth = infer(triton, infer_request("smooth_l1", inputs, parameters={"beta": value, "reduction": "none"}))
    np.testing.assert_allclose(smooth["LOSS"][0], [0.5 * 0.1**2 / 0.25, 4 - 0.125], rtol=1e-6)
    huber = infer(triton, infer_request("huber", inputs, parameters={"delta": value, "reduction": "none"}))
    np.testing.assert_allclose(huber["LOSS"][0], [0.5 * 0.1**2, 0.25 * (4 - 0.125)], rtol=1e-6)


def test_beta_is_taken_as_either_integer_and_zero_is_l1(triton: Any) -> None:
    inputs = {"INPUT": np.array([[0.5, 3.0]], "<f4"), "TARGET": np.zeros((1, 2), "<f4")}
    request = infer_request("smooth_l1", inputs, parameters={"reduction": "none", "beta": 2})
    np.testing.assert_allclose(infer(triton, request)["LOSS"][0], [0.0625, 2.0])
    request.parameters["beta"].uint64_param = 0
    np.testing.assert_allclose(infer(triton, request)["LOSS"][0], [0.5, 3.0])


def test_denominator_and_gradient_scale_divide_and_multiply(triton: Any) -> None:
    inputs = {"INPUT": np.array([[1.0, 5.0]], "<f4"), "TARGET": np.zeros((1, 2), "<f4")}
    parameters: dict[str, Value] = {"reduction": "mean", "denominator": 4, "gradient_scale": "3"}
    outputs = infer(triton, infer_request("l1_grad", inputs, parameters=parameters))
    assert outputs["LOSS"].tolist() == [1.5]
    assert outputs["GRAD"].tolist() == [[0.75, 0.75]]


def test_parameters_that_nobody_knows_are_ignored(triton: Any) -> None:
    request = infer_request(
        "mse",
        pair(2, 3),
        parameters={
            "triton_enable_empty_final_response": True,
            "sequence_id": 7,
            "sequence_start": True,
            "binary_data_output": True,
            "headers": "x",
            "something": 1.5,
            "timeout": 60_000_000,
        },
    )
    request.parameters["priority"].uint64_param = 1
    request.parameters["nothing"].SetInParent()
    assert infer(triton, request)["LOSS"].shape == (2, 1)
    request.parameters["priority"].int64_param = 1
    assert infer(triton, request)["LOSS"].shape == (2, 1)


# ---- Typed contents ----

FIELDS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "INT16": "int_contents",
    "INT8": "int_contents",
    "UINT8": "uint_contents",
    "BOOL": "bool_contents",
}


def typed_request(model: str, inputs: dict[str, Array]) -> Any:
    request = infer_request(model, inputs)
    del request.raw_input_contents[:]
    for one in request.inputs:
        getattr(one.contents, FIELDS[one.datatype]).extend(inputs[one.name].ravel().tolist())
    return request


@pytest.mark.parametrize("dtype", FIELDS)
def test_typed_contents_are_taken_as_raw_ones_are(triton: Any, dtype: str) -> None:
    inputs = inputs_for("huber_masked", "FP32", (3, 4))
    values = np.array([-3, 0, 2, 7] * 3).reshape(3, 4)
    inputs["TARGET"] = (abs(values) if dtype in ("UINT8", "BOOL") else values).astype(DTYPES[dtype])
    expected = infer(triton, infer_request("huber_masked", inputs))
    outputs = infer(triton, typed_request("huber_masked", inputs))
    assert {name: one.tobytes() for name, one in outputs.items()} == {
        name: one.tobytes() for name, one in expected.items()
    }


def test_typed_floats_are_not_bounded_by_the_header(triton: Any) -> None:
    inputs = pair(2, 100_000)
    outputs = infer(triton, typed_request("mse", inputs))
    assert outputs["LOSS"].tobytes() == infer(triton, infer_request("mse", inputs))["LOSS"].tobytes()


@pytest.mark.parametrize("form", ["unpacked", "pieces", "two contents"])
def test_typed_floats_are_taken_in_every_form_that_protobuf_allows(
    server: RunningServer, triton: Any, connect: Connect, form: str
) -> None:
    inputs = pair(1, 4)
    raw = inputs["INPUT"].tobytes()
    contents = {
        "unpacked": wire.delimited(5, b"".join(wire.key(6, 5) + raw[at : at + 4] for at in range(0, 16, 4))),
        "pieces": wire.delimited(5, wire.delimited(6, raw[:8]) + wire.delimited(6, raw[8:])),
        "two contents": wire.delimited(5, wire.delimited(6, raw[:4])) + wire.delimited(5, wire.delimited(6, raw[4:])),
    }[form]
    request = typed_request("l1", inputs)
    request.inputs[0].ClearField("contents")
    first = request.inputs[0].SerializeToString() + contents
    del request.inputs[0]
    data = wire.delimited(5, first) + request.SerializeToString()
    response = messages.ModelInferResponse.FromString(connect(server.address).unary_unary(MODEL_INFER)(data))
    assert outputs_of(response)["LOSS"].tobytes() == infer(triton, infer_request("l1", inputs))["LOSS"].tobytes()


# ---- Counting rows ----


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 1000), (4, 0), (0, 4)], ids=str)
def test_a_masks_rows_are_counted_with_any_nonzero_byte_as_true(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).integers(0, 3, shape).astype("u1")
    counts = np.frombuffer(count_rows(memoryview(mask.tobytes()), shape[0]), "<i8")
    assert counts.tolist() == (mask != 0).sum(1).tolist()


def test_the_rows_of_a_large_mask_are_counted_too(triton: Any) -> None:
    inputs = inputs_for("l1_masked", "FP32", (3, 100_000))
    outputs = infer(triton, infer_request("l1_masked", inputs, outputs=["COUNT"]))
    assert outputs["COUNT"].ravel().tolist() == inputs["MASK"].sum(1).tolist()
