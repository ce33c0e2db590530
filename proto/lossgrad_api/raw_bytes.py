"""Bytes objects that are written once, before anybody sees them, and large parts joined without holding the GIL.

`b"".join` holds the GIL while it copies anything but bytes objects: 64 MiB hold up every other thread for tens of
milliseconds. A bytes object is immutable once others see it; until then whoever made it may fill it, as the C API has it.
Only CPython has these functions: elsewhere `IS_SUPPORTED` is false, and `join_without_gil` is `b"".join`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Final

from lossgrad_api.wire import Buffer

IS_SUPPORTED: Final = sys.implementation.name == "cpython"

_WRITABLE: Final = 0x200  # PyBUF_WRITE
_SIMPLE: Final = 0  # PyBUF_SIMPLE: contiguous bytes


class _PyBuffer(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.pythonapi, name)
    function.restype, function.argtypes = result, arguments
    return function


if IS_SUPPORTED:
    _new_bytes = _function("PyBytes_FromStringAndSize", ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)
    _address_of = _function("PyBytes_AsString", ctypes.c_void_p, ctypes.py_object)
    _view = _function("PyMemoryView_FromMemory", ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    _get_buffer = _function(
        "PyObject_GetBuffer", ctypes.c_int, ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int
    )
    _release_buffer = _function("PyBuffer_Release", None, ctypes.POINTER(_PyBuffer))


def new_bytes(size: int) -> tuple[bytes, int]:
    """Return a bytes object whose contents are still to be written, and its address. Raises MemoryError."""
    made: bytes = _new_bytes(None, size)
    return made, _address_of(made)


def address_of(data: bytes) -> int:
    """Return where the contents of a bytes object are."""
    address: int = _address_of(data)
    return address


def writable_view(address: int, size: int) -> memoryview:
    """Return a writable view of memory, which does not keep alive what the memory belongs to."""
    view: memoryview = _view(address, size, _WRITABLE)
    return view


def copy_without_gil(address: int, part: Buffer) -> None:
    """Copy a contiguous part to an address. Other threads run meanwhile. The caller answers for what is there."""
    if not IS_SUPPORTED:
        writable = (ctypes.c_char * len(part)).from_address(address)
        memoryview(writable).cast("B")[:] = part
        return
    source = _PyBuffer()
    _get_buffer(part, source, _SIMPLE)
    try:
        ctypes.memmove(address, source.buf, source.len)
    finally:
        _release_buffer(source)


def join_without_gil(parts: Sequence[Buffer]) -> bytes:
    """Return the parts, which are contiguous, as one bytes object. Other threads run while it copies."""
    if not IS_SUPPORTED:
        return b"".join(parts)
    joined, address = new_bytes(sum(map(len, parts)))
    write_without_gil(address, parts)
    return joined


def write_without_gil(address: int, parts: Sequence[Buffer]) -> None:
    """Copy the parts, which are contiguous, one behind the other to memory of `new_bytes`. Other threads run meanwhile."""
    source = _PyBuffer()
    for part in parts:
        _get_buffer(part, source, _SIMPLE)
        try:
            ctypes.memmove(address, source.buf, source.len)  # a call of ctypes' own kind, which lets go of the GIL
        finally:
            _release_buffer(source)
        address += len(part)
