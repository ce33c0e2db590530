"""Writes the same arrays into every kind of file that can be read, with the libraries that users write them with."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from safetensors.numpy import save_file

Arrays = Mapping[str, Any]  # of arrays


def column_of(array: np.ndarray[Any, Any], *, fixed: bool = True) -> Any:
    """Return an array as an Arrow column: numbers, or lists for its further dimensions."""
    if array.ndim == 1:
        return pa.array(array)
    if fixed:
        return pa.FixedSizeListArray.from_arrays(column_of(array.reshape(-1, *array.shape[2:])), array.shape[1])
    offsets = pa.array(np.arange(0, array.size + 1, array.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)))


def table_of(arrays: Arrays, *, fixed: bool = True) -> Any:
    return pa.table({name: column_of(array, fixed=fixed) for name, array in arrays.items()})


def write_npz(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)


def write_compressed_npz(path: Path, arrays: Arrays) -> None:
    np.savez_compressed(path, **arrays)


def write_deflated_by_hand(path: Path, arrays: Arrays) -> None:
    """Write a .npz with a comment and an extra field in front of the data, as other writers leave them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.extra = b"\x99\x99\x04\x00abcd"
            archive.writestr(info, data.getvalue())


def write_safetensors(path: Path, arrays: Arrays) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def write_parquet(path: Path, arrays: Arrays) -> None:
    pyarrow.parquet.write_table(table_of(arrays), path, row_group_size=137, compression="zstd")


def write_parquet_lists(path: Path, arrays: Arrays) -> None:
    pyarrow.parquet.write_table(table_of(arrays, fixed=False), path, row_group_size=1000)


def write_feather(path: Path, arrays: Arrays) -> None:
    pyarrow.feather.write_feather(table_of(arrays), path, chunksize=91, compression="lz4")


def write_arrow(path: Path, arrays: Arrays) -> None:
    pyarrow.feather.write_feather(table_of(arrays), path, chunksize=100, compression="uncompressed")


def write_arrow_stream(path: Path, arrays: Arrays) -> None:
    table = table_of(arrays, fixed=False)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=77):
            writer.write_batch(batch)


# A name for each kind of file, its suffix, and what writes it.
WRITERS: Final[dict[str, tuple[str, Callable[[Path, Arrays], None]]]] = {
    "npz": (".npz", write_npz),
    "npz compressed": (".npz", write_compressed_npz),
    "npz with extra fields": (".npz", write_deflated_by_hand),
    "safetensors": (".safetensors", write_safetensors),
    "parquet": (".parquet", write_parquet),
    "parquet of lists": (".parquet", write_parquet_lists),
    "feather": (".feather", write_feather),
    "arrow": (".arrow", write_arrow),
    "arrow stream": (".arrow", write_arrow_stream),
}
