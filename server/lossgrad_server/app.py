"""Builds the server's parts and takes them through their life: start, warm up, serve, drain, stop.

`Server` is one server in the running event loop; `run` is the program. One without sockets: embedded.py.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from lossgrad_api.allocator import release_free_memory
from lossgrad_server import __version__, engine
from lossgrad_server.batching.admission import AdmissionLimits
from lossgrad_server.batching.batcher import Batcher
from lossgrad_server.batching.forming import BatchLimits
from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.metrics import Metrics
from lossgrad_server.metrics_endpoint import serve_metrics
from lossgrad_server.security import security
from lossgrad_server.telemetry import create_metrics, create_tracer, watch_gpu
from lossgrad_server.transport.call import Method
from lossgrad_server.transport.grpc_server import UnderWay, create_server
from lossgrad_server.transport.health import Health
from lossgrad_server.transport.open_inference.service import OpenInferenceDescription, OpenInferenceService
from lossgrad_server.transport.pipeline import RequestPipeline
from lossgrad_server.transport.service import LossService, ServiceDescription
from lossgrad_server.transport.transfers import Unsent
from lossgrad_server.triton_metrics import TritonCollector
from lossgrad_server.workers import Outages, make_worker

if TYPE_CHECKING:
    from lossgrad_server.shared_memory.sharing import SharedMemory

logger = logging.getLogger(__name__)

# How long the device's running batch may take to end once nobody waits for it any more.
_WORKER_STOP_SECONDS: Final = 10.0

# How often requests are looked through for late ones.
_EXPIRY_SECONDS: Final = 0.05

# Memory kept for the next large message is given back once there has been no request for this long.
_IDLE_SECONDS: Final = 5.0


_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

# How often a server that drains looks whether it is done, and how long the last answer has to leave it.
_DRAINED_SECONDS: Final = 0.05


class DeviceLost(Exception):
    """The device failed in a way that only a new process can recover from."""


class Core:
    """What every server has, whatever transport is on top: the worker, the batcher, the metrics, the handlers."""

    def __init__(
        self,
        config: ServerConfig,
        loop: asyncio.AbstractEventLoop,
        shared_memory: SharedMemory | None = None,
        *,
        may_isolate: bool = True,
    ) -> None:
        """`shared_memory` is what the server shares with its callers; None for nothing.

        Without `may_isolate` the worker computes in this process, whatever the settings say.
        """
        self.shared_memory = shared_memory
        self.device_lost = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None
        self.is_ready = False
        self.on_ready: Callable[[bool], None] = lambda _: None  # called when that changes while it serves
        tracer = create_tracer(config)  # before the device: a bad setting must be told at once
        made = make_worker(config, may_isolate=may_isolate)
        worker = made.worker
        self.device = worker.device
        self.metrics = create_metrics(config, made)
        post = _poster(loop)
        self.batcher = Batcher(
            worker,
            batch_limits=BatchLimits(config.max_batch_requests, config.max_batch_elements, config.max_batch_bytes),
            admission_limits=AdmissionLimits(config.max_queued_requests, config.max_queued_bytes),
            post=post,
            observer=self.metrics,
            on_lost=self.device_lost.set,
        )
        self.metrics.watch(self.batcher)
        self.outages = Outages(self.batcher, self.metrics, post, self._tell_ready, self.device_lost.set)
        self.outages.watch(worker)
        self.gpu = watch_gpu(self.metrics, made)
        self.pipeline = RequestPipeline(
            self.batcher,
            self.metrics,
            config.max_message_bytes,
            None if shared_memory is None else shared_memory.segments,
            unsent=Unsent(config.max_queued_bytes // 4),
            tracer=tracer,
            has_nan=engine.has_nan,
        )
        if shared_memory is not None:
            self.metrics.watch_memory(shared_memory.state)
        description = ServiceDescription(
            server_version=__version__,
            torch_version=engine.torch_version(),
            device=worker.device,
            determinism=made.determinism,
            max_message_bytes=config.max_message_bytes,
            max_queued_requests=config.max_queued_requests,
            max_queued_bytes=config.max_queued_bytes,
            max_stream_requests=config.max_stream_requests,
            max_groups=config.max_groups,
        )
        offer = (lambda _: None) if shared_memory is None else shared_memory.offer
        self.methods: list[Method] = LossService(self.pipeline, description, offer).methods()
        if config.open_inference:
            open_inference = OpenInferenceService(
                self.pipeline,
                OpenInferenceDescription(
                    server_version=__version__,
                    device=worker.device,
                    max_message_bytes=config.max_message_bytes,
                    max_queued_requests=config.max_queued_requests,
                    max_stream_requests=config.max_stream_requests,
                ),
                is_ready=lambda: self.is_ready,
                regions=None if shared_memory is None else shared_memory.system_regions,
            )
            self.methods += open_inference.methods()
            if config.triton_metrics:
                self.metrics.registry.register(TritonCollector(open_inference.statistics))

    async def warm_up(self) -> None:
        """Start the worker and wait until it is warm; from then on requests are served."""
        self.batcher.start()
        await asyncio.get_running_loop().run_in_executor(None, self.batcher.wait_until_warm)
        self.pipeline.is_warm = True
        self.metrics.worker_up.set(1)
        self._expiry = asyncio.create_task(self._expire())
        self.set_ready(True)

    async def _expire(self) -> None:
        """Hand back what is late, so that nobody is answered long after they stopped waiting."""
        while True:
            await asyncio.sleep(_EXPIRY_SECONDS)
            if self.batcher.admitted_requests:
                self.batcher.expire()

    def set_ready(self, is_ready: bool) -> None:
        """Say whether requests are served."""
        self.is_ready = is_ready
        self.metrics.ready.set(is_ready)

    def _tell_ready(self, is_ready: bool) -> None:
        self.set_ready(is_ready)
        self.on_ready(is_ready)

    async def close(self) -> None:
        """Answer what still waits, and stop the worker."""
        self.outages.end()
        if self._expiry is not None:
            self._expiry.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self.batcher.close, _WORKER_STOP_SECONDS)
        if self.shared_memory is not None:
            self.shared_memory.close()
        if self.pipeline.tracer is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.pipeline.tracer.close)


class Server:
    """One server on its ports. `port` and `metrics_port` are what was bound; 0 for a unix socket, None without metrics."""

    def __init__(self, config: ServerConfig, *, shares_port: bool = False) -> None:
        """`shares_port`: other processes of the same user may listen on its port too, and get their part of connections."""
        self.config = config
        self.port = 0
        self.metrics_port: int | None = None
        self._security = security(config)  # before the device: a bad setting must be told at once
        self._core = Core(config, asyncio.get_running_loop(), _shared_memory(config))
        self._health = Health()
        self._under_way = UnderWay()
        self._grpc = create_server(
            self._core.methods,
            self._core.metrics,
            max_message_bytes=config.max_message_bytes,
            max_connection_age_seconds=config.max_connection_age_seconds,
            max_connections=config.max_connections,
            transfer_timeout_seconds=config.transfer_timeout_seconds,
            tokens=self._security.tokens,
            unsent=self._core.pipeline.unsent,
            under_way=self._under_way,
            shares_port=shares_port,
        )
        self._health.add_to(self._grpc)
        if self._security.certificates is not None:
            self._core.metrics.watch_certificates(self._security.certificates)
        if config.reflection:
            from lossgrad_server.transport.reflection import add_reflection

            add_reflection(self._grpc, open_inference=config.open_inference)
        self._is_prepared = False
        self._stop_metrics: Callable[[], None] = lambda: None
        self._trimmer: asyncio.Task[None] | None = None

    @property
    def device(self) -> str:
        """The device that it computes on."""
        return self._core.device

    @property
    def device_lost(self) -> asyncio.Event:
        """Set when the device has failed for good: stop this process, and start another."""
        return self._core.device_lost

    @property
    def metrics(self) -> Metrics:
        """What it counts."""
        return self._core.metrics

    async def prepare(self) -> None:
        """Warm up before the port is bound. For a server that shares its port: no caller has to wait for it to be warm."""
        logger.info("Warming up before it listens")
        await self._core.warm_up()
        self._core.set_ready(False)
        self._is_prepared = True

    async def start(self) -> None:
        """Bind the ports, warm up, and begin to serve. Raises ConfigError where a port cannot be had."""
        try:
            self.port = self._security.listen(self._grpc, self.config.address)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {self.config.address}: is it taken, or not an address of this machine? "
                "Choose another --host or --port"
            ) from None
        if self.config.metrics_port >= 0:
            self.metrics_port, self._stop_metrics = serve_metrics(
                self._core.metrics.registry,
                self.config.metrics_host,
                self.config.metrics_port,
                are_plain=self._core.gpu is not None,
            )
        if self._core.shared_memory is not None:
            self._core.shared_memory.start(self.config.address, self.port)
        await self._health.set_alive()
        await self._grpc.start()
        try:
            if self._is_prepared:
                self._core.set_ready(True)
            else:
                logger.info("Warming up: %s takes no requests yet", self.grpc_address)
                await self._core.warm_up()
        except Exception:
            await self._grpc.stop(None)
            raise
        # What start-up made stays for good. Left to the collector, it would be looked at again in every full collection,
        # a quarter of a second in which no request is served.
        gc.collect()
        gc.freeze()
        await self._health.set_ready(True)
        self._core.on_ready = self._tell_health
        self._trimmer = asyncio.create_task(self._release_memory_when_idle())
        logger.info("Ready: grpc %s, metrics %s, device %s", self.grpc_address, self.metrics_address, self.device)

    def _tell_health(self, is_ready: bool) -> None:
        self._telling = asyncio.ensure_future(self._health.set_ready(is_ready))

    @property
    def grpc_address(self) -> str:
        """Where it serves, as a client's target."""
        return self.config.host if self.config.is_socket else f"{self.config.host}:{self.port}"

    @property
    def metrics_address(self) -> str:
        """Where its metrics are; "off" without."""
        return f"http://{self.config.metrics_host}:{self.metrics_port}/metrics" if self.metrics_port else "off"

    async def _release_memory_when_idle(self) -> None:
        released_at = 0  # the number of requests admitted when memory was last given back
        seen = 0
        while True:
            await asyncio.sleep(_IDLE_SECONDS)
            admitted = self._core.batcher.total_admitted
            if admitted == seen != released_at and not self._core.batcher.admitted_requests:
                await asyncio.get_running_loop().run_in_executor(None, release_free_memory)
                released_at = admitted
            seen = admitted

    async def drain(self, *, is_replaced: bool = False) -> None:
        """Stop without an error for anyone: say NOT_SERVING, serve on for the delay, refuse new calls, finish the rest.

        `is_replaced`: others listen on the same port, so that callers need not go elsewhere but only connect again. Told
        NOT_SERVING they would wait for this process to recover.
        """
        logger.info("Draining: %s requests inside", self._core.batcher.admitted_requests)
        self._core.outages.end()
        self._core.set_ready(False)
        if not is_replaced:
            await self._health.set_ready(False)
            await asyncio.sleep(self.config.drain_delay_seconds)
        self._core.pipeline.drain()
        closing = asyncio.ensure_future(self._grpc.stop(self.config.drain_grace_seconds))
        self._core.pipeline.end_streams()
        # Health's watches would be waited for until the grace is over: they end with the server.
        while not closing.done():
            await asyncio.wait((closing,), timeout=_DRAINED_SECONDS)
            if not self._under_way.calls:
                closing.cancel()
                break
        await self.stop()

    async def stop(self) -> None:
        """Stop at once; calls in flight end with an error."""
        await self._grpc.stop(None)
        if self._trimmer is not None:
            self._trimmer.cancel()
        await self._core.close()
        await asyncio.get_running_loop().run_in_executor(None, self._stop_metrics)
        logger.info("Stopped")


