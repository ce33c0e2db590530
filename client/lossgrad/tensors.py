"""Arrays of every kind -> WireTensor, and back into the kind, device and type that the caller uses. torch: torch_tensors.py.

Nothing is copied on the way in where the elements already lie in C order and little-endian. On the way out every array
is the caller's own: writable, and in memory that nobody else has.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from lossgrad.errors import InvalidRequest, ServerError
from lossgrad_api.codec import WireTensor
from lossgrad_api.raw_bytes import IS_SUPPORTED, address_of
from lossgrad_api.v1 import tensor_pb2 as pb

FLOAT16: Final = int(pb.DATA_TYPE_FLOAT16)
BFLOAT16: Final = int(pb.DATA_TYPE_BFLOAT16)
FLOAT32: Final = int(pb.DATA_TYPE_FLOAT32)
FLOAT64: Final = int(pb.DATA_TYPE_FLOAT64)
BOOL: Final = int(pb.DATA_TYPE_BOOL)

NAMES: Final = {
    FLOAT16: "float16",
    BFLOAT16: "bfloat16",
    FLOAT32: "float32",
    FLOAT64: "float64",
    int(pb.DATA_TYPE_INT64): "int64",
    int(pb.DATA_TYPE_INT32): "int32",
    int(pb.DATA_TYPE_INT16): "int16",
    int(pb.DATA_TYPE_INT8): "int8",
    int(pb.DATA_TYPE_UINT8): "uint8",
    BOOL: "bool",
}
ITEMSIZES: Final = {number: 2 if name == "bfloat16" else np.dtype(name).itemsize for number, name in NAMES.items()}
FLOATS: Final = frozenset((FLOAT16, BFLOAT16, FLOAT32, FLOAT64))

_SMALL_BYTES: Final = 64 * 1024
# What an allocator gives at least, and every operation on arrays does well with.
_ALIGNMENT: Final = 16

# Up to here a number is within the range of every type.
_SAFE: Final = 65504.0

# bfloat16 is missing: NumPy has none of its own, so its dtype object comes from the caller's array.
# Little-endian, which is what the wire has and this machine as good as surely too.
_DTYPES: Final = {number: np.dtype(name).newbyteorder("<") for number, name in NAMES.items() if name != "bfloat16"}
_NUMBERS: Final = {dtype: number for number, dtype in _DTYPES.items()}

_ADVICE: Final[dict[str, str]] = {
    "uint16": "send int32",
    "uint32": "send int64",
    "uint64": "send int64 or float64",
    "object": "send numbers; in nested lists, rows of equal lengths",
}
_KIND_ADVICE: Final[dict[str, str]] = {
    "c": "send the real and the imaginary part as a last dimension of size 2",
    "U": "send numbers",
    "S": "send numbers",
    "M": "send differences as float64",
    "m": "send numbers of a unit as float64",
}


class Family(Protocol):
    """The kind of array that a caller uses, and gets back."""

    def tensor(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer as the caller's kind of array, writable and its own."""

    def adopt(self, wire: WireTensor) -> Any:
        """As `tensor`, but in the memory that it came in, which is writable and nobody else's."""

    def scalar(self, value: float, data_type: int) -> Any:
        """Return a scalar loss in the caller's kind, rounded to the data type."""


class Operand(NamedTuple):
    """An array on its way out, and the family that the results for it belong to."""

    wire: WireTensor
    family: Family


