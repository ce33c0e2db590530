"""Builds ModelInferRequests and reads answers with tritonclient's messages and stub: nothing of our own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.server.calling import Failure, failure_of
from tests.server.serving import PATIENCE_SECONDS

messages: Any = service_pb2

MODEL_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"

DTYPES: Final[dict[str, Any]] = {
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "INT16": np.dtype("<i2"),
    "INT8": np.dtype("i1"),
    "UINT8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Value = bool | int | float | str
Array = NDArray[Any]


def stub_on(channel: grpc.Channel) -> Any:
    """Return tritonclient's stub over a channel."""
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def set_parameters(target: Any, values: Mapping[str, Value]) -> None:
    """Set the parameters of a request or a tensor, each as the type that Python's has."""
    for name, value in values.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(target[name], kind, value)


def infer_request(
    model: str,
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] = (),
    parameters: Mapping[str, Value] | None = None,
    **fields: Any,
) -> Any:
    """Return a ModelInferRequest of raw contents."""
    request = messages.ModelInferRequest(model_name=model, **fields)
    set_parameters(request.parameters, parameters or {})
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=NAMES[array.dtype], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return request


def pair(*shape: int, dtype: str = "FP32", seed: int = 3) -> dict[str, Array]:
    """Return random INPUT and TARGET of a shape."""
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(DTYPES[dtype]) for name in ("INPUT", "TARGET")}


def outputs_of(response: Any) -> dict[str, Array]:
    """Return a response's outputs as arrays; there must be one raw entry for each."""
    assert len(response.outputs) == len(response.raw_output_contents)
    return {
        one.name: np.frombuffer(raw, DTYPES[one.datatype]).reshape(tuple(one.shape))
        for one, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def infer(stub: Any, request: Any) -> dict[str, Array]:
    """Call ModelInfer and return its outputs."""
    return outputs_of(stub.ModelInfer(request, timeout=PATIENCE_SECONDS))


def refusal(stub: Any, request: Any) -> Failure:
    """Call ModelInfer, which must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=PATIENCE_SECONDS)
    return failure_of(caught.value)
