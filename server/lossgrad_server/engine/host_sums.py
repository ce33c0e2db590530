"""Exact sums of float64 numbers in the host's memory, in machine code: for engines that compute elsewhere."""

from __future__ import annotations

import ctypes

import numpy as np

from lossgrad_server.engine import cpu_native
from lossgrad_server.engine.cpu_exact import EXACT_SUM_BYTES, exact_quotient, exact_sum
from lossgrad_server.engine.cpu_native import address_of
from lossgrad_server.work import MAX_PARTIALS


class HostSums:
    """Adds up numbers by their address. Used by one thread at a time."""

    def __init__(self) -> None:
        """Load what is compiled, or compile it: seconds, so make one before the first request."""
        cpu_native.load()
        word = ctypes.c_int64
        self._sum = ctypes.PYFUNCTYPE(word, word, word, word, word, word)(address_of(exact_sum))
        self._quotient = ctypes.PYFUNCTYPE(ctypes.c_double, word, word, ctypes.c_double, word)(
            address_of(exact_quotient)
        )
        self._memory = np.empty(EXACT_SUM_BYTES // 8, np.int64)
        self._partials = np.empty(MAX_PARTIALS, np.float64)
        self._words, self._out = self._memory.ctypes.data, self._partials.ctypes.data

    def total(self, address: int, count: int) -> tuple[float, ...]:
        """Return the exact sum, as work.SpecTotal has it."""
        return tuple(self._partials[: self._sum(address, count, self._words, self._out, MAX_PARTIALS)].tolist())

    def quotient(self, address: int, count: int, divisor: float) -> float:
        """Return the exact sum over a divisor, rounded about once."""
        result: float = self._quotient(address, count, divisor, self._words)
        return result
