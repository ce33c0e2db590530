"""Networks that the kernel itself cuts, thins out and takes down, in a namespace of the test's own (R17, R18, R19)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import lossgrad
from tests.faults.load import percentile
from tests.faults.namespace import Namespace, NamespacedProgram
from tests.faults.programs import serving
from tests.server.serving import eventually

X, Y = np.linspace(-2, 2, 64, dtype=np.float32), np.zeros(64, np.float32)
# What the SDK asks of its connections: a ping after 20 s without a word, and 5 s for anything to be acknowledged.
KEEPALIVE_SECONDS = 20 + 5


@pytest.fixture
def wire() -> Iterator[tuple[Namespace, str]]:
    with (
        Namespace() as namespace,
        serving(NamespacedProgram(namespace, "--port=0", "--metrics-port=-1", "--threads=1")) as (_, address),
    ):
        yield namespace, address


@pytest.mark.faults
def test_r17_a_cut_of_ten_seconds_is_a_typed_error_within_keepalives_sum_and_then_over(
    wire: tuple[Namespace, str],
) -> None:
    namespace, address = wire
    with lossgrad.LossClient(address, retries=0) as client:
        expected = client.l1(X, Y).value
        namespace.rule("-p", "tcp", "-j", "DROP")
        began = time.monotonic()
        with pytest.raises(lossgrad.Unavailable):
            client.l1(X, Y, timeout=60)
        failed = time.monotonic() - began
        time.sleep(max(0.0, 10 - failed))
        namespace.heal()
        began = time.monotonic()
        value = None
        while value is None:  # each a call of its own: what a caller sees who does not try again
            try:
                value = client.l1(X, Y, timeout=10).value
            except lossgrad.Unavailable:
                time.sleep(0.05)
        recovered = time.monotonic() - began
    print(f"\nnetwork cut for 10 s: Unavailable after {failed:.1f} s; served {recovered:.2f} s after it was back")
    assert value == expected
    assert failed <= KEEPALIVE_SECONDS + 1
    assert recovered <= 2


def test_r18_of_packets_5_in_100_are_lost_and_every_call_is_answered(wire: tuple[Namespace, str]) -> None:
    namespace, address = wire
    seconds: list[float] = []
    with lossgrad.LossClient(address) as client:
        expected = client.l1(X, Y).value
        namespace.rule("-p", "tcp", "-m", "statistic", "--mode", "random", "--probability", "0.05", "-j", "DROP")
        big = np.full(200_000, 3, np.float32), np.ones(200_000, np.float32)
        for number in range(200):
            began = time.monotonic()
            if number % 10 == 0:
                assert client.l1(*big, timeout=5).value == 2.0
            else:
                assert client.l1(X, Y, timeout=5).value == expected
            seconds.append(time.monotonic() - began)
        began = time.monotonic()
        assert [one.value for one in client.stream([(X, Y)] * 1000, lossgrad.L1())] == [expected] * 1000
        streamed = time.monotonic() - began
    print(
        f"\n5% of packets lost: 200 calls answered, p50 {percentile(sorted(seconds), 50) * 1e3:.1f} ms, max "
        f"{max(seconds) * 1e3:.0f} ms; a stream of 1000 in {streamed:.2f} s"
    )
    assert max(seconds) < 5


def test_r19_refused_connections_and_a_link_that_is_down_are_typed_errors_and_then_over(
    wire: tuple[Namespace, str],
) -> None:
    namespace, address = wire
    figures = []
    with lossgrad.LossClient(address, retries=0) as client:
        expected = client.l1(X, Y).value

        def recover() -> float:
            began = time.monotonic()
            value = None
            while value is None:
                try:
                    value = client.l1(X, Y, timeout=10).value
                except (lossgrad.Unavailable, lossgrad.DeadlineExceeded):
                    time.sleep(0.05)
            assert value == expected
            return time.monotonic() - began

        # Everything is answered with a reset, as by a firewall that forgot its connections.
        namespace.rule("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
        began = time.monotonic()
        with pytest.raises(lossgrad.Unavailable):
            client.l1(X, Y, timeout=10)
        refused = time.monotonic() - began
        namespace.heal()
        figures.append(f"reset: Unavailable after {refused * 1e3:.0f} ms, served {(first := recover()):.2f} s after")
        # The wire is down for a second: what is under way waits for it.
        namespace.link("down")
        done = threading.Event()
        values: list[float | None] = []

        def call() -> None:
            values.append(client.l1(X, Y, timeout=20).value)
            done.set()

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(1)
        assert not done.is_set()
        namespace.link("up")
        began = time.monotonic()
        eventually(done.is_set)
        second = time.monotonic() - began
        thread.join()
        figures.append(f"link down for 1 s: the call under way answered {second:.2f} s after it was up")
    print("\n" + "; ".join(figures))
    assert values == [expected]
    assert refused < 1
    assert first <= 2
    assert second <= 2