class NumpyFamily:
    """NumPy. `bfloat16` is the dtype object of the caller's arrays of that type, if there is one."""

    def __init__(self, bfloat16: np.dtype[Any] | None = None) -> None:
        self._bfloat16 = bfloat16

    def tensor(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer as an array."""
        data_type, shape, data = wire
        dtype = _checked_dtype(data_type, shape, len(data))
        array: np.ndarray[Any, Any]
        if len(data) <= _SMALL_BYTES:
            array = np.ndarray(shape, dtype, bytearray(data))  # the shortest way to memory of one's own
        else:
            array = np.empty(shape, dtype)
            np.copyto(array, np.ndarray(shape, dtype, data))  # without the GIL
        return self._in_own_type(array, data_type)

    def adopt(self, wire: WireTensor) -> Any:
        """Return a tensor of an answer as an array over its memory."""
        data_type, shape, data = wire
        dtype = _checked_dtype(data_type, shape, len(data))
        return self._in_own_type(np.ndarray(shape, dtype, data), data_type)

    def _in_own_type(self, array: np.ndarray[Any, Any], data_type: int) -> np.ndarray[Any, Any]:
        if data_type != BFLOAT16:
            return array
        own = self._bfloat16_dtype()
        # Without a dtype object for it, float32 holds every bfloat16 exactly.
        return (array.astype(np.uint32) << 16).view(np.float32) if own is None else array.view(own)

    def scalar(self, value: float, data_type: int) -> Any:
        """Return a scalar loss as a NumPy scalar."""
        dtype = self._bfloat16_dtype() if data_type == BFLOAT16 else _DTYPES[data_type]
        kind = np.float32 if dtype is None else dtype.type
        if -_SAFE < value < _SAFE:
            return kind(value)
        with np.errstate(over="ignore"):  # beyond the type's range is infinity, as everywhere
            return kind(value)

    def _bfloat16_dtype(self) -> np.dtype[Any] | None:
        if self._bfloat16 is None and "ml_dtypes" in sys.modules:
            self._bfloat16 = np.dtype(sys.modules["ml_dtypes"].bfloat16)
        return self._bfloat16


NUMPY: Final = NumpyFamily()


def own_view(message: bytes) -> memoryview | None:
    """Return a writable view of a message that nobody else has, which keeps it alive; None where there can be none.

    A bytes object is immutable for those who see it. This one nobody sees any more but through the arrays made of it.
    """
    if not IS_SUPPORTED:
        return None
    return np.asarray(_Memory(message)).data


def tensor_of(family: Family, wire: WireTensor) -> Any:
    """Return a tensor of an answer as an array of the caller's own: in the memory that it came in, if that is its own.

    It is where it lies in an `own_view`, is aligned, and is most of what that holds: no array keeps much more memory than
    its own alive. Otherwise the array is a copy.
    """
    if len(wire.data) <= _SMALL_BYTES:
        return family.tensor(wire)
    whole: Any = wire.data.obj if isinstance(wire.data, memoryview) else None
    if isinstance(getattr(whole, "base", None), _Memory) and 2 * len(wire.data) > whole.nbytes:
        address = np.frombuffer(wire.data, np.uint8).__array_interface__["data"][0]
        if address % _ALIGNMENT == 0:
            return family.adopt(wire)
    return family.tensor(wire)


class _Memory:
    """The memory of a bytes object, for NumPy: as writable."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.__array_interface__ = {
            "data": (address_of(message), False),
            "shape": (len(message),),
            "typestr": "|u1",
            "version": 3,
        }


def read_pair(input: Any, target: Any) -> tuple[Operand, Operand]:
    """Return input and target as operands. Raises InvalidRequest for what cannot be sent.

    A Python number takes the other's floating-point type, as in NumPy and torch. A list or number gets its results in
    the other's family.
    """
    if is_number(input) and not is_number(target):
        second = read_operand(target, "target")
        return Operand(weak_operand(input, second.wire.data_type, "input"), second.family), second
    first = read_operand(input, "input")
    if is_number(target) and not is_number(input):
        return first, Operand(weak_operand(target, first.wire.data_type, "target"), first.family)
    second = read_operand(target, "target")
    if isinstance(input, (list, tuple)):
        first = Operand(first.wire, second.family)
    return first, second


