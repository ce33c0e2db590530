"""Every kind of file gives the elements that its own library wrote, over any range, and holds little of them in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from lossgrad.files import ArrayFile, open_arrays
from tests.client.array_files import WRITERS, column_of, table_of

KINDS = sorted(WRITERS)
TYPES = ["float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


class Opened(Protocol):
    """Opens the one array that a reference stands for."""

    def __call__(self, reference: Path | str) -> ArrayFile: ...


@pytest.fixture
def opened() -> Iterator[Opened]:
    arrays: list[ArrayFile] = []

    def open_one(reference: Path | str) -> ArrayFile:
        (array,) = open_arrays(str(reference))
        arrays.append(array)
        return array

    yield open_one
    for array in arrays:
        array.close()


def write(kind: str, folder: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    suffix, writer = WRITERS[kind]
    path = folder / f"file{suffix}"
    writer(path, arrays)
    return path


def check_ranges(file: ArrayFile, expected: np.ndarray[Any, Any]) -> None:
    """Read ranges in order, then here and there, then after closing."""
    flat = expected.reshape(-1)
    assert file.shape == expected.shape
    ranges = [(start, min(flat.size, start + 64)) for start in range(0, flat.size, 64)]
    rng = np.random.default_rng(1)
    ranges += [tuple(sorted(rng.integers(0, flat.size + 1, 2).tolist())) for _ in range(20)]
    for start, stop in [*ranges, (0, flat.size), (flat.size, flat.size)]:
        values, missing = file.read(start, stop)
        assert missing is None
        assert values.dtype == flat.dtype
        np.testing.assert_array_equal(values, flat[start:stop])
    kept = file.read(0, flat.size).values
    file.close()
    np.testing.assert_array_equal(kept, flat)
    np.testing.assert_array_equal(file.read(1, 3).values, flat[1:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300,), (211, 3)])
def test_every_range_of_every_kind_of_file_has_the_elements_written(
    kind: str, shape: tuple[int, ...], tmp_path: Path, opened: Opened
) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = write(kind, tmp_path, first=np.zeros_like(array), second=array)
    file = opened(f"{path}:second")
    assert file.name == f"{path}:second"
    assert file.data_type == "float32"
    check_ranges(file, array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_that_a_server_takes_is_read(kind: str, dtype: str, tmp_path: Path, opened: Opened) -> None:
    array = (np.arange(120) % 3).astype(dtype)
    file = opened(write(kind, tmp_path, only=array))
    assert file.data_type == dtype
    check_ranges(file, array)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bool", ">f4", ">i2"])
@pytest.mark.parametrize("shape", [(1,), (129,), (5, 43), (3, 4, 11), (2, 100)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_of_any_order_and_byte_order_are_read_in_c_order(
    dtype: str, shape: tuple[int, ...], order: Any, tmp_path: Path, opened: Opened
) -> None:
    array = (np.arange(np.prod(shape)) % 7).astype(dtype).reshape(shape)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    file = opened(tmp_path / "a.npy")
    assert file.shape == shape
    flat = array.astype(array.dtype.newbyteorder("<")).reshape(-1)
    for start in range(0, flat.size, 10):
        for stop in range(start, flat.size + 1, 17):
            values = file.read(start, stop).values
            assert values.dtype == flat.dtype
            np.testing.assert_array_equal(values, flat[start:stop])


def test_a_scalar_and_an_empty_array_are_read(tmp_path: Path, opened: Opened) -> None:
    np.save(tmp_path / "scalar.npy", np.float32(2.5))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), order="F"))
    scalar, empty = opened(tmp_path / "scalar.npy"), opened(tmp_path / "empty.npy")
    assert (scalar.shape, scalar.element_count, scalar.index_of(0)) == ((), 1, [])
    assert scalar.read(0, 1).values.tolist() == [2.5]
    assert (empty.shape, empty.element_count) == ((0, 4), 0)
    assert empty.read(0, 0).values.size == 0


def bfloat16_file(folder: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    array = np.random.default_rng(0).standard_normal((40, 5)).astype(ml_dtypes.bfloat16)
    save_file({"x": array}, folder / "a.safetensors")
    return folder / "a.safetensors", array


def test_bfloat16_tensors_keep_their_type(tmp_path: Path, opened: Opened) -> None:
    path, array = bfloat16_file(tmp_path)
    file = opened(path)
    assert file.data_type == "bfloat16"
    check_ranges(file, array)


def test_bfloat16_tensors_come_as_float32_without_ml_dtypes(tmp_path: Path) -> None:
    path, array = bfloat16_file(tmp_path)
    program = f"""
