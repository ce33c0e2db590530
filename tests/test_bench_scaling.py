"""The benchmark of several servers loads all of them, and counts what they answered."""

from __future__ import annotations

import pytest

from bench import scaling


@pytest.mark.slow
def test_every_server_gets_its_share_of_calls_and_of_an_evaluation() -> None:
    cases = {case.name: case for case in scaling.CASES}
    with scaling.servers(2) as running:
        for name in ("64 KiB, unary", "1 MiB, evaluate"):
            measured = scaling.measure(running, cases[name], seconds=0.5)
            assert measured.servers == 2
            assert measured.requests_per_second > 0
            assert measured.bytes_per_second == pytest.approx(measured.requests_per_second * cases[name].wire_bytes)
            assert measured.server_seconds_per_request > 0
            assert measured.least_share > 0.2, f"{name}: one server had next to nothing to do"
