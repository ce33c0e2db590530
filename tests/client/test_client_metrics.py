"""What LossClient(metrics=registry) counts: every way of calling, every outcome, retries; nothing without a registry."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import lossgrad
from lossgrad import L1, AsyncLossClient, InvalidRequest, LossClient, Overloaded, Unavailable
from lossgrad.calls import prepare
from lossgrad.errors import LossgradError
from lossgrad.metrics import ClientMetrics, outcome_of, reason_of
from tests.client.peer import Peer, PeerServer, Refused, status
from tests.server.serving import RunningServer, eventually

Code = grpc.StatusCode
ZERO = np.zeros(2, np.float32)
FULL = Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.01))


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metered(target: str, registry: CollectorRegistry) -> Iterator[LossClient]:
    with LossClient(target, metrics=registry) as client:
        yield client


@pytest.fixture
async def metered_aio(target: str, registry: CollectorRegistry) -> AsyncIterator[AsyncLossClient]:
    async with AsyncLossClient(target, metrics=registry) as client:
        yield client


def series(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Return the values of a sample's name, by the labels' values in the order of their names."""
    found: dict[tuple[str, ...], float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == name and sample.value:
                found[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def handled(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Return how many RPCs ended, by method and code."""
    return {
        (method, code): value for (code, method, _, _), value in series(registry, "grpc_client_handled_total").items()
    }


def bad() -> tuple[Any, Any]:
    return np.zeros(2), np.zeros(3)


def test_calls_are_counted_with_their_outcome_time_messages_and_bytes(
    target: str, peer: Peer, registry: CollectorRegistry
) -> None:
    request_bytes = prepare(ZERO, ZERO, (L1(),), is_single=True, max_message_bytes=1000).byte_count
    with LossClient(target, metrics=registry, coalesce=False) as metered:
        metered.l1(ZERO, ZERO)
        metered.l1(ZERO, ZERO)
        with pytest.raises(InvalidRequest):
            metered.l1(*bad())
        with pytest.raises(InvalidRequest):
            metered.compute(ZERO, ZERO, [])  # not sent
    requests = series(registry, "lossgrad_client_requests_total")
    assert requests == {("compute", "ok"): 2, ("compute", "invalid"): 2}
    assert series(registry, "lossgrad_client_request_duration_seconds_count") == {("compute",): 4}
    assert 0 < series(registry, "lossgrad_client_request_duration_seconds_sum")["compute",] < 30
    assert handled(registry) == {("ComputeLoss", "OK"): 2, ("ComputeLoss", "INVALID_ARGUMENT"): 1}
    name = ("ComputeLoss", "lossgrad_api.v1.LossService", "unary")
    assert series(registry, "grpc_client_started_total") == {name: 3}
    assert series(registry, "grpc_client_msg_sent_total") == {name: 3}
    assert series(registry, "grpc_client_msg_received_total") == {name: 2}
    assert series(registry, "grpc_client_handling_seconds_count") == {name: 3}
    assert series(registry, "lossgrad_client_sent_bytes_total")["ComputeLoss",] >= 3 * request_bytes
    assert series(registry, "lossgrad_client_received_bytes_total")["ComputeLoss",] > 0
    assert not series(registry, "lossgrad_client_inflight_requests")


def test_a_streams_pairs_are_requests_and_its_window_is_seen(
    metered: LossClient, registry: CollectorRegistry, peer: Peer
) -> None:
    peer.hold.clear()
    stream = metered.stream([(ZERO, ZERO)] * 3 + [bad()], L1(), on_error="return")
    results: list[Any] = []
    reading = threading.Thread(target=results.extend, args=(stream,))
    reading.start()
    eventually(lambda: series(registry, "lossgrad_client_inflight_requests") == {("stream",): 4})
    assert series(registry, "lossgrad_client_window_bytes")["stream",] > 3 * ZERO.nbytes
    peer.hold.set()
    reading.join()
    assert isinstance(results[3], InvalidRequest)
    assert series(registry, "lossgrad_client_requests_total") == {("stream", "ok"): 3, ("stream", "invalid"): 1}
    assert series(registry, "lossgrad_client_request_duration_seconds_count") == {("stream",): 4}
    assert series(registry, "lossgrad_client_waiting_seconds_total")["stream",] > 0
    assert list(handled(registry).values()) == [1]
    assert not series(registry, "lossgrad_client_inflight_requests")


def test_what_a_stream_sends_again_is_counted_by_why(
    metered: LossClient, registry: CollectorRegistry, peer: Peer
) -> None:
    refused = iter([FULL, FULL])

    def fail(_: Any) -> None:
        for error in refused:
            raise error

    peer.fail = fail
    metered.compute_many([(ZERO, ZERO)] * 3, L1())
    assert series(registry, "lossgrad_client_retries_total") == {("stream", "queue_full"): 2}
    assert not series(registry, "lossgrad_client_reconnects_total")

    def break_first(number: int, context: Any) -> None:
        if number == 2:
            context.abort(Code.UNAVAILABLE, "broken")

    peer.fail_call = break_first
    metered.compute_many([(ZERO, ZERO)], L1())
    assert series(registry, "lossgrad_client_reconnects_total") == {("stream", "unavailable"): 1}
    assert series(registry, "lossgrad_client_retries_total")["stream", "unavailable"] == 1
    assert handled(registry)["StreamComputeLoss", "UNAVAILABLE"] == 1
    assert series(registry, "lossgrad_client_requests_total") == {("stream", "ok"): 4}


async def test_calls_that_share_a_stream_are_calls(
    metered_aio: AsyncLossClient, registry: CollectorRegistry, peer: Peer
) -> None:
    refused = iter([FULL])

    def fail(_: Any) -> None:
        for error in refused:
            raise error

    peer.fail = fail
    for _ in range(3):
        await metered_aio.l1(ZERO, ZERO)
    with pytest.raises(InvalidRequest):
        await metered_aio.l1(*bad())
    await metered_aio.info()
    assert series(registry, "lossgrad_client_requests_total") == {("compute", "ok"): 3, ("compute", "invalid"): 1}
    assert series(registry, "lossgrad_client_retries_total") == {("compute", "queue_full"): 1}
    assert handled(registry) == {("GetServerInfo", "OK"): 1}  # the stream still goes on
    assert len(series(registry, "grpc_client_started_total")) == 2
    assert not series(registry, "lossgrad_client_inflight_requests")


def test_calls_that_share_a_stream_are_counted_one_by_one(target: str, peer: Peer, registry: CollectorRegistry) -> None:
    with LossClient(target, metrics=registry) as client:
        for _ in range(5):
            client.l1(ZERO, ZERO)
        with pytest.raises(InvalidRequest):
            client.l1(*bad())
    assert series(registry, "lossgrad_client_requests_total") == {("compute", "ok"): 5, ("compute", "invalid"): 1}
    assert series(registry, "lossgrad_client_request_duration_seconds_count") == {("compute",): 6}
    assert series(registry, "grpc_client_msg_sent_total") == {
        ("ComputeLoss", "lossgrad_api.v1.LossService", "unary"): 1,
        ("StreamComputeLoss", "lossgrad_api.v1.LossService", "bidi_stream"): 5,
    }
    assert not series(registry, "lossgrad_client_inflight_requests")
    assert not series(registry, "lossgrad_client_reconnects_total")


async def test_a_shared_stream_that_nobody_needed_any_more_is_no_reconnect(
    target: str, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossgrad.coalescer.MAX_IDLE_SECONDS", 0.01)
    async with AsyncLossClient(target, metrics=registry) as client:
        for _ in range(3):
            await client.l1(ZERO, ZERO)
            while client._connection.coalescer._streams:  # type: ignore[union-attr]
                await _turn()
    assert handled(registry) == {("StreamComputeLoss", "OK"): 3}
    assert not series(registry, "lossgrad_client_reconnects_total")


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0.005)


async def test_asyncio_streams_and_failures_are_counted_as_the_threads_are(
    metered_aio: AsyncLossClient, registry: CollectorRegistry, peer: Peer
) -> None:
    def always(_: Any) -> None:
        raise FULL

    await metered_aio.compute_many([(ZERO, ZERO)] * 5, L1())
    peer.fail = always
    with pytest.raises(Overloaded):
        await metered_aio.l1(ZERO, ZERO)
    assert series(registry, "lossgrad_client_requests_total") == {("stream", "ok"): 5, ("compute", "overloaded"): 1}
    assert series(registry, "lossgrad_client_retries_total") == {("compute", "queue_full"): 2}


def test_an_evaluations_slices_are_requests(registry: CollectorRegistry, evaluation_server: RunningServer) -> None:
    rows = np.ones((100, 3), np.float32)
    with LossClient(evaluation_server.address, metrics=registry) as client:
        client.evaluate([(rows, rows)] * 7, L1())
    assert series(registry, "lossgrad_client_requests_total") == {("evaluate", "ok"): 7}
    assert series(registry, "lossgrad_client_request_duration_seconds_count") == {("evaluate",): 7}
    assert handled(registry)["GetServerInfo", "OK"] == 1


def test_a_call_that_is_cut_is_one_request(registry: CollectorRegistry, evaluation_server: RunningServer) -> None:
    values = np.ones(300_000, np.float32)
    with LossClient(evaluation_server.address, metrics=registry, max_message_bytes=1 << 20) as client:
        assert client.l1(values, values).value == 0.0
    assert series(registry, "lossgrad_client_requests_total") == {("compute", "ok"): 1}
    assert (
        series(registry, "grpc_client_msg_sent_total")[
            "StreamComputeLoss", "lossgrad_api.v1.LossService", "bidi_stream"
        ]
        >= 3
    )


def test_a_server_that_is_not_there_is_an_outcome(registry: CollectorRegistry) -> None:
    with LossClient("127.0.0.1:1", retries=0, metrics=registry) as client, pytest.raises(Unavailable):
        client.l1(ZERO, ZERO)
    assert series(registry, "lossgrad_client_requests_total") == {("compute", "unavailable"): 1}
    assert handled(registry) == {("ComputeLoss", "UNAVAILABLE"): 1}


def test_clients_of_one_registry_share_its_series_and_a_channel_of_ones_own_counts_too(
    target: str, registry: CollectorRegistry
) -> None:
    with LossClient(target, metrics=registry) as first:
        first.l1(ZERO, ZERO)
    with LossClient.from_channel(grpc.insecure_channel(target), metrics=registry) as second:
        second.l1(ZERO, ZERO)
    assert series(registry, "lossgrad_client_requests_total") == {("compute", "ok"): 2}
    assert handled(registry) == {("ComputeLoss", "OK"): 2}


def test_nothing_is_counted_where_no_registry_is_given(client: LossClient) -> None:
    assert client._settings.metrics is None
    client.l1(ZERO, ZERO)
    assert type(client._connection.channel) is grpc._channel.Channel  # type: ignore[union-attr]


def test_what_is_no_registry_is_refused_with_the_extra_to_install(target: str) -> None:
    with pytest.raises(
        TypeError, match=r"metrics is a str; give a prometheus_client.CollectorRegistry.*lossgrad\[metrics\]"
    ):
        LossClient(target, metrics="yes")  # type: ignore[arg-type]


def test_the_exposition_is_one_that_prometheus_reads(metered: LossClient, registry: CollectorRegistry) -> None:
    metered.l1(ZERO, ZERO)
    metered.compute_many([(ZERO, ZERO)] * 2, L1())
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    duration = families["lossgrad_client_request_duration_seconds"]
    assert duration.type == "histogram"
    buckets = [
        sample.value for sample in duration.samples if sample.labels.get("le") and sample.labels["method"] == "stream"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2
    assert {family.documentation for family in families.values()}.isdisjoint({""})


def test_labels_are_a_closed_set_whatever_a_server_says() -> None:
    for kind in lossgrad.errors._CLASSES.values():
        assert outcome_of(kind("x")) != ""
    assert outcome_of(lossgrad.ServerError("x")) == "internal"
    assert outcome_of(KeyboardInterrupt()) == "cancelled"
    assert outcome_of(TypeError()) == "invalid"
    assert reason_of(LossgradError("x", Code.UNAVAILABLE, "DRAINING")) == "draining"
    assert reason_of(LossgradError("x", Code.UNAVAILABLE, "whatever/123")) == "unavailable"


def test_a_forked_child_counts_for_itself(metered: LossClient, registry: CollectorRegistry) -> None:
    metrics = ClientMetrics.of(registry)
    with metrics.lock:  # another thread may hold it at the moment of a fork
        metrics.after_fork()
        metrics.add("lossgrad_client_sent_bytes", ("ComputeLoss",), 1)
    assert series(registry, "lossgrad_client_sent_bytes_total") == {("ComputeLoss",): 1}
    assert os.getpid()


def test_a_server_that_drains_is_a_reconnect_by_that_name(
    registry: CollectorRegistry, peer_server: PeerServer, peer: Peer
) -> None:
    draining = iter([Refused(status(Code.UNAVAILABLE, "down", reason="DRAINING", retry_after=0.0))])

    def fail(_: Any) -> None:
        for error in draining:
            raise error

    peer.fail = fail
    with LossClient(peer_server.target, metrics=registry) as client:
        assert len(client.compute_many([(ZERO, ZERO)] * 3, L1())) == 3
    assert series(registry, "lossgrad_client_reconnects_total") == {("stream", "draining"): 1}
    assert series(registry, "lossgrad_client_retries_total")["stream", "draining"] >= 1
