"""Sends bursts of small requests in the ways that the SDK offers, and reads what they cost from the metrics endpoint."""

# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

import lossgrad
from examples.demo.histograms import Histogram, Scrape, scrape

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Burst:
    """One way of sending: the values that came back, how long that took, and what the server observed meanwhile."""

    title: str
    values: list[float]
    seconds: float
    observed: Scrape

    @property
    def request_duration(self) -> Histogram:
        """Seconds from a request's bytes being on the server to its answer's bytes being ready."""
        return self.observed.select("lossgrad_request_duration_seconds")

    @property
    def batch_requests(self) -> Histogram:
        """Requests in a batch."""
        return self.observed.select("lossgrad_batch_requests")


def pairs_of(prediction: torch.Tensor, target: torch.Tensor, count: int) -> list[Pair]:
    """Return `count` pairs of four samples each, going round through the data as often as it takes."""
    batches = list(zip(prediction.split(4), target.split(4), strict=True))
    return [batches[index % len(batches)] for index in range(count)]


def run(server_target: str, metrics_url: str, pairs: list[Pair], on_burst: Callable[[], None]) -> list[Burst]:
    """Send pairs in each way, one way after the other."""
    bursts = []
    for title, share, send in WAYS:
        sent = pairs[: len(pairs) // share]
        before, started = scrape(metrics_url), time.perf_counter()
        values = send(server_target, sent)
        seconds = time.perf_counter() - started
        bursts.append(Burst(title, values, seconds, scrape(metrics_url) - before))
        on_burst()
    return bursts


def disagreements(bursts: list[Burst], pairs: list[Pair]) -> list[str]:
    """Return a line for each way in which an answer is not the one that the request alone gets, to the bit."""
    # Neighbours in a batch, and the way a request came, change no bit; so every way gives the values of the first.
    alone = {id(pair[0]): value for pair, value in zip(pairs, bursts[0].values, strict=False)}
    wrong = []
    for burst in bursts:
        differing = sum(
            value != alone[id(pair[0])]
            for pair, value in zip(pairs, burst.values, strict=False)
            if id(pair[0]) in alone
        )
        if differing:
            wrong.append(f"{burst.title}: {differing} of {len(burst.values)} values differ from those of single calls")
        if (observed := burst.request_duration.count) != len(burst.values):
            wrong.append(f"{burst.title}: {len(burst.values)} requests were sent, the metrics count {observed}")
    return wrong


def value_of(result: lossgrad.LossResult) -> float:
    """Return the loss as the float64 that the server computed."""
    assert result.value is not None
    return result.value


def one_by_one(target: str, pairs: list[Pair]) -> list[float]:
    """Call, wait for the answer, call again."""
    with lossgrad.LossClient(target) as client:
        return [value_of(client.smooth_l1(*pair, gradient=True)) for pair in pairs]


def threads(target: str, pairs: list[Pair]) -> list[float]:
    """Call from 16 threads: a client may be shared."""
    with lossgrad.LossClient(target) as client, ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: value_of(client.smooth_l1(*pair, gradient=True)), pairs))


def coroutines(target: str, pairs: list[Pair]) -> list[float]:
    """Call from 256 coroutines at a time."""

    async def gather() -> list[float]:
        async with lossgrad.AsyncLossClient(target) as client:
            allowed = asyncio.Semaphore(256)

            async def call(pair: Pair) -> float:
                async with allowed:
                    return value_of(await client.smooth_l1(*pair, gradient=True))

            return await asyncio.gather(*map(call, pairs))

    return asyncio.run(gather())


def stream(target: str, pairs: list[Pair]) -> list[float]:
    """Stream: results come in the order of the pairs; the client packs many requests into a message."""
    with lossgrad.LossClient(target) as client:
        return [value_of(result) for result in client.stream(pairs, lossgrad.SmoothL1(gradient=True), in_flight=256)]


# How it is called, which share of the pairs it sends (the slower, the fewer), and what sends.
WAYS: Final[tuple[tuple[str, int, Callable[[str, list[Pair]], list[float]]], ...]] = (
    ("one call at a time", 8, one_by_one),
    ("16 threads", 2, threads),
    ("asyncio, 256 calls", 2, coroutines),
    ("one stream", 1, stream),
)
