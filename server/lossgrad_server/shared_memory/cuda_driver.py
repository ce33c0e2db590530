"""The part of the CUDA driver that other processes' memory is copied with, through ctypes. No CUDA toolkit is needed.

Used in one process only, `cuda_process.py`, which may die of it. Names and signatures are those of cuda.h; those that end
in _v2 are what its macros make of the plain names.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from lossgrad_server.shared_memory.cuda_records import HANDLE_BYTES

LIBRARY: Final = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS: Final = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that there is

_POINTER: Final = ctypes.c_uint64  # CUdeviceptr


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


_SIGNATURES: Final[dict[str, list[Any]]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuCtxSynchronize": [],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(_POINTER), _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [_POINTER],
    "cuMemGetAddressRange_v2": [ctypes.POINTER(_POINTER), ctypes.POINTER(ctypes.c_size_t), _POINTER],
    "cuMemcpyDtoH_v2": [ctypes.c_void_p, _POINTER, ctypes.c_size_t],
    "cuMemcpyHtoD_v2": [_POINTER, ctypes.c_void_p, ctypes.c_size_t],
}


class DriverError(Exception):
    """The driver refused: its CUresult, and what was asked of it."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} gave CUresult {code}")
        self.code = code


class Driver:
    """The driver of this process, initialised. Every method may hang, or end the process."""

    def __init__(self) -> None:
        """OSError where there is no driver, AttributeError where it is too old, DriverError where it cannot be used."""
        library = ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def use(self, device_id: int) -> None:
        """Make a device's context current."""
        context = self._contexts.get(device_id)
        if context is None:
            device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), device_id)
            # The device's primary context: nobody else's, because nothing else computes in this process.
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[device_id] = context
        self._call("cuCtxSetCurrent", context)

    def open(self, handle: bytes) -> int:
        """Return the address of another process's memory."""
        address = _POINTER()
        # Not c_char's own assignment, which would end at the first zero byte.
        by_value = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, _LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Let go of it."""
        self._call("cuIpcCloseMemHandle", address)

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Return where the allocation that an address is in begins, and its bytes."""
        base, byte_count = _POINTER(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(byte_count), address)
        return base.value, byte_count.value

    def read(self, destination: int, source: int, byte_count: int) -> None:
        """Copy from the device to this process's memory, and wait for it."""
        self._call("cuMemcpyDtoH_v2", destination, source, byte_count)

    def write(self, destination: int, source: int, byte_count: int) -> None:
        """Copy from this process's memory to the device, and wait for it."""
        self._call("cuMemcpyHtoD_v2", destination, source, byte_count)
        # From pageable memory the copy returns once the driver has taken the bytes; they must be there when we answer.
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DriverError(name, code)
