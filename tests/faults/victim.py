"""A well-behaved caller beside those who are not."""

from __future__ import annotations

import threading
import time

import numpy as np

import lossgrad
from tests.faults.load import percentile
from tests.server.serving import eventually

X, Y = np.linspace(-2, 2, 64, dtype=np.float32), np.zeros(64, np.float32)


class Victim:
    """A well-behaved caller beside the others: how long its calls take, and that all are answered."""

    def __init__(self, address: str) -> None:
        self.seconds: list[float] = []
        self.failures: list[Exception] = []
        self._done = threading.Event()
        self._client = lossgrad.LossClient(address)
        self._expected = self._client.l1(X, Y).value
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        while not self._done.wait(0.01):
            began = time.monotonic()
            try:
                assert self._client.l1(X, Y).value == self._expected
            except Exception as error:
                self.failures.append(error)
            self.seconds.append(time.monotonic() - began)

    def __enter__(self) -> Victim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def check(self, most_seconds: float) -> str:
        """All its calls were answered, 99 of 100 within this long."""
        assert not self.failures, self.failures[0]
        eventually(lambda: len(self.seconds) > 20 or self.failures)
        assert not self.failures, self.failures[0]
        p99 = percentile(sorted(self.seconds), 99)
        assert p99 <= most_seconds, f"p99 {p99:.3f} s"
        return f"the victim's {len(self.seconds)} calls: p99 {p99 * 1e3:.1f} ms, max {max(self.seconds) * 1e3:.1f} ms"
