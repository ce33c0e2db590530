"""From what the command line says, `PATH[:NAME]`, to open arrays: folders, patterns, and which reader a file wants."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from lossgrad.files.array_file import ArrayFile, FileError, unreadable
from lossgrad.files.arrow_files import open_arrow, open_parquet
from lossgrad.files.numpy_files import open_npy, open_npz
from lossgrad.files.safetensors_files import open_safetensors

_Open = Callable[[Path, str | None], ArrayFile]
# By their first bytes, whatever they are called.
_READERS: Final[tuple[tuple[bytes, _Open], ...]] = (
    (b"\x93NUMPY", open_npy),
    (b"PK\x03\x04", open_npz),
    (b"PK\x05\x06", open_npz),
    (b"PAR1", open_parquet),
    (b"ARROW1", open_arrow),
    (b"\xff\xff\xff\xff", open_arrow),
)
_TORCH_SUFFIXES: Final = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES: Final = (".npy", ".npz", ".safetensors", ".parquet", ".pq", ".arrow", ".feather", ".arrows")
_KINDS: Final = ".npy, .npz, .safetensors, .parquet, .arrow or .feather"
# What else is met, by its first bytes, and what to do with it.
_FOREIGN: Final = (
    (b"\x89HDF", "an HDF5 file; save its data set with numpy.save"),
    (b"FEA1", "a Feather file of version 1; write it with version 2"),
    (b"\x80\x02", "a pickle, which could run any program when read; save it with numpy.save"),
    (b"\x80\x04", "a pickle, which could run any program when read; save it with numpy.save"),
    (b"\x80\x05", "a pickle, which could run any program when read; save it with numpy.save"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
)


def open_arrays(reference: str, *, beside: Sequence[ArrayFile] = ()) -> list[ArrayFile]:
    """Open the arrays that `PATH[:NAME]` stands for, in the order of their paths' names.

    PATH is a file, a folder (its files, not those of folders in it) or a pattern such as 'part-*.npz'. NAME is which array
    of an archive, safetensors file or table; it may be left out where there is only one. Where `beside` is given, a bare
    NAME means that array in the files of `beside`. Raises FileError.
    """
    pattern, member = split_reference(reference)
    if beside and member is None and not _exists(pattern) and "/" not in reference:
        paths = [array.path for array in beside]
        if all(path.suffix.lower() != ".npy" for path in paths):
            return _open_all(paths, reference)
    return _open_all(_expand(pattern), member)


def split_reference(reference: str) -> tuple[str, str | None]:
    """Return the path (or pattern) and the name of `PATH[:NAME]`. Either may have colons."""
    if not Path(reference).exists():
        position = reference.find(":")
        while position > 0:
            path = reference[:position]
            if _exists(path) or path.lower().endswith(_SUFFIXES):
                return path, reference[position + 1 :]
            position = reference.find(":", position + 1)
    return reference, None


def _exists(pattern: str) -> bool:
    return Path(pattern).exists() or bool(_matches(pattern))


def _matches(pattern: str) -> list[Path]:
    # Path.glob takes patterns below one folder only; these may begin anywhere.
    found = glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else []  # noqa: PTH207
    return sorted(Path(name) for name in found)


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_shard(file))
        if not files:
            raise FileError(f"the folder {pattern!r} has no {_KINDS} file")
        return files
    if not path.exists() and glob.has_magic(pattern):
        files = [file for file in _matches(pattern) if file.is_file()]
        if not files:
            raise FileError(f"{pattern!r} matches no file")
        return files
    return [path]


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _open_all(paths: Sequence[Path], member: str | None) -> list[ArrayFile]:
    opened: list[ArrayFile] = []
    try:
        opened.extend(_open(path, member) for path in paths)
    except BaseException:
        for array in opened:
            array.close()
        raise
    return opened


def _open(path: Path, member: str | None) -> ArrayFile:
    return _opener(path)(path, member)


def _opener(path: Path) -> _Open:
    """Return the reader that a file's first bytes ask for, whatever its name."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise unreadable(path, error) from error
    suffix = path.suffix.lower()
    if head and suffix == ".safetensors":  # it has no magic of its own
        return open_safetensors
    if suffix not in _TORCH_SUFFIXES:  # torch's files are zip archives as well
        for magic, reader in _READERS:
            if head.startswith(magic):
                return reader
    if head[8:] == b"{":
        return open_safetensors
    raise FileError(f"{str(path)!r} {_what_it_is(suffix, head)}")


def _what_it_is(suffix: str, head: bytes) -> str:
    if not head:
        return "is empty"
    if suffix in _TORCH_SUFFIXES:
        return (
            "is what torch.save writes, a pickle, which could run any program when read; save it with "
            "numpy.save(path, tensor.numpy()) or safetensors.torch.save_file"
        )
    for magic, advice in _FOREIGN:
        if head.startswith(magic):
            return f"is {advice}"
    if suffix in _SUFFIXES:
        return f"cannot be read as a {suffix} file: it begins with {head[:6]!r}"
    return f"is none of the files that can be read; give {_KINDS}"
