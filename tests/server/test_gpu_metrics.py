"""The gauges of a GPU: what NVIDIA's management library tells, under Triton's names, as perf_analyzer reads them."""

from __future__ import annotations

import re
import uuid as uuids
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lossgrad_server import engine
from lossgrad_server.gpu_metrics import Gpu, GpuCollector, find_gpu
from tests.server.serving import RunningServer
from tests.tools import perf_analyzer

UUID = "GPU-11111111-2222-3333-4444-555555555555"
MEMORY_BYTES, USED_BYTES = 150_754_820_096, 85_000_000_000


class FakeLibrary:
    """A management library with one GPU. `silent` are the functions that give an error."""

    def __init__(self, *silent: str) -> None:
        self._silent = silent

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 3 if name in self._silent else getattr(self, f"_{name}")(*arguments)

    def _nvmlInit_v2(self) -> int:
        return 0

    def _nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 7
        return 0 if uuid == UUID.encode() else 6

    def _nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        assert handle.value == 7
        rates._obj.gpu, rates._obj.memory = 37, 90
        return 0

    def _nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 251_700
        return 0

    def _nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = MEMORY_BYTES, USED_BYTES
        return 0


def gauges(gpu: Gpu) -> dict[str, float]:
    samples = [sample for family in GpuCollector(gpu).collect() for sample in family.samples]
    assert all(sample.labels == {"gpu_uuid": UUID} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_the_gauges_have_tritons_names_and_units() -> None:
    assert gauges(Gpu(FakeLibrary(), UUID)) == {
        "nv_gpu_utilization": 0.37,
        "nv_gpu_power_usage": 251.7,
        "nv_gpu_memory_used_bytes": USED_BYTES,
        "nv_gpu_memory_total_bytes": MEMORY_BYTES,
    }


@pytest.mark.parametrize(
    ("silent", "missing"),
    [
        ("nvmlDeviceGetUtilizationRates", {"nv_gpu_utilization"}),
        ("nvmlDeviceGetPowerUsage", {"nv_gpu_power_usage"}),
        ("nvmlDeviceGetMemoryInfo", {"nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}),
    ],
)
def test_what_the_gpu_does_not_tell_is_left_out(silent: str, missing: set[str]) -> None:
    everything = set(gauges(Gpu(FakeLibrary(), UUID)))
    assert everything - set(gauges(Gpu(FakeLibrary(silent), UUID))) == missing


def test_without_the_library_or_the_gpu_there_is_nothing_but_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert find_gpu(UUID, missing) is None
    assert find_gpu("GPU-another", lambda _: FakeLibrary()) is None
    assert find_gpu(UUID, lambda _: FakeLibrary("nvmlInit_v2")) is None
    assert [record.getMessage() for record in caplog.records] == [
        "No nv_gpu_* metrics: libnvidia-ml.so.1: cannot open shared object file",
        "No nv_gpu_* metrics: NVML gives error 6 for GPU-another",
        f"No nv_gpu_* metrics: NVML gives error 3 for {UUID}",
    ]


def test_the_gpu_that_computes_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(uuid=uuids.UUID(UUID.removeprefix("GPU-")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {1: properties}[device.index])
    assert engine.gpu_uuid("cuda:1") == UUID
    assert engine.gpu_uuid("cpu") is None


def test_a_devices_memory_is_told_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 + device.index, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"reserved_bytes.current": 5})
    told = {"allocated": 10, "reserved": 20, "used": 69, "total": 100, "pinned": 5}
    assert engine.memory_bytes("cuda:1") == told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_memory_grows_with_what_lies_in_it() -> None:
    before = engine.memory_bytes("cuda:0")
    held = torch.ones(1 << 20, device="cuda:0")
    after = engine.memory_bytes("cuda:0")
    assert after["allocated"] - before["allocated"] == held.numel() * held.element_size()
    assert after["allocated"] <= after["reserved"] <= after["used"] <= after["total"] == before["total"]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """Return a server, not yet started, that takes itself for one with a GPU."""
    monkeypatch.setattr(engine, "gpu_uuid", lambda _: UUID)
    monkeypatch.setattr("lossgrad_server.telemetry.find_gpu", lambda uuid: Gpu(FakeLibrary(), uuid))
    return RunningServer()


def test_the_values_are_plain_decimals_and_all_others_as_they_were(running: RunningServer) -> None:
    with running:
        text = running.scrape()
    assert f'nv_gpu_memory_used_bytes{{gpu_uuid="{UUID}"}} 85000000000\n' in text
    assert f'nv_gpu_memory_total_bytes{{gpu_uuid="{UUID}"}} 150754820096\n' in text
    assert f'nv_gpu_utilization{{gpu_uuid="{UUID}"}} 0.370000\n' in text
    assert f'nv_gpu_power_usage{{gpu_uuid="{UUID}"}} 251.700000\n' in text
    assert re.search(r"^process_start_time_seconds \d\.\d+e\+09$", text, re.MULTILINE)
    assert "lossgrad_ready 1.0\n" in text


def test_perf_analyzer_reads_them(running: RunningServer, tmp_path: Path) -> None:
    try:
        perf_analyzer.command()
    except perf_analyzer.NotToBeHad as reason:
        pytest.skip(str(reason))
    with running:
        asked = ["-m", "mse", "-u", running.address, "-i", "grpc", "--request-count", "50"]
        shapes = ["--shape", "INPUT:8", "--shape", "TARGET:8"]
        metrics = ["--collect-metrics", "--metrics-url", running.server.metrics_address.removeprefix("http://")]
        files = ["--verbose-csv", "-f", str(tmp_path / "report.csv")]
        result = perf_analyzer.run([*asked, *shapes, *metrics, *files])
    assert result.returncode == 0, result.stdout
    assert "WARNING" not in result.stdout, result.stdout
    shown = re.findall(rf"{UUID} : (.+)", result.stdout)
    assert shown == ["37%", "251.7 watts", f"{USED_BYTES} bytes", f"{MEMORY_BYTES} bytes"], result.stdout


@pytest.mark.gpu
def test_a_real_gpu_tells_all_four() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    uuid = engine.gpu_uuid("cuda:0")
    assert uuid is not None
    gpu = find_gpu(uuid)
    assert gpu is not None
    used, total = gpu.memory_bytes() or (0, 0)
    assert 0 < used <= total
    assert 0 <= (gpu.utilization_ratio() or 0) <= 1
    assert (gpu.power_watts() or 1) > 0