import sys
sys.modules["ml_dtypes"] = None
from lossgrad.files import open_arrays
(file,) = open_arrays({str(path)!r})
values = file.read(3, 100).values
print(file.data_type, values.dtype, values.astype(float).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"bfloat16 float32 {array.reshape(-1)[3:100].astype(float).tolist()}\n"


def test_nested_lists_and_tensor_columns_are_further_dimensions(tmp_path: Path, opened: Opened) -> None:
    array = np.arange(2 * 3 * 50, dtype=np.float64).reshape(50, 2, 3)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    table = pa.table({"nested": column_of(array), "tensors": tensors.storage})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    check_ranges(opened(f"{tmp_path}/a.parquet:nested"), array)
    assert opened(f"{tmp_path}/a.parquet:tensors").shape == (50, 6)
    pyarrow.feather.write_feather(pa.table({"t": tensors}), tmp_path / "b.feather")
    assert opened(tmp_path / "b.feather").shape == (50, 6)


def test_nulls_are_told_apart_from_nan(tmp_path: Path, opened: Opened) -> None:
    numbers = pa.array([1.0, None, float("nan"), 4.0], pa.float32())
    flags = pa.array([True, None, False, None])
    rows = pa.FixedSizeListArray.from_arrays(
        pa.array([1, None, 3, 4, 5, 6, 7, 8]), 2, mask=pa.array([False, True, False, False])
    )
    table = pa.table({"numbers": numbers, "flags": flags, "rows": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        values, missing = opened(f"{tmp_path}/{name}:numbers").read(0, 4)
        assert missing is not None
        assert missing.tolist() == [False, True, False, False]
        assert np.isnan(values).tolist()[2:] == [True, False]
        values, missing = opened(f"{tmp_path}/{name}:flags").read(0, 4)
        assert missing is not None
        assert (values.dtype.kind, values[0], missing.tolist()) == ("b", True, [False, True, False, True])
        values, missing = opened(f"{tmp_path}/{name}:rows").read(1, 8)
        assert missing is not None
        assert missing.tolist() == [True, True, True, False, False, False, False]
        assert values[3:].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("name", ["a.npy", "a.npz:g", "a.parquet:g", "a.parquet:d", "a.feather:g", "a.feather:d"])
def test_labels_are_text_whatever_holds_them(name: str, tmp_path: Path, opened: Opened) -> None:
    labels = np.array([f"scene {index % 7}" for index in range(500)])
    np.save(tmp_path / "a.npy", labels)
    np.savez(tmp_path / "a.npz", g=labels)
    table = pa.table({"g": pa.array(labels.tolist()), "d": pa.array(labels.tolist()).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=60)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather", chunksize=60)
    file = opened(tmp_path / name)
    assert file.data_type == "text"
    indexes, names = file.labels(33, 400)
    assert [names[index] for index in indexes] == labels[33:400].tolist()
    assert file.labels(5, 5)[0].size == 0


def test_integers_and_flags_are_labels_as_well(tmp_path: Path, opened: Opened) -> None:
    np.save(tmp_path / "i.npy", np.array([3, -1, 3], np.int8))
    np.save(tmp_path / "b.npy", np.array([True, False, True]))
    np.save(tmp_path / "s.npy", np.array([b"a", b"\xff", b"a"]))
    assert opened(tmp_path / "i.npy").labels(0, 3)[1] == ["-1", "3"]
    assert opened(tmp_path / "b.npy").labels(0, 3)[1] == ["false", "true"]
    assert opened(tmp_path / "s.npy").labels(0, 3)[1] == ["a", "\\xff"]


def test_a_fingerprint_follows_the_data_and_not_the_path(tmp_path: Path, opened: Opened) -> None:
    array = np.random.default_rng(0).standard_normal(1 << 17)
    for name in ("a", "copy"):
        np.savez(tmp_path / f"{name}.npz", x=array, y=array + 1)
    array[array.size // 2 :] += 1
    np.savez(tmp_path / "other.npz", x=array)
    own = opened(f"{tmp_path}/a.npz:x").fingerprint()
    assert own == opened(f"{tmp_path}/copy.npz:x").fingerprint()
    assert own != opened(f"{tmp_path}/a.npz:y").fingerprint()
    assert own != opened(tmp_path / "other.npz").fingerprint()


def peak_mib_of_reading(reference: str, slice_elements: int = 1 << 18) -> float:
    """Return by how many MiB a process' memory grows at most while it reads a file from end to end."""
    program = f"""
import re
from lossgrad.files import open_arrays

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

(file,) = open_arrays({reference!r})
file.read(0, 1000)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
total = 0.0
for start in range(0, file.element_count, {slice_elements}):
    values = file.read(start, min(file.element_count, start + {slice_elements})).values
    total += float(values.sum())
print(total, memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    total, peak = map(float, done.stdout.split())
    assert total == 3.0 * (1 << 24)
    return peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("kind", ["npy", "npy fortran", "npz", "npz compressed", "safetensors", "parquet", "arrow"])
def test_reading_a_large_file_takes_little_memory(kind: str, tmp_path: Path) -> None:
    array = np.full((1 << 22, 4), 3.0, np.float32)  # 64 MiB
    path = tmp_path / "a"
    if kind.startswith("npy"):
        np.save(path.with_suffix(".npy"), np.asfortranarray(array) if "fortran" in kind else array)
        path = path.with_suffix(".npy")
    elif kind == "npz":
        np.savez(path := path.with_suffix(".npz"), x=array)
    elif kind == "npz compressed":
        np.savez_compressed(path := path.with_suffix(".npz"), x=array)
    elif kind == "safetensors":
        save_file({"x": array}, path := path.with_suffix(".safetensors"))
    elif kind == "parquet":  # all in one row group
        pyarrow.parquet.write_table(table_of({"x": array}), path, row_group_size=1 << 22)
    else:  # all in one record batch
        pyarrow.feather.write_feather(table_of({"x": array}), path, compression="uncompressed", chunksize=1 << 22)
    assert peak_mib_of_reading(str(path)) < 45
