"""The four series of a GPU that Triton's tools read: nv_gpu_utilization, nv_gpu_power_usage and the two of its memory.

They come from NVIDIA's management library, which the driver brings along, and are asked for at every scrape. There where
a GPU computes; a server on a CPU has none of them.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_LIBRARY: Final = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))  # percent of the last sample's time


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpu:
    """One GPU, as the management library sees it. What it does not tell is None: a GPU without a power sensor, say."""

    def __init__(self, library: Any, uuid: str) -> None:
        """Find the GPU of this UUID ("GPU-..."). Raises LookupError."""
        self.uuid = uuid
        self._library = library
        self._handle = ctypes.c_void_p()
        if (code := library.nvmlInit_v2()) or (
            code := library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle))
        ):
            raise LookupError(f"NVML gives error {code} for {uuid}")

    def utilization_ratio(self) -> float | None:
        """Return the share of the time that kernels ran on it, 0 to 1."""
        rates = _Utilization()
        return rates.gpu / 100 if self._ask("nvmlDeviceGetUtilizationRates", rates) else None

    def power_watts(self) -> float | None:
        """Return what it draws, in watts."""
        milliwatts = ctypes.c_uint()
        return milliwatts.value / 1000 if self._ask("nvmlDeviceGetPowerUsage", milliwatts) else None

    def memory_bytes(self) -> tuple[int, int] | None:
        """Return its memory: in use by all processes, and in all."""
        memory = _Memory()
        return (memory.used, memory.total) if self._ask("nvmlDeviceGetMemoryInfo", memory) else None

    def _ask(self, function: str, answer: Any) -> bool:
        code: int = getattr(self._library, function)(self._handle, ctypes.byref(answer))
        return code == 0


def find_gpu(uuid: str, load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """Return the GPU of this UUID; None, with a line in the log, where the management library does not know it."""
    try:
        return Gpu(load(_LIBRARY), uuid)
    except (OSError, LookupError) as error:
        logger.warning("No nv_gpu_* metrics: %s", error)
        return None


class GpuCollector(Collector):
    """The four gauges of one GPU, with Triton's names, units and one label."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Ask the GPU."""
        used, total = self._gpu.memory_bytes() or (None, None)
        for name, documentation, value in (
            ("nv_gpu_utilization", "Share of the time that kernels ran on the GPU.", self._gpu.utilization_ratio()),
            ("nv_gpu_power_usage", "What the GPU draws, in watts.", self._gpu.power_watts()),
            ("nv_gpu_memory_used_bytes", "The GPU's memory that is in use, by whatever process.", used),
            ("nv_gpu_memory_total_bytes", "The GPU's memory.", total),
        ):
            if value is not None:
                family = GaugeMetricFamily(name, documentation, labels=("gpu_uuid",))
                family.add_metric((self._gpu.uuid,), value)
                yield family


_SAMPLE: Final = re.compile(rb"^(nv_gpu_\S+ )(\S+)$", re.MULTILINE)


def with_plain_decimals(application: Any) -> Any:
    """Return a WSGI application that writes the values of nv_gpu_* without exponents, which perf_analyzer misreads.

    prometheus_client has 8.5e+010 for what is beyond a million, and no way to say otherwise.
    """

    def serve(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ.pop("HTTP_ACCEPT_ENCODING", None)  # what is compressed cannot be rewritten
        return [_SAMPLE.sub(_in_plain_decimals, part) for part in application(environ, start_response)]

    return serve


def _in_plain_decimals(sample: re.Match[bytes]) -> bytes:
    value = float(sample[2])
    return sample[1] + (b"%d" % value if value.is_integer() else b"%.6f" % value)
