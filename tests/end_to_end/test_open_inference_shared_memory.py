"""Triton's own client and load generator with tensors in system shared memory: the native API's bits, and exit code 0."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

import lossgrad
from tests.server.serving import RunningServer
from tests.tools import perf_analyzer

if importlib.util.find_spec("pkg_resources") is None:
    # New setuptools have it no more; this tritonclient asks it where its own library is.
    resources: Any = ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: str(importlib.resources.files(package) / name)
    sys.modules["pkg_resources"] = resources

shared_memory: Any = pytest.importorskip("tritonclient.utils.shared_memory", reason="tritonclient without libcshm")
triton: Any = tritonclient.grpc  # it has no types

# What perf_analyzer calls its regions: the tensors' names, numbered where they are inputs.
PREFIXES = "lossgrad,INPUT_,TARGET_,WEIGHT_,MASK_,LOSS,GRAD,COUNT"
NAMES: dict[Any, str] = {np.float16: "FP16", np.float32: "FP32", np.float64: "FP64"}


@pytest.fixture(scope="module")
def sharing() -> Iterator[RunningServer]:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this system")
    with RunningServer(allow_shared_memory=True, shared_memory_prefixes=PREFIXES) as running:
        yield running


@pytest.fixture
def client(sharing: RunningServer) -> Iterator[Any]:
    with triton.InferenceServerClient(sharing.address) as client:
        yield client
        client.unregister_system_shared_memory()


class Memory:
    """A region of tritonclient's making, registered."""

    def __init__(self, client: Any, name: str, byte_count: int, key: str | None = None) -> None:
        self.client = client
        self.name = name
        self.byte_count = byte_count
        self.key = key or f"/lossgrad_{uuid.uuid4().hex}"
        self.handle = shared_memory.create_shared_memory_region(name, self.key, byte_count)
        client.register_system_shared_memory(name, self.key, byte_count)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.unregister_system_shared_memory(self.name)
        shared_memory.destroy_shared_memory_region(self.handle)

    def array(self, dtype: type, shape: tuple[int, ...], offset: int = 0) -> Any:
        return shared_memory.get_contents_as_numpy(self.handle, dtype, shape, offset)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("rows", [1, 5, 300], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "gradient over the input"])
def test_the_bits_are_those_of_the_native_api(
    sharing: RunningServer, client: Any, dtype: type, rows: int, in_place: bool
) -> None:
    """300 rows of a thousand are enough to be read by another thread, and written by one."""
    shape = (rows, 1000)
    input, target = np.random.default_rng(rows).normal(size=(2, *shape)).astype(dtype)
    with lossgrad.LossClient(sharing.address) as native:
        expected = native.smooth_l1(input, target, beta=0.5, reduction="sample_mean", gradient=True)
    size = input.nbytes
    with Memory(client, "in", 2 * size) as operands, Memory(client, "out", size + 4096) as results:
        shared_memory.set_shared_memory_region(operands.handle, [input, target])
        inputs = [triton.InferInput(name, shape, NAMES[dtype]) for name in ("INPUT", "TARGET")]
        inputs[0].set_shared_memory("in", size)
        inputs[1].set_shared_memory("in", size, offset=size)
        outputs = [triton.InferRequestedOutput(name) for name in ("GRAD", "LOSS", "COUNT")]
        where, at = ("in", 0) if in_place else ("out", 4096)
        outputs[0].set_shared_memory(where, size, offset=at)
        outputs[1].set_shared_memory("out", rows * input.itemsize)
        answer = client.infer("smooth_l1_grad", inputs, outputs=outputs, parameters={"beta": "0.5"})
        assert list(answer.as_numpy("COUNT").ravel()) == [1000] * rows
        gradient = (operands if in_place else results).array(dtype, shape, at)
        assert gradient.tobytes() == expected.gradient.tobytes()
        assert results.array(dtype, (rows,)).tobytes() == expected.loss.tobytes()
        assert operands.array(dtype, shape, size).tobytes() == target.tobytes()


def test_what_is_wrong_with_a_region_is_told(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match="no shared memory object '/lossgrad_absent' of yours"):
        client.register_system_shared_memory("r", "/lossgrad_absent", 8)
    with pytest.raises(triton.InferenceServerException, match="'/lossgrad' or '/INPUT_'"):
        client.register_system_shared_memory("r", "/triton_python_backend_shm_region_1", 8)
    with Memory(client, "r", 4000) as memory:
        with pytest.raises(triton.InferenceServerException, match="registered already") as caught:
            client.register_system_shared_memory("r", memory.key, 4000)
        assert caught.value.status() == "StatusCode.ALREADY_EXISTS"
        status = client.get_system_shared_memory_status("r").regions["r"]
        assert (status.key, status.offset, status.byte_size) == (memory.key, 0, 4000)
        inputs = [triton.InferInput(name, (1, 500), "FP32") for name in ("INPUT", "TARGET")]
        for place, says, code in (
            (("r", 2000, 2004), "takes 2000 bytes from byte 2004 on; its region has 4000", "INVALID_ARGUMENT"),
            (("other", 2000, 0), "no region 'other'", "NOT_FOUND"),
        ):
            for one in inputs:
                one.set_shared_memory(*place)
            with pytest.raises(triton.InferenceServerException, match=says) as caught:
                client.infer("mse", inputs)
            assert caught.value.status() == f"StatusCode.{code}"
    with pytest.raises(triton.InferenceServerException, match="no GPU memory") as caught:
        client.register_cuda_shared_memory("g", b"x" * 64, 0, 8)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    client.unregister_cuda_shared_memory()
    assert "system_shared_memory" in client.get_server_metadata().extensions
    assert "cuda_shared_memory" not in client.get_server_metadata().extensions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("smooth_l1_grad", ("-b", "1")),
        ("smooth_l1_grad", ("-b", "8", "--concurrency-range", "64")),
        ("mse_grad", ("--async", "--streaming", "--concurrency-range", "16")),
        ("huber_masked", ("--shape", "WEIGHT:256", "--shape", "MASK:256", "--async", "--concurrency-range", "8")),
    ],
    ids=["alone", "64 at a time", "a stream", "weight and mask"],
)
def test_perf_analyzer_runs(sharing: RunningServer, client: Any, model: str, arguments: tuple[str, ...]) -> None:
    try:
        perf_analyzer.command()
    except perf_analyzer.NotToBeHad as reason:
        pytest.skip(str(reason))
    shapes = ("--shape", "INPUT:256", "--shape", "TARGET:256", "--output-shared-memory-size", "16384")
    where = ("-u", sharing.address, "-i", "grpc", "--shared-memory", "system", "--request-count", "200")
    result = perf_analyzer.run(["-m", model, *where, *shapes, *arguments])
    assert result.returncode == 0, result.stdout
    assert not re.search(r"error|fail", result.stdout, re.IGNORECASE), result.stdout
    (statistics,) = client.get_inference_statistics(model).model_stats
    assert statistics.inference_stats.fail.count == 0
    assert statistics.inference_stats.success.count >= 200
    assert list(client.get_system_shared_memory_status().regions) == []
