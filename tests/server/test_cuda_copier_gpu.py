"""The process that copies GPU memory, over the real driver: memory that this process allocates, and exports by a handle."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from lossgrad_server.shared_memory.cuda_copier import CudaCopier, Refused
from lossgrad_server.shared_memory.cuda_driver import LIBRARY, Driver, DriverError
from lossgrad_server.shared_memory.cuda_records import HANDLE_BYTES, STAGING_BYTES, Became

pytestmark = pytest.mark.gpu
BYTES = STAGING_BYTES + 4097


@pytest.fixture(scope="module")
def driver() -> Driver:
    try:
        driver = Driver()
        driver.use(0)
    except (OSError, AttributeError, DriverError) as error:
        pytest.skip(f"no CUDA device: {error}")
    return driver


@pytest.fixture
def memory(driver: Driver) -> Iterator[tuple[int, bytes]]:
    """The address of device memory, and its handle."""
    library = ctypes.CDLL(LIBRARY)
    address, handle = ctypes.c_uint64(), ctypes.create_string_buffer(HANDLE_BYTES)
    assert library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(BYTES)) == 0
    assert library.cuIpcGetMemHandle(handle, address) == 0
    yield address.value, handle.raw
    assert library.cuMemFree_v2(address) == 0


def test_the_real_drivers_memory_is_read_and_written(driver: Driver, memory: tuple[int, bytes]) -> None:
    address, handle = memory
    data = np.random.default_rng(0).integers(0, 256, BYTES, np.uint8)
    driver.write(address, data.ctypes.data, BYTES)
    copier = CudaCopier(lambda _: None)
    try:
        region = copier.open(handle, 0, BYTES)
        room = memoryview(bytearray(BYTES))
        copier.read(region, 0, room)
        assert bytes(room) == data.tobytes()
        copier.write(region, 1, data[:-1].data)
        back = np.empty(BYTES, np.uint8)
        driver.read(back.ctypes.data, address, BYTES)
        assert back[0] == data[0]
        assert (back[1:] == data[:-1]).all()
        copier.close_region(region)
        with pytest.raises(Refused) as caught:
            copier.open(handle, 0, 1 << 40)
        assert caught.value.became is Became.OUTSIDE
        with pytest.raises(Refused) as caught:
            copier.open(b"\xff" * HANDLE_BYTES, 0, 1)
        assert caught.value.became is Became.REFUSED
    finally:
        copier.close()
        copier.executor.shutdown()
