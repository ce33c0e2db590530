"""torch tensors -> WireTensor, and back onto the device they came from. Imported only where the caller uses torch."""

from __future__ import annotations

from typing import Any, Final

import torch

from lossgrad.errors import InvalidRequest
from lossgrad.tensors import BFLOAT16, NAMES, Operand, check_length, refuse
from lossgrad_api.codec import WireTensor

_DTYPES: Final[dict[int, torch.dtype]] = {number: getattr(torch, name) for number, name in NAMES.items()}
_NUMBERS: Final = {dtype: number for number, dtype in _DTYPES.items()}


class TorchFamily:
    """torch, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"

    def tensor(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer as a torch tensor on the device."""
        # The bytearray is the one copy, and the tensor's own memory.
        return self.adopt(WireTensor(wire.data_type, wire.shape, bytearray(wire.data)))

    def adopt(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer as a torch tensor over its memory; on another device, as a copy there."""
        check_length(wire.data_type, wire.shape, len(wire.data))
        dtype = _DTYPES[wire.data_type]
        if not wire.data:
            return torch.empty(wire.shape, dtype=dtype, device=self._device)
        tensor = torch.frombuffer(wire.data, dtype=dtype).view(wire.shape)
        return tensor if self._is_cpu else tensor.to(self._device)

    def scalar(self, value: float, data_type: int) -> Any:
        """Return a scalar loss as a 0-d torch tensor on the device."""
        return torch.tensor(value, dtype=_DTYPES[data_type], device=self._device)


_CPU: Final = TorchFamily(torch.device("cpu"))


def read_tensor(tensor: torch.Tensor, name: str) -> Operand:
    """Return a torch tensor as an operand: cut from its graph, brought to the CPU, copied only if it has to be."""
    number = _NUMBERS.get(tensor.dtype)
    if number is None:
        advice = "send torch.view_as_real of it" if tensor.dtype.is_complex else None
        raise refuse(name, str(tensor.dtype).removeprefix("torch."), advice)
    if tensor.layout is not torch.strided:
        raise _refuse_tensor(name, f"layout {tensor.layout}", "send tensor.to_dense()")
    device = tensor.device
    if device.type == "meta":
        raise _refuse_tensor(name, "device meta, so no elements", "send a tensor that has them")
    shape = tuple(tensor.shape)
    family = _CPU if device.type == "cpu" else TorchFamily(device)
    if not tensor.numel():
        return Operand(WireTensor(number, shape, b""), family)
    elements = tensor.detach() if tensor.requires_grad else tensor
    if family is not _CPU:
        elements = elements.cpu()
    if elements.is_neg():
        elements = elements.resolve_neg()
    if not elements.is_contiguous():
        elements = elements.contiguous()
    if number == BFLOAT16:
        elements = elements.view(torch.int16)  # NumPy has no bfloat16
    return Operand(WireTensor(number, shape, elements.numpy().data.cast("B")), family)


def _refuse_tensor(name: str, what: str, advice: str) -> InvalidRequest:
    return InvalidRequest(f"{name} has {what}; {advice}", reason="UNSUPPORTED_DATA_TYPE", field=name)


def torch_dtype(data_type: int) -> torch.dtype:
    """Return the torch dtype of a DataType number."""
    return _DTYPES[data_type]


def data_type(dtype: torch.dtype) -> int | None:
    """Return the DataType number of a torch dtype, or None where no server takes it."""
    return _NUMBERS.get(dtype)
