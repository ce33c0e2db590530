"""Arrays that NumPy saved: .npy files, and members of .npz archives, compressed or not. Never a pickle."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np

from lossgrad.files.array_file import ArrayFile, Elements, FileError, unreadable
from lossgrad.files.members import choose
from lossgrad.files.raw_array import RawArray, data_type_name, native

_LOCAL_HEADER: Final = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED: Final = 1
_SKIP_BYTES: Final = 1 << 20


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def open_npy(path: Path, member: str | None) -> ArrayFile:
    """Open a .npy file."""
    if member is not None:
        raise FileError(f"{str(path)!r} is a .npy file and holds one array without a name; leave out ':{member}'")
    try:
        with path.open("rb") as file:
            header = _read_header(file, str(path))
            offset = file.tell()
    except OSError as error:
        raise unreadable(path, error) from error
    return RawArray(str(path), path, header.shape, header.dtype, offset, fortran=header.fortran)


def open_npz(path: Path, member: str | None) -> ArrayFile:
    """Open one array of a .npz archive: mapped where it is stored as it is, unpacked as it is read otherwise."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            chosen = choose(path, member, names, "array")
            info = archive.getinfo(f"{chosen}.npy")
            if info.flag_bits & _ENCRYPTED:
                raise FileError(f"'{path}:{chosen}' is encrypted; save it without a password")
            name = f"{path}:{chosen}"
            with archive.open(info) as packed:
                header = _read_header(packed, name)
                header_bytes = packed.tell()
            needed = header_bytes + math.prod(header.shape) * header.dtype.itemsize
            if info.file_size < needed:  # behind it in the archive lies something else
                raise FileError(f"{name} is cut short: it needs {needed} bytes and has {info.file_size}; write it anew")
            if info.compress_type != zipfile.ZIP_STORED:
                return _PackedArray(name, path, info, header, header_bytes)
            with path.open("rb") as file:
                file.seek(info.header_offset)
                *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes + header_bytes
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError) as error:
        raise FileError(f"{str(path)!r} cannot be read as a .npz archive: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return RawArray(name, path, header.shape, header.dtype, offset, fortran=header.fortran)


class _PackedArray(ArrayFile):
    """A compressed member: unpacked as it is read, forwards; reading backwards begins anew."""

    def __init__(self, name: str, path: Path, info: zipfile.ZipInfo, header: _Header, header_bytes: int) -> None:
        super().__init__(name, path, header.shape, data_type_name(header.dtype))
        if header.fortran:
            raise FileError(
                f"{name} is compressed and in Fortran order, so that reading a part would unpack all of it; save it with "
                "numpy.savez, or in C order: numpy.ascontiguousarray(array)"
            )
        self._info = info
        self._dtype = header.dtype
        self._header_bytes = header_bytes
        self._archive: zipfile.ZipFile | None = None
        self._stream: IO[bytes] | None = None
        self._position = 0  # of the stream, in bytes of the array

    def read(self, start: int, stop: int) -> Elements:
        """Return the elements of a range."""
        values = np.empty(max(0, stop - start), self._dtype)
        if values.size:
            try:
                self._fill(self._stream_at(start * self._dtype.itemsize), values.data.cast("B"))
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise FileError(f"{self.name} cannot be unpacked: {error}; write it anew") from error
        return Elements(native(values))

    def close(self) -> None:
        """Close the archive."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _stream_at(self, position: int) -> IO[bytes]:
        """Return the stream, of which all before `position` has been read."""
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        stream = self._stream
        if stream is not None and position < self._position:
            stream.close()
            stream = None
        if stream is None:
            stream = self._stream = self._archive.open(self._info)
            stream.read(self._header_bytes)
            self._position = 0
        while self._position < position:
            skipped = len(stream.read(min(_SKIP_BYTES, position - self._position)))
            if not skipped:
                raise EOFError("it ends before its array does")
            self._position += skipped
        return stream

    def _fill(self, stream: IO[bytes], view: memoryview) -> None:
        done = 0
        while done < len(view):
            piece = stream.read(min(_SKIP_BYTES, len(view) - done))
            if not piece:
                raise EOFError("it ends before its array does")
            view[done : done + len(piece)] = piece
            done += len(piece)
        self._position += done


def _read_header(file: IO[bytes], name: str) -> _Header:
    """Read the header of .npy data; leave the file where the elements begin."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"its format is {version[0]}.{version[1]}, which holds records")
    except (ValueError, EOFError) as error:
        raise FileError(f"{name!r} cannot be read as a .npy file: {error}") from error
    if dtype.hasobject:
        raise FileError(
            f"{name!r} holds Python objects (a pickle), which could run any program when read; save it as numbers: "
            "numpy.save(path, array.astype('float32'))"
        )
    if dtype.kind == "V":
        raise FileError(
            f"{name!r} has data type {dtype}, as NumPy saves bfloat16 and records; save it as float32, or bfloat16 in a "
            ".safetensors file"
        )
    if any(extent < 0 for extent in shape):
        raise FileError(f"{name!r} has the impossible shape {list(shape)}; write it anew")
    return _Header(shape, fortran and len(shape) > 1, dtype)
