"""What ModelStatistics tells: counts and durations of each model since the server started.

The durations are the batcher's and the worker's own, those of the batch that a request was part of: as with Triton, every
request of a batch is charged with all of it. Used in the event loop's thread only, save for `counts`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from lossgrad_api.inference import messages
from lossgrad_server.batching.job import Computed
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.transport.open_inference.models import MODELS, VERSION, Model

# Sizes of batches that are told apart. Nothing else bounds how many there are; one more is counted under a power of two.
_MAX_BATCH_SIZES: Final = 1024

# Batches of which requests may still be to be answered. Far more than are ever under way.
_NEWEST_BATCHES: Final = 64


class Failure(StrEnum):
    """Why a request failed, in Triton's words."""

    REJECTED = "REJECTED"  # for what the server was at
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"  # while it was computed
    OTHER = "OTHER"


_BACKEND: Final = (Reason.OUT_OF_DEVICE_MEMORY, Reason.DEVICE_FAILED, Reason.WORKER_CRASHED, Reason.INTERNAL)


def failure_of(error: RequestError) -> Failure:
    """Return what Triton would call an error."""
    if error.reason in _BACKEND:
        return Failure.BACKEND
    if error.code == Code.CANCELLED:
        return Failure.CANCELED
    return Failure.REJECTED if error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED) else Failure.OTHER


class ModelCounts(NamedTuple):
    """What was counted of one model since the server started; times are sums over its answered requests."""

    model: str
    success_count: int
    success_ns: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int
    inference_count: int
    execution_count: int
    failures: Mapping[Failure, int]
    pending_count: int


class Duration:
    """How often something happened, and how long it took in all."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int) -> None:
        """Count one."""
        self.count += 1
        self.ns += ns

    def message(self) -> dict[str, int]:
        """Return it as a StatisticDuration."""
        return {"count": self.count, "ns": self.ns}


class BatchDurations:
    """How long executions of one size took."""

    __slots__ = ("infer", "input", "output")

    def __init__(self) -> None:
        self.input = Duration()
        self.infer = Duration()
        self.output = Duration()

    def copy(self) -> BatchDurations:
        """Return another one with the same counts."""
        other = BatchDurations()
        for name in self.__slots__:
            mine, its = getattr(self, name), getattr(other, name)
            its.count, its.ns = mine.count, mine.ns
        return other

    def add(self, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one execution, or one request of it."""
        self.input.add(input_ns)
        self.infer.add(infer_ns)
        self.output.add(output_ns)


class _Batch:
    """What a model has had of one batch."""

    __slots__ = ("durations", "rows")

    def __init__(self, durations: tuple[int, int, int]) -> None:
        self.durations = durations
        self.rows = 0


def _add(batches: dict[int, BatchDurations], batch: _Batch) -> None:
    size = batch.rows
    if size not in batches and len(batches) >= _MAX_BATCH_SIZES:
        size = 1 << max(size.bit_length() - 1, 0)
    batches.setdefault(size, BatchDurations()).add(*batch.durations)


class ModelStatistics:
    """The counts of one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._last_inference_ms = 0
        self._inference_count = 0
        self._execution_count = 0
        self._success = Duration()
        self._fail = Duration()
        self._failures = dict.fromkeys(Failure, 0)
        self._pending = 0
        self._queue = Duration()
        self._requests = BatchDurations()
        self._batches: dict[int, BatchDurations] = {}
        # The newest batches, by their numbers: not all requests of one are answered at once.
        self._newest: dict[int, _Batch] = {}

    def computed(self, rows: int, computed: Computed, elapsed_ns: int) -> None:
        """Count a request of `rows` rows that is answered `elapsed_ns` after it came."""
        self._last_inference_ms = time.time_ns() // 1_000_000
        self._inference_count += rows
        self._success.add(elapsed_ns)
        self._queue.add(computed.queue_ns)
        batch = computed.batch
        durations = (batch.pack_ns, batch.compute_ns, batch.unpack_ns)
        self._requests.add(*durations)
        newest = self._newest.get(batch.number)
        if newest is None:
            newest = self._newest[batch.number] = _Batch(durations)
            self._execution_count += 1
            if len(self._newest) > _NEWEST_BATCHES:
                oldest = self._newest.pop(next(iter(self._newest)))
                _add(self._batches, oldest)
        newest.rows += rows

    def failed(self, error: RequestError, elapsed_ns: int) -> None:
        """Count a request that is answered with an error."""
        self._fail.add(elapsed_ns)
        self._failures[failure_of(error)] += 1

    def begun(self) -> None:
        """Take note that there is one more request inside."""
        self._pending += 1

    def ended(self) -> None:
        """Take note that there is one less."""
        self._pending -= 1

    def counts(self) -> ModelCounts:
        """Return what was counted. In any thread."""
        requests = self._requests
        return ModelCounts(
            model=self._model.name,
            success_count=self._success.count,
            success_ns=self._success.ns,
            queue_ns=self._queue.ns,
            input_ns=requests.input.ns,
            infer_ns=requests.infer.ns,
            output_ns=requests.output.ns,
            inference_count=self._inference_count,
            execution_count=self._execution_count,
            failures=dict(self._failures),
            pending_count=self._pending,
        )

    def message(self) -> dict[str, Any]:
        """Return it as a ModelStatistics."""
        batches = {size: one.copy() for size, one in self._batches.items()}
        for newest in self._newest.values():
            _add(batches, newest)
        return {
            "name": self._model.name,
            "version": VERSION,
            "last_inference": self._last_inference_ms,
            "inference_count": self._inference_count,
            "execution_count": self._execution_count,
            "inference_stats": {
                "success": self._success.message(),
                "fail": self._fail.message(),
                "queue": self._queue.message(),
                "compute_input": self._requests.input.message(),
                "compute_infer": self._requests.infer.message(),
                "compute_output": self._requests.output.message(),
                "cache_hit": {},
                "cache_miss": {},
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": batch.input.message(),
                    "compute_infer": batch.infer.message(),
                    "compute_output": batch.output.message(),
                }
                for size, batch in sorted(batches.items())
            ],
        }


class Statistics:
    """The counts of every model."""

    def __init__(self) -> None:
        self._models = {name: ModelStatistics(model) for name, model in MODELS.items()}

    def of(self, model: Model) -> ModelStatistics:
        """Return a model's counts."""
        return self._models[model.name]

    def counts(self) -> list[ModelCounts]:
        """Return what was counted, by model. In any thread."""
        return [one.counts() for one in self._models.values()]

    def message(self, model: Model | None) -> Any:
        """Return a ModelStatisticsResponse, of one model or of all."""
        chosen = self._models.values() if model is None else (self.of(model),)
        return messages().ModelStatisticsResponse(model_stats=[one.message() for one in chosen])
