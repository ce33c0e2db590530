"""Triton's own client with tensors in CUDA regions, over a driver that is none: the native API's bits, and what goes wrong.

The whole way is taken: tritonclient, the server, the process that copies, "device" memory, and back.
"""

from __future__ import annotations

import base64
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

import lossgrad
from lossgrad_server.shared_memory.cuda import CudaAndSystemRegions
from lossgrad_server.shared_memory.cuda_copier import CudaCopier
from tests.server.cuda_standin import COPY_CRASHES, COPY_FAILS, COPY_HANGS, OPEN_CRASHES, DeviceMemory, build
from tests.server.serving import RunningServer, eventually

triton: Any = tritonclient.grpc  # it has no types
NAMES: dict[Any, str] = {np.float16: "FP16", np.float32: "FP32", np.float64: "FP64"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(build(tmp_path_factory.mktemp("driver"))))
        yield


@pytest.fixture(scope="module")
def sharing(driver: None) -> Iterator[RunningServer]:
    with RunningServer(allow_shared_memory=True, allow_cuda_shared_memory=True) as running:
        yield running


@pytest.fixture
def client(sharing: RunningServer) -> Iterator[Any]:
    with triton.InferenceServerClient(sharing.address) as client:
        yield client
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()


def copier_of(running: RunningServer) -> CudaCopier:
    memory = running.server._core.shared_memory
    assert memory is not None
    assert isinstance(memory.system_regions, CudaAndSystemRegions)
    return memory.system_regions.copier


def register(client: Any, name: str, memory: DeviceMemory, byte_size: int, device: int = 0) -> None:
    client.register_cuda_shared_memory(name, base64.b64encode(memory.handle), device, byte_size)


@contextmanager
def registered(client: Any, name: str, byte_count: int, fault: int = 0) -> Iterator[DeviceMemory]:
    with DeviceMemory(byte_count, fault) as memory:
        register(client, name, memory, byte_count)
        yield memory


