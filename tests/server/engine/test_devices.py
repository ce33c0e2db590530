"""Which device is meant, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from lossgrad_server import engine
from lossgrad_server.engine import devices


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
