"""Utilization: the share of the last ten seconds that a device was busy."""

from __future__ import annotations

import pytest

from lossgrad_server.metrics import Utilization


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_utilization_is_the_busy_share_of_the_last_ten_seconds() -> None:
    clock = Clock()
    utilization = Utilization(clock)
    assert utilization.ratio() == 0
    clock.now += 2
    utilization.busy(0.5)
    assert utilization.ratio() == pytest.approx(0.25)  # of the two seconds that there are
    clock.now += 6
    utilization.busy(3)
    assert utilization.ratio() == pytest.approx(3.5 / 8)
    clock.now += 2
    assert utilization.ratio() == pytest.approx(0.35)
    clock.now += 4  # the first span has left the window
    assert utilization.ratio() == pytest.approx(0.3)
    clock.now += 2.5  # and of the second, half a second
    assert utilization.ratio() == pytest.approx(0.15)
    clock.now += 20
    assert utilization.ratio() == 0


def test_utilization_of_a_device_that_never_rests_is_1() -> None:
    clock = Clock()
    utilization = Utilization(clock)
    clock.now += 100
    utilization.busy(100)
    assert utilization.ratio() == 1


def test_utilization_keeps_little_at_any_rate_of_batches() -> None:
    clock = Clock()
    utilization = Utilization(clock)
    for _ in range(20_000):
        clock.now += 0.001
        utilization.busy(0.0005)
    assert utilization.ratio() == pytest.approx(0.5, rel=0.02)
    assert len(utilization._spans) <= 200
