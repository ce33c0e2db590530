"""Builds requests out of arrays, as messages of the generated classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.tensor_pb2 import DataType, Tensor

SMOOTH_L1 = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=0.5), include_gradient=True)
L1 = pb.LossSpec(l1=pb.L1Loss())

_TYPES: dict[str, DataType] = {
    "float16": DataType.DATA_TYPE_FLOAT16,
    "float32": DataType.DATA_TYPE_FLOAT32,
    "float64": DataType.DATA_TYPE_FLOAT64,
    "int64": DataType.DATA_TYPE_INT64,
    "int32": DataType.DATA_TYPE_INT32,
    "int16": DataType.DATA_TYPE_INT16,
    "int8": DataType.DATA_TYPE_INT8,
    "uint8": DataType.DATA_TYPE_UINT8,
    "bool": DataType.DATA_TYPE_BOOL,
}


def tensor(values: Any, dtype: str = "float32") -> Tensor:
    """Return values as a tensor message."""
    array = np.asarray(values, dtype)
    return Tensor(data_type=_TYPES[dtype], shape=array.shape, data=array.tobytes())


def zeros(*shape: int, dtype: str = "float32") -> Tensor:
    return tensor(np.zeros(shape), dtype)


def array(message: Tensor) -> NDArray[Any]:
    """Return a tensor message as an array."""
    (dtype,) = (name for name, number in _TYPES.items() if number == message.data_type)
    return np.frombuffer(message.data, dtype).reshape(tuple(message.shape))


def request(
    input: Any,
    target: Any,
    *specs: pb.LossSpec,
    dtype: str = "float32",
    weight: Any = None,
    mask: Any = None,
    **more: Any,
) -> pb.ComputeLossRequest:
    """Return a request over array-likes; smooth_l1 with the gradient where no spec is given."""
    return pb.ComputeLossRequest(
        specs=specs or (SMOOTH_L1,),
        input=input if isinstance(input, Tensor) else tensor(input, dtype),
        target=target if isinstance(target, Tensor) else tensor(target, dtype),
        weight=None if weight is None else tensor(weight, dtype),
        mask=None if mask is None else tensor(mask, "bool"),
        **more,
    )
