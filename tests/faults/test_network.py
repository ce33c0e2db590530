"""Networks that cut, reset and delay, by a proxy on the loopback (R17, R19, R20)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

import lossgrad
from tests.faults.proxy import Proxy
from tests.server.serving import RunningServer

X, Y = np.linspace(-2, 2, 64, dtype=np.float32), np.zeros(64, np.float32)


@pytest.fixture
def proxy(server: RunningServer) -> Iterator[Proxy]:
    with Proxy(server.address) as running:
        yield running


def test_r17_a_cut_network_costs_callers_their_deadline_and_nothing_once_it_is_back(proxy: Proxy) -> None:
    with lossgrad.LossClient(proxy.address) as client:
        expected = client.l1(X, Y).value
        proxy.is_cut = True
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(lossgrad.DeadlineExceeded):
                client.l1(X, Y, timeout=0.5)
            assert time.monotonic() - began < 1
        proxy.is_cut = False
        began = time.monotonic()
        assert client.l1(X, Y, timeout=10).value == expected
        seconds = time.monotonic() - began
    print(f"\nnetwork cut: deadlines hold; served {seconds:.2f} s after it was back")
    assert seconds < 2


def test_r19_reset_connections_fail_no_call(proxy: Proxy) -> None:
    with lossgrad.LossClient(proxy.address) as client:
        expected = client.l1(X, Y).value
        slowest = 0.0
        for _ in range(5):
            proxy.reset()
            began = time.monotonic()
            assert client.l1(X, Y).value == expected
            assert [one.value for one in client.stream([(X, Y)] * 3, lossgrad.L1())] == [expected] * 3
            slowest = max(slowest, time.monotonic() - began)
    print(f"\nconnection reset: calls and streams go on within {slowest:.2f} s")
    assert slowest < 3


def test_r20_a_round_trip_of_200_ms_fails_nothing_and_streams_keep_their_pace(proxy: Proxy) -> None:
    with lossgrad.LossClient(proxy.address) as client:
        client.l1(X, Y)
        proxy.delay_seconds = 0.1
        began = time.monotonic()
        client.l1(X, Y)
        one = time.monotonic() - began
        began = time.monotonic()
        assert len(list(client.stream([(X, Y)] * 1000, lossgrad.L1()))) == 1000
        many = time.monotonic() - began
    print(f"\n200 ms away: a call takes {one * 1e3:.0f} ms, a thousand on a stream {many:.2f} s")
    assert 0.2 <= one < 0.6
    assert many < 10
