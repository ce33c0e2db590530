"""What a server says and does, once it can be reached: who may call, health, version, limits, speed, and its numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Final

import grpc
import numpy as np

from lossgrad.calls import HEALTH_REQUEST, require_serving
from lossgrad.channel import ChannelSettings
from lossgrad.cli.checks import Check, fail, ok, skip, warn
from lossgrad.cli.latencies import Latencies, duration
from lossgrad.client import LossClient
from lossgrad.errors import LossgradError, Unauthenticated
from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1
from lossgrad.results import ServerInfo

_PINGS: Final = 20
_SLOW_PING_SECONDS: Final = 0.05
_BULK_ELEMENTS: Final = 1 << 20  # of each of two float32 tensors: 8 MiB
_SLOW_BYTES_PER_SECOND: Final = 20e6
_LOSSES: Final[tuple[Loss, ...]] = (
    SmoothL1(beta=0.5, gradient=True),
    SmoothL1(beta=0.0, gradient=True),
    Huber(delta=2.0, gradient=True),
    L1(gradient=True),
    MSE(gradient=True),
)


def examine_server(client: LossClient, settings: ChannelSettings, version: str) -> Iterator[Check]:
    """Check the server. Ends early where it does not answer."""
    try:
        info = client.info()
    except LossgradError as error:
        yield _refused(error, settings)
        return
    yield ok("auth", "the server takes this caller" + ("" if settings.token is None else " and its token"))
    yield _health(client, settings)
    yield _version(info, version)
    yield _limits(info, settings)
    try:
        yield _latency(client)
        yield _throughput(client, info)
        yield from _parity(client)
    except LossgradError as error:
        yield fail(
            "compute", f"the server does not compute: {error.message}", "see its log; try again when health is ok"
        )


def _refused(error: LossgradError, settings: ChannelSettings) -> Check:
    if isinstance(error, Unauthenticated):
        remedy = "give its token: --token-file FILE (LOSSGRAD_TOKEN)"
        if settings.token is not None:
            remedy = "give another token: --token-file FILE (LOSSGRAD_TOKEN); this one is not known, or may not do this"
        return fail("auth", error.message, remedy)
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return fail(
            "grpc", "a gRPC server is there, but it is no lossgrad server", "give the address of lossgrad-server"
        )
    if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return fail("grpc", error.message, "see whether the server is overloaded: its metrics, and lossgrad top")
    return fail("grpc", error.message, "see the server's log")


def _health(client: LossClient, settings: ChannelSettings) -> Check:
    try:
        answer = client._call(client._connected().health, HEALTH_REQUEST, None)
        require_serving(answer, settings.target)
    except LossgradError as error:
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            return warn("health", "the server has no health service", "start lossgrad-server, and not a part of it")
        return fail("health", error.message, "wait until it has started; its log says what it does")
    return ok("health", "SERVING")


def _version(info: ServerInfo, own: str) -> Check:
    text = f"server {info.server_version} on {info.device} (torch {info.torch_version}), client {own}"
    if info.server_version.split(".")[:2] != own.split(".")[:2] and own[:1].isdecimal():
        return warn("version", text, f"install the server's version here: pip install lossgrad=={info.server_version}")
    return ok("version", text)


def _limits(info: ServerInfo, settings: ChannelSettings) -> Check:
    limits = info.limits
    text = (
        f"messages of {_mebibytes(limits.max_message_bytes)}, here {_mebibytes(settings.max_message_bytes)}; "
        f"{limits.max_queued_requests} requests and {_mebibytes(limits.max_queued_bytes)} at a time"
    )
    if limits.max_message_bytes != settings.max_message_bytes:
        remedy = f"set LOSSGRAD_MAX_MESSAGE_BYTES={limits.max_message_bytes} here, or the same on the server"
        return warn("limits", text, remedy)
    return ok("limits", text)


def _latency(client: LossClient) -> Check:
    ones = np.ones(16, np.float32)
    client.compute(ones, ones, L1())
    latencies, server = Latencies(), Latencies()
    for _ in range(_PINGS):
        start = time.perf_counter()
        timing = client.compute(ones, ones, L1()).timing
        latencies.add(time.perf_counter() - start)
        server.add(timing.queue_seconds + timing.pack_seconds + timing.compute_seconds + timing.unpack_seconds)
    text = (
        f"a small call takes {duration(latencies.percentile(50))} (at most {duration(latencies.max)}), of which the server "
        f"computes {duration(server.percentile(50))}"
    )
    if latencies.percentile(50) > _SLOW_PING_SECONDS:
        return warn(
            "latency", text, "run the server nearer to its callers, or send many pairs at a time (client.stream)"
        )
    return ok("latency", text)


def _throughput(client: LossClient, info: ServerInfo) -> Check:
    count = min(_BULK_ELEMENTS, max(1, (info.limits.max_message_bytes - 65536) // 8))
    values = np.ones(count, np.float32)
    client.compute(values, values, L1())
    start = time.perf_counter()
    client.compute(values, values, L1())
    rate = 2 * values.nbytes / (time.perf_counter() - start)
    text = f"{rate / 1e6:,.0f} MB/s, sending {_mebibytes(2 * values.nbytes)}"
    if rate < _SLOW_BYTES_PER_SECOND:
        return warn("throughput", text, "look at the network between here and the server")
    return ok("throughput", text)


def _parity(client: LossClient) -> Iterator[Check]:
    """Compare losses and gradients with torch's, or with the definitions in float64 where it is not installed."""
    rng = np.random.default_rng(0)
    # Where the formulas change, and beyond: equal, at and beside beta and delta, tiny, huge.
    corners = np.array([0.0, 0.5, -0.5, 0.49999, 2.0, -2.0, 2.0001, 1e-30, -1e-30, 1e18, -1e18], np.float32)
    for name, difference in (("random", rng.standard_normal(1000).astype(np.float32)), ("corner", corners)):
        target = rng.standard_normal(difference.size).astype(np.float32) if name == "random" else np.zeros_like(corners)
        input = target + difference
        results = client.compute(input, target, _LOSSES)
        expected = _by_torch(input, target) if find_spec("torch") is not None else _by_numpy(input, target)
        for loss, result, (value, gradient) in zip(_LOSSES, results, expected, strict=True):
            got = np.asarray(result.gradient)
            if not (math.isclose(result.value or 0.0, value, rel_tol=1e-6) and np.allclose(got, gradient, 1e-5, 1e-30)):
                yield fail(
                    "parity",
                    f"{loss!r} of {name} values is {result.value!r} here and {value!r} by {_reference()}",
                    "do not use these numbers; report it with the output of lossgrad info",
                )
                return
    yield ok("parity", f"losses and gradients agree with {_reference()}")
    if find_spec("torch") is None:
        yield skip("torch", "torch is not installed here, so that it was not compared with; that is fine")


