"""The devices: which one to compute on, what it is called, how much memory it has left, what the results depend on."""

from __future__ import annotations

import os
import platform
from typing import Final

import torch

# Raised whenever the same request may get other bits from this engine than from the one before.
ENGINE_REVISION: Final = "plain-2"


def resolve_device(requested: str) -> torch.device:
    """Return the device meant by "auto", "cpu", "cuda" or "cuda:N". ValueError says what was asked and what is there.

    "auto" is the first CUDA device where there is one, otherwise the CPU; "cuda" is the first CUDA device.
    """
    cuda_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cpu" or (requested == "auto" and cuda_count == 0):
        return torch.device("cpu")
    name, separator, number = requested.partition(":")
    if requested == "auto" or requested == "cuda":
        index = 0
    elif name == "cuda" and separator and number.isascii() and number.isdigit():
        index = int(number)
    else:
        raise ValueError(f"device {requested!r} is not known; use auto, cpu, cuda or cuda:N")
    if index >= cuda_count:
        there = {0: "no CUDA device", 1: "only cuda:0"}.get(cuda_count, f"only cuda:0 to cuda:{cuda_count - 1}")
        raise ValueError(
            f"device {requested!r} was asked for, but torch {torch.__version__} sees {there}; use auto or cpu, "
            "or check the driver, the container's GPU access and that torch is a CUDA build"
        )
    return torch.device("cuda", index)


def device_model(device: torch.device) -> str:
    """Return what the device is: "NVIDIA H200", "x86_64"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def gpu_uuid(device: str) -> str | None:
    """Return the UUID of a GPU ("GPU-..."), by which NVIDIA's tools name it; None for the CPU."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"


def torch_version() -> str:
    """Return the version of torch that computes, with its build: "2.13.0+cpu"."""
    return str(torch.__version__)


def describe(device: torch.device) -> str:
    """Return one line for logs: the versions and the device."""
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch_version()}{cuda} on {device} ({device_model(device)}{threads}), engine {ENGINE_REVISION}"


def determinism_of(device: torch.device) -> str:
    """Return what a result's bits depend on. Equal strings mean equal bits; unequal ones may still."""
    return (
        f"engine {ENGINE_REVISION}; float64 sums of chunks of 4096 in a fixed order, added exactly; "
        f"torch {torch_version()}; {device.type} {device_model(device)}"
    )


def memory_bytes(device: str) -> dict[str, int]:
    """Return a CUDA device's memory in bytes, by kind.

    `allocated` is what tensors take, `reserved` what torch holds for them, `used` what all processes take, `total` all that
    there is; `pinned` is the host's memory that torch holds for copies to and from it.
    """
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return {**own_memory_bytes(device), "used": total - free, "total": total}


def own_memory_bytes(device: str) -> dict[str, int]:
    """Return what this process has of a CUDA device's memory, in bytes: `allocated`, `reserved` and `pinned`, as above."""
    which = torch.device(device)
    return {
        "allocated": torch.cuda.memory_allocated(which),
        "reserved": torch.cuda.memory_reserved(which),
        "pinned": int(torch.cuda.host_memory_stats().get("reserved_bytes.current", 0)),
    }


def available_bytes(device: torch.device) -> int:
    """Return how much memory could still be allocated for the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
