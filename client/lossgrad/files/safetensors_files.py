"""Tensors in .safetensors files: a JSON header and the bytes as they are. Read here, so that bfloat16 needs no torch.

Source: the format's own description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from lossgrad.files.array_file import ArrayFile, FileError, unreadable
from lossgrad.files.members import choose
from lossgrad.files.raw_array import RawArray

_DTYPES: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_MAX_HEADER_BYTES: Final = 100_000_000  # the library's own bound


def open_safetensors(path: Path, member: str | None) -> ArrayFile:
    """Open one tensor of a .safetensors file."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise FileError(f"{str(path)!r} is no .safetensors file: its header would have {header_bytes} bytes")
            text = file.read(header_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError) as error:
        raise FileError(f"{str(path)!r} is no .safetensors file: its header is no JSON object") from error
    name = choose(path, member, list(tensors), "tensor")
    shape, data_type, start = _entry(tensors[name], f"{path}:{name}")
    return RawArray(
        f"{path}:{name}",
        path,
        shape,
        np.dtype(_DTYPES[data_type]),
        8 + header_bytes + start,
        bfloat16=data_type == "BF16",
    )


def _entry(entry: Any, name: str) -> tuple[tuple[int, ...], str, int]:
    """Return shape, type and place of a tensor. Raises FileError for what does not fit together."""
    try:
        shape, data_type, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{name} has no shape, dtype and data_offsets in the file's header; write it anew") from error
    if data_type not in _DTYPES:
        raise FileError(f"{name} has data type {data_type}, which is not supported; save it as F32 or BF16")
    if not is_sound or stop - start != math.prod(shape) * np.dtype(_DTYPES[data_type]).itemsize:
        raise FileError(
            f"{name} has shape {shape} of {data_type} in bytes {start} to {stop}, which do not fit together"
        )
    return tuple(shape), data_type, start