async def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal stops at once.

    Raises DeviceLost where the device fails for good, after callers were told to go elsewhere.
    """
    server = Server(config)
    signalled: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _leave, number.name)
    await server.start()
    for number in _SIGNALS:
        loop.add_signal_handler(number, signalled.put_nowait, number.name)
    # For people and scripts that start a server on port 0: the one line on standard output.
    print(f"lossgrad-server ready on {server.grpc_address}, metrics {server.metrics_address}", flush=True)  # noqa: T201
    first = asyncio.ensure_future(signalled.get())
    lost = asyncio.ensure_future(server.device_lost.wait())
    await asyncio.wait((first, lost), return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        first.cancel()
        logger.critical("Device %s is lost; stopping, so that a new process can take it", server.device)
        await server.drain()
        raise DeviceLost(f"device {server.device} failed; this process cannot use it any more")
    lost.cancel()
    logger.info("%s received", first.result())
    drain = asyncio.ensure_future(server.drain())
    again = asyncio.ensure_future(signalled.get())
    await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.warning("%s received again; stopping at once", again.result())
        drain.cancel()
        await server.stop()
    else:
        again.cancel()
        await drain


def _leave(name: str) -> None:
    """End a server that has not served yet. Nobody is to be told, and compiling cannot be interrupted."""
    logger.info("%s received while warming up; stopping at once", name)
    logging.shutdown()
    os._exit(0)


def _shared_memory(config: ServerConfig) -> SharedMemory | None:
    if not config.allow_shared_memory:
        if config.allow_cuda_shared_memory:
            raise ConfigError("--allow-cuda-shared-memory is set; set --allow-shared-memory with it")
        return None
    from lossgrad_server.shared_memory.sharing import (
        SharedMemory,
    )  # needs more of the system than the rest of the server

    logger.warning("Sharing memory with callers on this machine: see docs/shared-memory.md for what that trusts")
    return SharedMemory(
        config.max_shared_memory_bytes, config.region_prefixes, allows_cuda=config.allow_cuda_shared_memory
    )


def _poster(loop: asyncio.AbstractEventLoop) -> Callable[[Callable[[], None]], None]:
    def post(callback: Callable[[], None]) -> None:
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop has closed: nobody is left to be answered
            logger.debug("A batch ended after the event loop")

    return post
