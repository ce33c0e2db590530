"""Arrays of every kind to the wire and back: types, layouts, families, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lossgrad.errors import InvalidRequest, ServerError
from lossgrad.tensors import NumpyFamily, promote, read_mask, read_operand, read_pair, read_weight
from lossgrad_api.codec import WireTensor
from lossgrad_api.v1 import tensor_pb2 as pb

Array = Any

NUMPY_DTYPES = {
    "float16": pb.DATA_TYPE_FLOAT16,
    "float32": pb.DATA_TYPE_FLOAT32,
    "float64": pb.DATA_TYPE_FLOAT64,
    "int64": pb.DATA_TYPE_INT64,
    "int32": pb.DATA_TYPE_INT32,
    "int16": pb.DATA_TYPE_INT16,
    "int8": pb.DATA_TYPE_INT8,
    "uint8": pb.DATA_TYPE_UINT8,
    "bool": pb.DATA_TYPE_BOOL,
}
TORCH_DTYPES = {**NUMPY_DTYPES, "bfloat16": pb.DATA_TYPE_BFLOAT16}

# Each takes a (4, 6) array and gives what the wire has to hold, element for element, in C order.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "columns": lambda a: a[:, ::2],
    "rows": lambda a: a[1::2],
    "broadcast": lambda a: a[:1] if not isinstance(a, np.ndarray) else np.broadcast_to(a[:1], (3, 6)),
    "one element": lambda a: a[:1, :1],
    "0-d": lambda a: a[2, 3],
    "empty": lambda a: a[:0],
    "empty inside": lambda a: a[:, :0],
}
NUMPY_LAYOUTS: dict[str, Callable[[Array], Array]] = {
    **LAYOUTS,
    "reversed": lambda a: a[::-1],
    "reversed columns": lambda a: a[:, ::-2],
    "0-d array": lambda a: a[2:3, 3:4].reshape(()),
    "fortran": np.asfortranarray,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
}
TORCH_LAYOUTS: dict[str, Callable[[Array], Array]] = {
    **LAYOUTS,
    "expanded": lambda a: a[:1].expand(3, 6),
    "channels": lambda a: a.reshape(2, 3, 4).movedim(0, 2),
}


def numpy_values(dtype: Any) -> np.ndarray[Any, Any]:
    return (np.arange(24) - 11).astype(dtype).reshape(4, 6)


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_arrays_are_sent_in_c_order_and_come_back_equal_writable_and_their_own(name: str, layout: str) -> None:
    array = NUMPY_LAYOUTS[layout](numpy_values(name))
    wire, family = read_operand(array, "input")
    assert wire.data_type == NUMPY_DTYPES[name]
    assert wire.shape == array.shape
    assert bytes(wire.data) == np.ascontiguousarray(array).tobytes()
    back = family.tensor(wire)
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.flags.writeable
    assert back.flags.aligned
    assert not np.shares_memory(back, np.asarray(array))
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
def test_numpy_bfloat16_keeps_the_callers_dtype(layout: str) -> None:
    array = NUMPY_LAYOUTS[layout](numpy_values(ml_dtypes.bfloat16))
    wire, family = read_operand(array, "input")
    assert wire.data_type == pb.DATA_TYPE_BFLOAT16
    assert bytes(wire.data) == np.ascontiguousarray(array).tobytes()
    back = family.tensor(wire)
    assert back.dtype == np.dtype(ml_dtypes.bfloat16)
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)
    assert family.scalar(1.0, pb.DATA_TYPE_BFLOAT16) == ml_dtypes.bfloat16(1.0)


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_torch_tensors_are_sent_in_c_order_and_come_back_equal(name: str, layout: str) -> None:
    dtype = getattr(torch, name)
    tensor = TORCH_LAYOUTS[layout]((torch.arange(24) - 11).to(dtype).reshape(4, 6))
    wire, family = read_operand(tensor, "input")
    assert wire.data_type == TORCH_DTYPES[name]
    assert wire.shape == tuple(tensor.shape)
    assert len(wire.data) == tensor.numel() * tensor.element_size()
    back = family.tensor(wire)
    assert back.dtype == dtype
    assert back.device == tensor.device
    assert torch.equal(back, tensor)
    assert not tensor.numel() or back.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int64", "int32", "int16"])
def test_big_endian_arrays_are_sent_little_endian(name: str) -> None:
    values = numpy_values(name)
    wire, _ = read_operand(values.astype(values.dtype.newbyteorder(">")), "input")
    assert wire.data_type == NUMPY_DTYPES[name]
    assert bytes(wire.data) == values.tobytes()


def test_contiguous_elements_are_not_copied() -> None:
    array = np.zeros(8, np.float32)
    tensor = torch.zeros(8)
    seen, seen_too = read_operand(array, "input").wire.data, read_operand(tensor, "target").wire.data
    array[0], tensor[0] = 1.0, 1.0
    assert bytes(seen[:4]) == bytes(seen_too[:4]) == np.float32(1).tobytes()


def test_tensors_in_a_graph_are_cut_from_it() -> None:
    wire, family = read_operand(torch.ones(2, requires_grad=True) * 2, "input")
    assert bytes(wire.data) == np.full(2, 2, np.float32).tobytes()
    assert not family.tensor(wire).requires_grad


def test_a_parameter_and_a_negated_view_are_read_as_values() -> None:
    assert bytes(read_operand(torch.nn.Parameter(torch.ones(1)), "input").wire.data) == np.float32(1).tobytes()
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    assert bytes(read_operand(negated, "input").wire.data) == np.float32(-2).tobytes()


def test_lists_numbers_and_array_likes_become_numpy() -> None:
    class Subclass(np.ndarray[Any, Any]):
        pass

    class Like:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.ones(2, np.float32)

    class Dlpack:
        def __dlpack__(self, **options: Any) -> Any:
            return np.ones(2, np.float16).__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return np.ones(2, np.float16).__dlpack_device__()

    for value, number, shape in (
        ([1.0, 2.0], pb.DATA_TYPE_FLOAT64, (2,)),
        (((1, 2), (3, 4)), pb.DATA_TYPE_INT64, (2, 2)),
        ([True, False], pb.DATA_TYPE_BOOL, (2,)),
        ([], pb.DATA_TYPE_FLOAT64, (0,)),
        (1.5, pb.DATA_TYPE_FLOAT64, ()),
        (np.float32(1.5), pb.DATA_TYPE_FLOAT32, ()),
        (np.ones((1, 1)).view(Subclass), pb.DATA_TYPE_FLOAT64, (1, 1)),
        (Like(), pb.DATA_TYPE_FLOAT32, (2,)),
        (Dlpack(), pb.DATA_TYPE_FLOAT16, (2,)),
    ):
        wire, family = read_operand(value, "input")
        assert (wire.data_type, wire.shape) == (number, shape)
        assert isinstance(family, NumpyFamily)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("number", [0.1, 1, -2.5, float("inf"), float("nan")])
def test_a_python_number_takes_the_type_of_the_other_operand(dtype: str, number: float) -> None:
    array = np.ones(3, dtype)
    expected = np.array(number, dtype).tobytes()
    first, second = read_pair(array, number)
    assert second.wire == WireTensor(NUMPY_DTYPES[dtype], (), expected)
    first, second = read_pair(number, array)
    assert first.wire == WireTensor(NUMPY_DTYPES[dtype], (), expected)
    tensor = torch.ones(3, dtype=getattr(torch, dtype))
    first, _ = read_pair(number, tensor)
    assert bytes(first.wire.data) == expected
    assert isinstance(first.family.tensor(first.wire), torch.Tensor)


@pytest.mark.parametrize(
    "number", [0.1, 1.0, -2.5, 3.3895e38, 1e-40, float("inf"), float("nan"), 1.00390625, 1.01171875]
)
def test_a_python_number_beside_bfloat16_is_rounded_as_torch_does(number: float) -> None:
    _, second = read_pair(torch.ones(3, dtype=torch.bfloat16), number)
    back = torch.frombuffer(bytearray(second.wire.data), dtype=torch.bfloat16)[0]
    torch.testing.assert_close(back, torch.tensor(number, dtype=torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 1e6), (torch.float32, 1e39), (torch.bfloat16, 3.4e38)])
def test_a_python_number_beyond_the_other_operands_type_is_refused(dtype: torch.dtype, number: float) -> None:
    with pytest.raises(
        InvalidRequest, match=f"target is {number!r}.*beyond the range of".replace("+", r"\+")
    ) as raised:
        read_pair(torch.ones(2, dtype=dtype), number)
    assert raised.value.field == "target"


def test_integers_beside_a_number_and_bools_keep_their_own_types() -> None:
    assert read_pair(np.ones(2, np.int32), 1.5)[1].wire.data_type == pb.DATA_TYPE_FLOAT64
    assert read_pair(np.ones(2, np.float32), True)[1].wire.data_type == pb.DATA_TYPE_BOOL
    assert read_pair(1.5, 2)[0].wire.data_type == pb.DATA_TYPE_FLOAT64


def test_results_for_a_list_come_in_the_family_of_the_other_operand() -> None:
    first, _ = read_pair([1.0, 2.0], torch.ones(2))
    assert isinstance(first.family.tensor(first.wire), torch.Tensor)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.ones(2, np.complex64), "complex64.*real and the imaginary"),
        (np.ones(2, np.uint16), "uint16.*int32"),
        (np.ones(2, np.uint32), "uint32.*int64"),
        (np.ones(2, np.uint64), "uint64.*int64 or float64"),
        (np.ones(2, np.longdouble), "longdouble|float128.*float32 or float64"),
        (np.array([object()]), "object.*rows of equal length"),
        (np.array(["a"]), "str.*send numbers"),
        (np.array([b"a"]), "bytes.*send numbers"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64.*float64"),
        (np.ones(2, [("a", "f4")]), "void.*float32 or float64"),
        (np.ones(2, ml_dtypes.float8_e4m3fn), "float8_e4m3fn.*float16"),
        (np.ones(2, ml_dtypes.int4), "int4.*float32"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), r"masked array.*filled\(0\).*mask="),
        (torch.ones(2, dtype=torch.complex64), "complex64.*view_as_real"),
        (torch.ones(2, dtype=torch.uint16), "uint16.*int32"),
        (torch.ones(2).to(torch.float8_e5m2), "float8_e5m2.*float16"),
        (torch.eye(2).to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
        (torch.ones(2, device="meta"), "device meta"),
        (None, "object"),
        ("text", "str"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        (2**70, "object"),
    ],
)
def test_what_no_server_takes_is_refused_by_name_with_what_to_send(value: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as raised:
        read_operand(value, "target")
    assert raised.value.field == "target"
    assert raised.value.reason == "UNSUPPORTED_DATA_TYPE"
    assert str(raised.value).startswith("target ")


def test_a_dlpack_object_on_another_device_is_refused() -> None:
    class Elsewhere:
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("the data is on cuda:0")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    with pytest.raises(InvalidRequest, match=r"input \(Elsewhere\) cannot be read as an array"):
        read_operand(Elsewhere(), "input")


def test_integer_weights_become_float64_and_floats_stay() -> None:
    wire = read_weight([[1, 0], [2, 3]])
    assert wire.data_type == pb.DATA_TYPE_FLOAT64
    assert wire.shape == (2, 2)
    assert bytes(wire.data) == np.array([[1.0, 0.0], [2.0, 3.0]]).tobytes()
    assert read_weight(torch.ones(2, dtype=torch.bfloat16)).data_type == pb.DATA_TYPE_BFLOAT16
    assert read_weight(np.array([True, False])).data_type == pb.DATA_TYPE_FLOAT64


@pytest.mark.parametrize("mask", [np.ones(2, np.uint8), torch.ones(2), [1, 0]])
def test_a_mask_that_is_not_bool_is_refused(mask: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"mask is .*; send bool") as raised:
        read_mask(mask)
    assert raised.value.field == "mask"
    assert read_mask([True, False]).data == b"\x01\x00"


TYPE_NAMES = list(TORCH_DTYPES)


@pytest.mark.parametrize("first", TYPE_NAMES)
@pytest.mark.parametrize("second", TYPE_NAMES)
def test_types_promote_as_in_torch(first: str, second: str) -> None:
    expected = torch.promote_types(getattr(torch, first), getattr(torch, second))
    if expected.is_floating_point:
        assert promote(TORCH_DTYPES[first], TORCH_DTYPES[second]) == TORCH_DTYPES[str(expected).removeprefix("torch.")]


@pytest.mark.parametrize("value", [1.1, 1e6, -1e300, float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_scalar_losses_are_rounded_to_the_type_and_overflow_to_infinity(name: str, value: float) -> None:
    dtype = getattr(torch, name)
    expected = torch.tensor(value, dtype=torch.float64).to(dtype)
    wire = WireTensor(TORCH_DTYPES[name], (1,), bytes(expected.element_size()))
    family = read_operand(torch.ones(1), "input").family
    torch.testing.assert_close(family.scalar(value, wire.data_type), expected, rtol=0, atol=0, equal_nan=True)
    scalar = NumpyFamily().scalar(value, wire.data_type)
    assert isinstance(scalar, np.generic)
    np.testing.assert_equal(float(scalar), float(expected))


def test_numpy_gets_bfloat16_as_float32_where_nothing_defines_it() -> None:
    code = """
import sys
sys.modules["ml_dtypes"] = None  # not importable
import numpy as np
from lossgrad.tensors import NumpyFamily
from lossgrad_api.codec import WireTensor
del sys.modules["ml_dtypes"]
family = NumpyFamily()
array = family.tensor(WireTensor(2, (2,), b"\\x80\\x3f\\x20\\xc0"))
assert array.dtype == np.float32 and array.tolist() == [1.0, -2.5], array
assert family.scalar(1.5, 2).dtype == np.float32
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("wire", [WireTensor(3, (2,), b"1234567"), WireTensor(0, (), b""), WireTensor(99, (1,), b"1")])
def test_an_answer_that_does_not_fit_together_is_the_servers_error(wire: WireTensor) -> None:
    for family in (NumpyFamily(), read_operand(torch.ones(1), "input").family):
        with pytest.raises(ServerError, match="do not fit together"):
            family.tensor(wire)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_results_go_back_to_the_inputs_device() -> None:
    wire, family = read_operand(torch.ones(3, device="cuda"), "input")
    assert family.tensor(wire).device.type == "cuda"
    assert family.scalar(1.0, wire.data_type).device.type == "cuda"
