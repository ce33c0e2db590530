"""Which device is meant, and what is said about it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lossgrad_server import engine
from lossgrad_server.engine import devices, torch_build


def pretend_cuda_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("cuda_devices", "requested", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
    ],
)
def test_the_device_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, cuda_devices: int, requested: str, expected: str
) -> None:
    pretend_cuda_devices(monkeypatch, cuda_devices)
    assert str(devices.resolve_device(requested)) == expected


@pytest.mark.parametrize(
    ("cuda_devices", "requested", "said"),
    [
        (0, "cuda", "'cuda' was asked for, but .* no CUDA device"),
        (0, "cuda:0", "'cuda:0' was asked for, but .* no CUDA device"),
        (1, "cuda:1", "'cuda:1' was asked for, but .* only cuda:0;"),
        (2, "cuda:7", "'cuda:7' was asked for, but .* only cuda:0 to cuda:1;"),
        (1, "cuda:", "'cuda:' is not known"),
        (1, "cuda:-1", "'cuda:-1' is not known"),
        (1, "cuda:x", "'cuda:x' is not known"),
        (1, "gpu", "'gpu' is not known"),
        (1, "mps", "'mps' is not known"),
        (0, "", "'' is not known"),
        (0, "cpu:0", "'cpu:0' is not known"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch, cuda_devices: int, requested: str, said: str
) -> None:
    pretend_cuda_devices(monkeypatch, cuda_devices)
    with pytest.raises(ValueError, match=said):
        devices.resolve_device(requested)


def test_what_the_engine_says_of_itself() -> None:
    worker = engine.create_worker("cpu", None, "plain")
    assert worker.device == "cpu"
    assert engine.torch_version() == torch.__version__
    assert torch.__version__ in engine.determinism(worker)
    assert devices.ENGINE_REVISION in engine.determinism(worker)
    line = devices.describe(torch.device("cpu"))
    assert torch.__version__ in line
    assert "\n" not in line
    assert devices.available_bytes(torch.device("cpu")) > 1 << 20


def test_the_engines_differ_and_say_so() -> None:
    fused, plain = (engine.create_worker("cpu", 1, kind) for kind in ("fused", "plain"))
    assert type(fused) is not type(plain)
    assert engine.determinism(fused) != engine.determinism(plain)
    assert engine.determinism(fused) == engine.determinism(engine.create_worker("cpu", 2))


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_worker_warms_up_and_closes(kind: str) -> None:
    worker = engine.create_worker("cpu", None, kind)
    worker.warm_up()
    worker.close()


def test_the_build_of_torch_is_known_without_importing_it() -> None:
    assert torch_build.version() == torch.__version__
    assert torch_build.is_for_cuda() == (torch.version.cuda is not None)


COMPUTE = """
import sys
import lossgrad
with lossgrad.embedded(device={device!r}, threads=1) as client:
    assert client.l1([1.0], [3.0]).value == 2.0
    assert client.info().torch_version
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_server_on_the_cpu_does_not_import_torch(device: str) -> None:
    if device == "auto" and torch_build.is_for_cuda():
        pytest.skip("this torch is built for CUDA, and asked whether there is a device")
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE.format(device=device)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