def read_operand(value: Any, name: str) -> Operand:
    """Return an array as an operand. `name` is what errors call it."""
    if type(value) is np.ndarray:
        return _from_numpy(value, name)
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "Tensor") and isinstance(value, torch.Tensor):
        from lossgrad.torch_tensors import read_tensor

        return read_tensor(value, name)
    return _from_numpy(_as_numpy(value, name), name)


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy's own, and of no class of somebody else's."""
    return type(value) is np.ndarray


def read_weight(value: Any) -> WireTensor:
    """Return the weights as floating point: integers become float64."""
    wire = read_operand(value, "weight").wire
    if wire.data_type in FLOATS:
        return wire
    array = np.frombuffer(wire.data, _DTYPES[wire.data_type]).reshape(wire.shape).astype(np.float64)
    return _from_numpy(array, "weight").wire


def read_mask(value: Any) -> WireTensor:
    """Return the mask, which has to be bool: from any other type one cannot tell which elements are meant to count."""
    wire = read_operand(value, "mask").wire
    if wire.data_type != BOOL:
        raise InvalidRequest(
            f"mask is {NAMES[wire.data_type]}; send bool, true where an element counts, such as mask != 0",
            reason="UNSUPPORTED_DATA_TYPE",
            field="mask",
        )
    return wire


def promote(first: int, second: int) -> int:
    """Return the floating-point type that torch.promote_types gives for two DataType numbers."""
    if first == second or second not in FLOATS:
        return first
    if first not in FLOATS:
        return second
    # The numbers ascend with the range, save float16 and bfloat16, which meet in float32.
    return max(first, second, FLOAT32)


def broadcast_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that both broadcast to, as NumPy and torch do it; None where there is none."""
    if first == second:
        return first
    rank = max(len(first), len(second))
    shape = []
    for a, b in zip((1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True):
        if a not in (b, 1) and b != 1:
            return None
        shape.append(b if a == 1 else a)
    return tuple(shape)


def refuse(name: str, type_name: str, advice: str | None = None) -> InvalidRequest:
    """Return the error for a data type that no server takes."""
    if advice is None:
        advice = _ADVICE.get(type_name, "send float16" if type_name.startswith("float8") else "send float32 or float64")
    return InvalidRequest(
        f"{name} has data type {type_name}, which is not supported; {advice}",
        reason="UNSUPPORTED_DATA_TYPE",
        field=name,
    )


def check_length(data_type: int, shape: tuple[int, ...], byte_count: int) -> None:
    """Raise ServerError unless an answer's tensor holds what its shape and type say."""
    itemsize = ITEMSIZES.get(data_type)
    if itemsize is None or itemsize * math.prod(shape) != byte_count:
        raise ServerError(
            f"the server's answer has a tensor of data type {NAMES.get(data_type, data_type)} and shape {list(shape)} "
            f"with {byte_count} bytes, which do not fit together"
        )


@lru_cache(maxsize=1024)
def _checked_dtype(data_type: int, shape: tuple[int, ...], byte_count: int) -> np.dtype[Any]:
    """Return what an answer's tensor is stored in. Raises ServerError; remembered, because answers are of few kinds."""
    check_length(data_type, shape, byte_count)
    return np.dtype(np.uint16) if data_type == BFLOAT16 else _DTYPES[data_type]


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> Operand:
    family = NUMPY
    number = _NUMBERS.get(array.dtype)
    if number is None:
        number, array = _unusual(array, name)
        if number == BFLOAT16:
            family = NumpyFamily(array.dtype)
            array = array.view(np.uint16)
    if not array.size:
        return Operand(WireTensor(number, array.shape, b""), family)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return Operand(WireTensor(number, array.shape, array.data.cast("B")), family)


def _unusual(array: np.ndarray[Any, Any], name: str) -> tuple[int, np.ndarray[Any, Any]]:
    """Return the type of an array that is not one of NumPy's own little-endian, and the array so."""
    dtype = array.dtype
    if dtype.name == "bfloat16" and dtype.itemsize == 2:
        return BFLOAT16, array
    swapped = dtype.newbyteorder("<")
    if swapped in _NUMBERS:
        return _NUMBERS[swapped], array.astype(swapped)
    raise refuse(name, dtype.name, _KIND_ADVICE.get(dtype.kind))


def _as_numpy(value: Any, name: str) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidRequest(
            f"{name} is a masked array; send {name}.filled(0), and mask=~numpy.ma.getmaskarray({name})",
            reason="UNSUPPORTED_DATA_TYPE",
            field=name,
        )
    reader: Callable[[Any], Any] = np.asarray
    if not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
        reader = np.from_dlpack
    try:
        array = reader(value)
    except (ValueError, TypeError, RuntimeError, BufferError, OverflowError) as error:
        raise InvalidRequest(
            f"{name} ({type(value).__name__}) cannot be read as an array: {error}; send a NumPy array or a torch "
            "tensor",
            reason="UNSUPPORTED_DATA_TYPE",
            field=name,
        ) from error
    return np.asarray(array)


def is_number(value: Any) -> bool:
    """Whether a value is a Python number, which has no data type of its own."""
    # numpy.float64 is a float as well, but has a type of its own.
    return isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)


def weak_operand(value: float, data_type: int, name: str) -> WireTensor:
    """Return a Python number in the other tensor's type, if that is floating point."""
    if data_type not in FLOATS or isinstance(value, bool):
        return _from_numpy(_as_numpy(value, name), name).wire
    try:
        number = float(value)
        data = _bfloat16_bytes(number) if data_type == BFLOAT16 else _pack(number, data_type)
    except OverflowError:
        raise InvalidRequest(
            f"{name} is {value!r}, which is beyond the range of {NAMES[data_type]}, the type of the other tensor; "
            "send both as float64",
            reason="UNSUPPORTED_DATA_TYPE",
            field=name,
        ) from None
    return WireTensor(data_type, (), data)


def _pack(number: float, data_type: int) -> bytes:
    return struct.pack({FLOAT16: "<e", FLOAT32: "<f", FLOAT64: "<d"}[data_type], number)


def _bfloat16_bytes(number: float) -> bytes:
    if math.isnan(number):
        return b"\xc0\x7f"
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
    if rounded & 0x7FFF == 0x7F80 and not math.isinf(number):
        raise OverflowError
    return struct.pack("<H", rounded)
