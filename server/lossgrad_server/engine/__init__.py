"""What computes: one worker for each device, behind work.DeviceWorker. Knows tensors, and no gRPC.

On the CPU the kernels are compiled by numba (cpu_*.py), on CUDA by Triton (cuda_*.py). The plain engine (torch_worker.py)
does the same with torch's own operations, slower: the way out where the kernels do not run, and what they are held
against. torch is imported for a CUDA device and for the plain engine only: a server on the CPU computes without it, which
saves it seconds at its start and a third of its memory.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from lossgrad_server.engine import torch_build
from lossgrad_server.jobs import DataType
from lossgrad_server.work import Buffer, DeviceWorker

__all__ = [
    "create_worker",
    "cuda_version",
    "determinism",
    "gpu_uuid",
    "has_nan",
    "is_gpu",
    "is_surely_cpu",
    "memory_bytes",
    "model",
    "own_memory_bytes",
    "torch_version",
]


def create_worker(device: str, threads: int | None, kind: str = "fused") -> DeviceWorker:
    """Return the worker for "auto", "cpu", "cuda" or "cuda:N". ValueError where there is no such device.

    `threads` is how many threads compute one large request on the CPU; None takes every core that this process may use.
    `kind` is "fused", for the compiled kernels, or "plain", for torch's operations.
    """
    if kind == "fused" and is_surely_cpu(device):
        return _cpu_worker(threads)
    from lossgrad_server.engine.devices import resolve_device

    resolved = resolve_device(device)
    if kind == "plain":
        from lossgrad_server.engine.torch_worker import TorchWorker

        return TorchWorker(resolved, threads)
    if resolved.type == "cpu":
        return _cpu_worker(threads)
    from lossgrad_server.engine.cuda_worker import CudaWorker

    return CudaWorker(resolved)


def is_surely_cpu(device: str) -> bool:
    """Return whether "auto", "cpu", "cuda" or "cuda:N" means the CPU, as far as that is known without torch."""
    return device == "cpu" or (device == "auto" and not torch_build.is_for_cuda())


def is_gpu(device: str) -> bool:
    """Return whether "auto", "cpu", "cuda" or "cuda:N" means a GPU. ValueError where there is no such device."""
    if is_surely_cpu(device):
        return False
    from lossgrad_server.engine.devices import resolve_device

    return resolve_device(device).type == "cuda"


def _cpu_worker(threads: int | None) -> DeviceWorker:
    from lossgrad_server.engine.cpu_worker import CpuWorker

    return CpuWorker(threads or len(os.sched_getaffinity(0)))


def determinism(worker: DeviceWorker) -> str:
    """Return what the worker's results depend on to the bit. Equal strings mean equal bits."""
    plain: Any = sys.modules.get("lossgrad_server.engine.torch_worker")
    is_plain = plain is not None and isinstance(worker, plain.TorchWorker)
    if worker.device == "cpu" and not is_plain:
        from lossgrad_server.engine import cpu_worker

        return cpu_worker.determinism()
    import torch

    from lossgrad_server.engine import devices

    device = torch.device(worker.device)
    if is_plain:
        return devices.determinism_of(device)
    from lossgrad_server.engine import cuda_worker

    return f"{cuda_worker.determinism()}; {devices.device_model(device)}"


def gpu_uuid(device: str) -> str | None:
    """Return the UUID of a GPU ("GPU-..."), by which NVIDIA's tools name it; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    from lossgrad_server.engine import devices

    return devices.gpu_uuid(device)


def memory_bytes(device: str) -> dict[str, int]:
    """Return a CUDA device's memory in bytes, by kind: devices.memory_bytes says which."""
    from lossgrad_server.engine import devices

    return devices.memory_bytes(device)


def model(device: str) -> str:
    """Return what a device is: "NVIDIA H200", "AMD EPYC 9654 96-Core Processor"."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def own_memory_bytes(device: str) -> dict[str, int]:
    """Return what this process has of a CUDA device's memory, in bytes, by kind: devices.own_memory_bytes says which."""
    from lossgrad_server.engine import devices

    return devices.own_memory_bytes(device)


def cuda_version() -> str:
    """Return the version of CUDA that the installed torch is built for: "13.0"; empty for a CPU's."""
    return torch_build.cuda_version()


def has_nan(data: Buffer, data_type: DataType) -> bool:
    """Return whether any of the floating-point elements in these bytes is NaN."""
    from lossgrad_server.engine import nonfinite

    return nonfinite.has_nan(data, data_type)


def torch_version() -> str:
    """Return the version of the torch that is installed, with its build: "2.13.0+cpu"."""
    return torch_build.version()