def operands(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return np.random.default_rng(shape[0]).normal(size=(2, *shape)).astype(dtype)


def inputs_in(region: str, shape: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    """Return INPUT and TARGET, which are one behind the other in a region."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    inputs = [triton.InferInput(name, shape, NAMES[dtype]) for name in ("INPUT", "TARGET")]
    inputs[0].set_shared_memory(region, size)
    inputs[1].set_shared_memory(region, size, offset=size)
    return inputs


def refused(code: str, match: str) -> Any:
    return pytest.raises(triton.InferenceServerException, match=rf"StatusCode\.{code}\] .*{match}")


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("rows", [1, 1100], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("where", ["out", "in", "system"], ids=["apart", "over the input", "in a system region"])
def test_the_bits_are_those_of_the_native_api(
    sharing: RunningServer, client: Any, dtype: Any, rows: int, where: str
) -> None:
    """1100 rows of a thousand doubles are more than the staging memory holds at a time."""
    shape = (rows, 1000)
    input, target = operands(shape, dtype)
    with lossgrad.LossClient(sharing.address) as native:
        expected = native.smooth_l1(input, target, beta=0.5, reduction="sample_mean", gradient=True)
    size = input.nbytes
    system = SharedMemory(f"lossgrad_{uuid.uuid4().hex}", create=True, size=size)
    try:
        client.register_system_shared_memory("system", f"/{system.name}", size)
        with registered(client, "in", 2 * size) as both, registered(client, "out", size + 32768) as results:
            both.array(dtype, (2, *shape))[:] = input, target
            outputs = [triton.InferRequestedOutput(name) for name in ("GRAD", "LOSS", "COUNT")]
            at = 32768 if where == "out" else 0
            outputs[0].set_shared_memory(where, size, offset=at)
            outputs[1].set_shared_memory("out", rows * input.itemsize)
            answer = client.infer(
                "smooth_l1_grad", inputs_in("in", shape, dtype), outputs=outputs, parameters={"beta": "0.5"}
            )
            assert list(answer.as_numpy("COUNT").ravel()) == [1000] * rows
            assert system.buf is not None
            room = {"in": memoryview(both.memory), "out": memoryview(results.memory), "system": system.buf}[where]
            assert bytes(room[at : at + size]) == expected.gradient.tobytes()
            assert results.memory[: rows * input.itemsize] == expected.loss.tobytes()
            assert both.memory[size:] == target.tobytes()
    finally:
        system.close()
        system.unlink()


def test_a_stream_takes_them_too(client: Any) -> None:
    shape = (4, 1000)
    answers: list[Any] = []
    with registered(client, "in", 2 * 16000) as both:
        both.array(np.float32, (2, *shape))[:] = operands(shape)
        client.start_stream(lambda result, error: answers.append((result, error)))
        for _ in range(5):
            client.async_stream_infer("mse", inputs_in("in", shape))
        client.stop_stream()
    input, target = operands(shape)
    expected = np.mean((input.astype(np.float64) - target) ** 2, axis=1)
    assert len(answers) == 5
    for result, error in answers:
        assert error is None
        np.testing.assert_allclose(result.as_numpy("LOSS").ravel(), expected, rtol=1e-6)


def test_they_are_told_and_given_back(sharing: RunningServer, client: Any) -> None:
    assert "cuda_shared_memory" in client.get_server_metadata().extensions
    with DeviceMemory(1000) as memory:
        register(client, "a", memory, 1000)
        register(client, "b", memory, 600, device=1)
        regions = client.get_cuda_shared_memory_status().regions
        assert {name: (one.name, one.device_id, one.byte_size) for name, one in regions.items()} == {
            "a": ("a", 0, 1000),
            "b": ("b", 1, 600),
        }
        assert list(client.get_cuda_shared_memory_status("b").regions) == ["b"]
        assert 'lossgrad_shm_bytes{kind="cuda"} 1600.0' in metrics_of(sharing)
        client.unregister_cuda_shared_memory("a")
        client.unregister_cuda_shared_memory("a")  # unknown ones are ignored
        with refused("NOT_FOUND", "no region 'a'"):
            client.get_cuda_shared_memory_status("a")
        with triton.InferenceServerClient(sharing.address) as other:  # a region is its user's, not its connection's
            other.unregister_cuda_shared_memory()
        assert not client.get_cuda_shared_memory_status().regions
        assert 'lossgrad_shm_bytes{kind="cuda"} 0.0' in metrics_of(sharing)


def metrics_of(running: RunningServer) -> str:
    from prometheus_client import generate_latest

    return generate_latest(running.metrics.registry).decode()


def test_names_are_shared_with_system_regions(client: Any) -> None:
    system = SharedMemory(f"lossgrad_{uuid.uuid4().hex}", create=True, size=100)
    try:
        with DeviceMemory(100) as memory:
            register(client, "g", memory, 100)
            client.register_system_shared_memory("s", f"/{system.name}", 100)
            with refused("ALREADY_EXISTS", "'g' is registered already"):
                register(client, "g", memory, 100)
            with refused("ALREADY_EXISTS", "'g' is registered already"):
                client.register_system_shared_memory("g", f"/{system.name}", 100)
            with refused("ALREADY_EXISTS", "'s' is registered already"):
                register(client, "s", memory, 100)
            client.unregister_system_shared_memory()
            assert list(client.get_cuda_shared_memory_status().regions) == ["g"]
    finally:
        system.close()
        system.unlink()


def test_what_is_wrong_with_a_region_is_told(client: Any) -> None:
    with DeviceMemory(1000) as memory:
        handle = base64.b64encode(memory.handle)
        for arguments, says in (
            (("g", base64.b64encode(b"short"), 0, 8), "raw_handle has 5 bytes; a CUDA IPC handle has 64"),
            (("g", handle, 0, 0), "byte_size is 0"),
            (("g", handle, 0, 1001), "byte_size is 1001; the allocation behind raw_handle has 1000"),
            (("g", handle, -1, 1000), "device_id is -1"),
            (("g", handle, 7, 1000), "no memory of GPU 7"),
            (("g", base64.b64encode(b"absent".ljust(64, b"\0")), 0, 8), "no memory of GPU 0"),
            (("", handle, 0, 8), "name has 0 bytes"),
        ):
            with refused("INVALID_ARGUMENT", says):
                client.register_cuda_shared_memory(*arguments)
        with refused("RESOURCE_EXHAUSTED", "--max-shared-memory-bytes"):
            client.register_cuda_shared_memory("g", handle, 0, 1 << 40)
        assert not client.get_cuda_shared_memory_status().regions
        register(client, "g", memory, 1000)
        with refused("INVALID_ARGUMENT", "takes 400 bytes from byte 800 on; its region has 1000"):
            inputs = inputs_in("g", (1, 100))
            inputs[1].set_shared_memory("g", 400, offset=800)
            client.infer("mse", inputs)
        with refused("NOT_FOUND", "no region 'other'"):
            client.infer("mse", inputs_in("other", (1, 100)))


@pytest.mark.parametrize("fault", [COPY_FAILS, COPY_CRASHES], ids=["fails", "crashes"])
@pytest.mark.parametrize("what", ["an input", "an output"])
def test_a_copy_that_goes_wrong_is_told_and_unregisters(
    sharing: RunningServer, client: Any, fault: int, what: str
) -> None:
    shape = (2, 500)
    input, target = operands(shape)
    with registered(client, "good", 8000) as good, registered(client, "bad", 8000, fault):
        good.array(np.float32, (2, *shape))[:] = input, target
        outputs = [triton.InferRequestedOutput("LOSS")]
        if what == "an output":
            outputs[0].set_shared_memory("bad", 8)
        with refused("NOT_FOUND", "region 'bad' was lost.*register yours again"):
            client.infer("l1", inputs_in("bad" if what == "an input" else "good", shape), outputs=outputs)
        assert not client.get_cuda_shared_memory_status().regions
        with refused("NOT_FOUND", "no region 'good'"):
            client.infer("l1", inputs_in("good", shape))
        register(client, "good", good, 8000)
        assert client.infer("l1", inputs_in("good", shape)).as_numpy("LOSS").shape == (2, 1)
        assert good.memory[:] == input.tobytes() + target.tobytes()


def test_a_process_that_dies_while_it_opens_a_region_is_told(client: Any) -> None:
    with DeviceMemory(100, OPEN_CRASHES) as bad, registered(client, "good", 100):
        with refused("UNAVAILABLE", "ended, or gave no answer, while it opened this region"):
            register(client, "bad", bad, 100)
        assert not client.get_cuda_shared_memory_status().regions


def test_a_process_that_is_killed_while_idle_is_noticed(sharing: RunningServer, client: Any) -> None:
    with registered(client, "in", 2 * 400) as both:
        both.array(np.float32, (2, 1, 100))[:] = operands((1, 100))
        process_id = copier_of(sharing).process_id
        assert process_id is not None
        os.kill(process_id, signal.SIGKILL)
        eventually(lambda: not client.get_cuda_shared_memory_status().regions)
        register(client, "in", both, 800)
        assert client.infer("mse", inputs_in("in", (1, 100)))


@pytest.mark.parametrize("ending", ["hangs", "is killed"])
def test_a_copy_that_hangs_holds_up_nobody_else(sharing: RunningServer, client: Any, ending: str) -> None:
    input, target = operands((2, 100_000))
    copier = copier_of(sharing)
    begun = time.monotonic()
    with (
        registered(client, "bad", 2 * input.nbytes, COPY_HANGS) as bad,
        lossgrad.LossClient(sharing.address) as native,
        ThreadPoolExecutor(8) as threads,
    ):
        copier._copy_seconds = 1.0 if ending == "hangs" else 3600.0
        # More than there are threads for what other calls do beside the event loop.
        calls = [threads.submit(client.infer, "l1", inputs_in("bad", (2, 100_000))) for _ in range(8)]
        eventually(lambda: bad.is_being_copied)
        for _ in range(3):
            assert native.smooth_l1(input, target, gradient=True).gradient.shape == input.shape
        if ending == "is killed":
            assert not any(call.done() for call in calls)
            assert copier.process_id is not None
            os.kill(copier.process_id, signal.SIGKILL)
        for call in calls:
            with refused("NOT_FOUND", "region 'bad'"):
                call.result(60)
        copier._copy_seconds = 5.0
    assert time.monotonic() - begun < 60
    assert not client.get_cuda_shared_memory_status().regions


def test_a_region_that_is_unregistered_while_a_request_uses_it_stays_until_its_end(
    sharing: RunningServer, client: Any
) -> None:
    """Sixteen requests at a time, and the region goes and comes: each has its numbers, or is told that it is not there."""
    shape = (2, 100_000)
    input, target = operands(shape)
    expected = np.mean(np.abs(input.astype(np.float64) - target), axis=1)
    size = input.nbytes
    with DeviceMemory(2 * size) as both, ThreadPoolExecutor(16) as threads:
        both.array(np.float32, (2, *shape))[:] = input, target
        for _ in range(5):
            register(client, "in", both, 2 * size)
            calls = [threads.submit(client.infer, "l1", inputs_in("in", shape)) for _ in range(16)]
            eventually(lambda: any(call.done() for call in calls))  # noqa: B023 - called before the next turn
            client.unregister_cuda_shared_memory("in")
            for call in calls:
                error = call.exception(60)
                if error is None:
                    np.testing.assert_allclose(call.result().as_numpy("LOSS").ravel(), expected, rtol=1e-6)
                else:
                    assert "no region 'in'" in str(error)
    process_id = copier_of(sharing).process_id
    assert process_id is not None
    eventually(lambda: both.path.name not in Path(f"/proc/{process_id}/maps").read_text())


@pytest.mark.parametrize("mode", [0o700, 0o722], ids=["its own", "others' too"])
def test_over_a_unix_socket_they_are_taken_where_nobody_else_may_connect(
    driver: None, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "s"
    with (
        RunningServer(host=f"unix:{path}", allow_shared_memory=True, allow_cuda_shared_memory=True) as running,
        triton.InferenceServerClient(running.address) as client,
        DeviceMemory(8) as memory,
    ):
        path.chmod(mode)
        if mode == 0o700:
            register(client, "g", memory, 8)
            assert list(client.get_cuda_shared_memory_status().regions) == ["g"]
            return
        with refused("UNIMPLEMENTED", "as its own user only"):
            register(client, "g", memory, 8)
