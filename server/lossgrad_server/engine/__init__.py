"""What computes: one worker for each device, behind work.DeviceWorker. Knows tensors, and no gRPC.

Importing this imports torch, so only app does, and only where it starts a server.
"""

from __future__ import annotations

import torch

from lossgrad_server.engine.devices import determinism_of, resolve_device, torch_version
from lossgrad_server.engine.torch_worker import TorchWorker
from lossgrad_server.work import DeviceWorker

__all__ = ["create_worker", "determinism", "resolve_device", "torch_version"]


def create_worker(device: str, threads: int | None) -> DeviceWorker:
    """Return the worker for "auto", "cpu", "cuda" or "cuda:N". ValueError where there is no such device.

    `threads` is how many threads torch uses for one operation, in this whole process; None leaves torch's own choice.
    """
    return TorchWorker(resolve_device(device), threads)


def determinism(worker: DeviceWorker) -> str:
    """Return what the worker's results depend on to the bit. Equal strings mean equal bits."""
    return determinism_of(torch.device(worker.device))
