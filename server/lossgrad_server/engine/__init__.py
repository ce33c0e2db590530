"""What computes: one worker for each device, behind work.DeviceWorker. Knows tensors, and no gRPC.

On the CPU the kernels are compiled by numba (cpu_*.py), on CUDA by Triton (cuda_*.py). The plain engine (torch_worker.py)
does the same with torch's own operations, slower: the way out where the kernels do not run, and what they are held
against. Importing this imports torch, so only app does, and only where it starts a server.
"""

from __future__ import annotations

import os

import torch

from lossgrad_server.engine.devices import determinism_of, device_model, gpu_uuid, resolve_device, torch_version
from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.work import DeviceWorker

__all__ = ["create_worker", "determinism", "gpu_uuid", "resolve_device", "torch_version"]


def create_worker(device: str, threads: int | None, kind: str = "fused") -> DeviceWorker:
    """Return the worker for "auto", "cpu", "cuda" or "cuda:N". ValueError where there is no such device.

    `threads` is how many threads compute one large request on the CPU; None takes every core that this process may use.
    `kind` is "fused", for the compiled kernels, or "plain", for torch's operations.
    """
    resolved = resolve_device(device)
    if kind == "plain":
        return TorchWorker(resolved, threads)
    if resolved.type == "cpu":
        from lossgrad_server.engine.cpu_worker import CpuWorker

        return CpuWorker(threads or len(os.sched_getaffinity(0)))
    from lossgrad_server.engine.cuda_worker import CudaWorker

    return CudaWorker(resolved)


def determinism(worker: DeviceWorker) -> str:
    """Return what the worker's results depend on to the bit. Equal strings mean equal bits."""
    if isinstance(worker, TorchWorker):
        return determinism_of(torch.device(worker.device))
    if worker.device == "cpu":
        from lossgrad_server.engine import cpu_worker

        return cpu_worker.determinism()
    from lossgrad_server.engine import cuda_worker

    return f"{cuda_worker.determinism()}; {device_model(torch.device(worker.device))}"
