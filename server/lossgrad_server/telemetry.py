"""What a server tells of itself, as its settings want it: its metrics, those of its GPU, and its tracer."""

from __future__ import annotations

import platform
from functools import partial
from typing import TYPE_CHECKING

import grpc

from lossgrad_server import __version__, engine
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.gauges import Limits
from lossgrad_server.gpu_metrics import Gpu, GpuCollector, find_gpu
from lossgrad_server.isolation.worker import IsolatedWorker
from lossgrad_server.metrics import Metrics
from lossgrad_server.workers import MadeWorker

if TYPE_CHECKING:
    from lossgrad_server.tracing import Tracer


def create_metrics(config: ServerConfig, made: MadeWorker) -> Metrics:
    """Return the metrics of a server that computes with this worker."""
    device = made.worker.device
    return Metrics(
        device=device,
        build_info={
            "version": __version__,
            "torch": engine.torch_version(),
            "cuda": engine.cuda_version(),
            "python": platform.python_version(),
            "grpc": grpc.__version__,
            "device": device,
            "device_name": made.model,
            "determinism": made.determinism,
        },
        limits=Limits(
            queue_requests=config.max_queued_requests,
            queue_bytes=config.max_queued_bytes,
            batch_requests=config.max_batch_requests,
            batch_elements=config.max_batch_elements,
            batch_bytes=config.max_batch_bytes,
        ),
    )


def watch_gpu(metrics: Metrics, made: MadeWorker) -> Gpu | None:
    """Export the memory of a worker's GPU, and what the GPU's management library tells; return that, if it does."""
    gpu = None if made.gpu_uuid is None else find_gpu(made.gpu_uuid)
    if gpu is not None:
        metrics.registry.register(GpuCollector(gpu))
    device = made.worker.device
    if device != "cpu" and isinstance(made.worker, IsolatedWorker):
        metrics.watch_device_memory(partial(_isolated_memory, made.worker, gpu))
    elif device != "cpu":
        metrics.watch_device_memory(partial(engine.memory_bytes, device))
    return gpu


def _isolated_memory(worker: IsolatedWorker, gpu: Gpu | None) -> dict[str, int]:
    """Return what the worker's process says that it has, and what the driver says: this one must not touch the device."""
    memory = None if gpu is None else gpu.memory_bytes()
    return {**worker.memory, **({} if memory is None else {"used": memory[0], "total": memory[1]})}


def create_tracer(config: ServerConfig) -> Tracer | None:
    """Return what makes requests' spans, where the settings want any. Raises ConfigError without the extra otel."""
    if not config.tracing:
        return None
    try:
        from lossgrad_server.tracing import create_tracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tracing needs {error.name}, which is not installed: pip install 'lossgrad[otel]'"
        ) from None
    return create_tracer()