def _reference() -> str:
    return "torch" if find_spec("torch") is not None else "the definitions in float64"


def _by_torch(input: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> Iterator[tuple[float, Any]]:
    import torch
    from torch.nn import functional

    functions: dict[str, Any] = {
        "smooth_l1": functional.smooth_l1_loss,
        "huber": functional.huber_loss,
        "l1": functional.l1_loss,
        "mse": functional.mse_loss,
    }
    for loss in _LOSSES:
        x = torch.tensor(input, dtype=torch.float64, requires_grad=True)
        parameters = {loss.parameter: getattr(loss, loss.parameter)} if loss.parameter else {}
        value = functions[loss.name](x, torch.tensor(target, dtype=torch.float64), **parameters)
        value.backward()
        yield float(value.detach()), x.grad.numpy() if x.grad is not None else None


def _by_numpy(input: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> Iterator[tuple[float, Any]]:
    difference = input.astype(np.float64) - target
    size = np.abs(difference)
    for loss in _LOSSES:
        bound = getattr(loss, loss.parameter) if loss.parameter else 0.0
        if loss.name == "mse":
            each, slope = difference**2, 2 * difference
        elif loss.name == "huber":
            each = np.where(size < bound, difference**2 / 2, bound * (size - bound / 2))
            slope = np.clip(difference, -bound, bound)
        elif bound:
            each = np.where(size < bound, difference**2 / 2 / bound, size - bound / 2)
            slope = np.clip(difference / bound, -1, 1)
        else:
            each, slope = size, np.sign(difference)
        yield float(each.mean()), slope / difference.size


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
