"""A tensor of an answer that comes in slices, put together in one place: memory of its own, or the caller's array."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lossgrad.calls import Answer
from lossgrad.errors import InvalidRequest, ServerError
from lossgrad.losses import Loss
from lossgrad.results import LossResult
from lossgrad.sources import MappedPages
from lossgrad.tensors import ITEMSIZES, NAMES, Family, read_operand
from lossgrad_api.codec import WireTensor


class TensorBuffer:
    """Room for a tensor, filled range by range. `out` is the caller's array to fill, if there is one."""

    def __init__(self, data_type: int, shape: tuple[int, ...], family: Family, out: Any = None) -> None:
        self._data_type = data_type
        self._shape = shape
        self._family = family
        self._itemsize = ITEMSIZES[data_type]
        self._out = out
        self._pages = None if out is None else MappedPages.of(out)
        if out is not None:
            self._bytes = _writable(out, data_type, shape)
        else:
            count = int(np.prod(shape, dtype=np.int64))
            self._bytes = np.empty(count * self._itemsize, np.uint8).data

    def put(self, start: int, stop: int, wire: WireTensor) -> None:
        """Take the elements from `start` to before `stop`, in C order. Raises ServerError where they do not fit."""
        if wire.data_type != self._data_type or len(wire.data) != (stop - start) * self._itemsize:
            raise ServerError(
                f"the server's answer has a tensor of {len(wire.data)} bytes of "
                f"{NAMES.get(wire.data_type, wire.data_type)} for "
                f"{stop - start} elements of {NAMES[self._data_type]}"
            )
        self._bytes[start * self._itemsize : stop * self._itemsize] = wire.data
        if self._pages is not None:
            self._pages.release(start * self._itemsize, stop * self._itemsize)

    def value(self) -> Any:
        """Return the tensor: the caller's array, or one of the caller's kind."""
        if self._out is not None:
            return self._out
        return self._family.adopt(WireTensor(self._data_type, self._shape, self._bytes))


def check_out(out: Any, data_type: int, shape: tuple[int, ...]) -> None:
    """Raise InvalidRequest unless a gradient of this type and shape can be written to the array."""
    _writable(out, data_type, shape)


def gradient_outs(gradient_out: Any, losses: Sequence[Loss], *, is_single: bool) -> list[Any] | None:
    """Return where each loss's gradient is to be written, None where nowhere. Raises InvalidRequest."""
    if gradient_out is None:
        return None
    outs = [gradient_out] if is_single else list(gradient_out)
    if len(outs) != len(losses):
        raise _bad_out(f"has {len(outs)} arrays for {len(losses)} losses", "give one for each, or None")
    for loss, out in zip(losses, outs, strict=True):
        if out is not None and not loss.gradient:
            raise _bad_out(f"is given for {loss!r}, which asks for no gradient", "set gradient=True")
    return outs


def filled(answer: Answer, outs: Sequence[Any] | None) -> Answer:
    """Return an answer with its gradients in the caller's arrays, where there are any."""
    if outs is None:
        return answer
    if isinstance(answer, LossResult):
        return _filled(answer, outs[0])
    return tuple(_filled(result, out) for result, out in zip(answer, outs, strict=True))


def _filled(result: LossResult, out: Any) -> LossResult:
    if out is None:
        return result
    wire = read_operand(result.gradient, "gradient").wire
    _writable(out, wire.data_type, wire.shape)[:] = wire.data
    return dataclasses.replace(result, gradient=out)


def _writable(out: Any, data_type: int, shape: tuple[int, ...]) -> memoryview:
    """Return the bytes of the caller's array, to write to."""
    if isinstance(out, np.ndarray):
        is_flat, is_writable, array = out.flags.c_contiguous, out.flags.writeable, np.asarray(out)
    else:
        torch: Any = sys.modules.get("torch")
        if torch is None or not isinstance(out, torch.Tensor):
            raise _bad_out(f"is a {type(out).__name__}", "give a NumPy array or a torch tensor")
        if out.device.type != "cpu" or out.requires_grad:
            raise _bad_out(
                f"is on {out.device}, requires_grad={out.requires_grad}", "give a CPU tensor without a graph"
            )
        is_flat, is_writable, array = out.is_contiguous(), True, out
    own = read_operand(array[(slice(0, 0),) * max(1, array.ndim)] if array.ndim else array, "gradient_out").wire
    if tuple(array.shape) != shape or own.data_type != data_type:
        raise _bad_out(
            f"has shape {list(array.shape)} and type {NAMES[own.data_type]}, the gradient {list(shape)} and "
            f"{NAMES[data_type]}",
            "give one like the input",
        )
    if not (is_flat and is_writable):
        raise _bad_out("cannot be written to in C order", "give a writable, contiguous array")
    if isinstance(out, np.ndarray):
        return array.reshape(-1).view(np.uint8).data
    flat: np.ndarray[Any, np.dtype[np.uint8]] = out.reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return flat.data


def _bad_out(what: str, advice: str) -> InvalidRequest:
    return InvalidRequest(f"gradient_out {what}; {advice}", reason="BAD_PARAMETER", field="gradient_out")
