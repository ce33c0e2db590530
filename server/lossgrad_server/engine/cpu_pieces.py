"""One large request, computed piece by piece, so that others can be computed in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import Final

from lossgrad_server.engine.cpu_layout import CHUNK, Walk
from lossgrad_server.engine.cpu_memory import Arena, output_memory
from lossgrad_server.engine.cpu_program import Program
from lossgrad_server.work import BatchResult, Buffer, WorkFailure, WorkResult

# Walks whose units are samples of which only the sums are touched.
_SAMPLE_WALKS: Final = (Walk.DIVIDE_ROWS, Walk.FINISH_ROWS)
_SAMPLES_PER_PIECE: Final = 1 << 14
# Walks of which any thread may do any unit.
_SHARED_WALKS: Final = (Walk.WEIGH_ALL, Walk.WEIGH_ROWS, Walk.WALK_ALL, Walk.WALK_ROWS)


class Pieces:
    """A request that is being computed. Call `advance` until it returns True, then `result`, once."""

    def __init__(
        self,
        arena: Arena,
        pool: ThreadPoolExecutor | None,
        program: Program,
        operands: tuple[Buffer, ...],
        piece_work: int,
    ) -> None:
        """OperandMismatch if the operands are not what the program says, MemoryError if there is no room for the answer.

        `piece_work` is about how much one thread does in a piece, elements times losses.
        """
        self._arena = arena
        self._pool = pool
        self._program = program
        self._outputs = output_memory(program.output_bytes)
        self._job = arena.open_job(program, [*operands, self._outputs])
        self._units_per_piece = max(1, piece_work // (CHUNK * program.spec_count))
        self._left = self._pieces()

    def advance(self) -> bool:
        """Compute the next piece. Returns whether all is done."""
        piece = next(self._left, None)
        if piece is None:
            return True
        self._compute(*piece)
        return False

    def result(self) -> WorkResult:
        """Return the answer, and give back the memory that computing it took."""
        self._arena.close_job(self._job)
        outputs = tuple([self._outputs[begin:end] for begin, end in self._program.output_spans])
        return self._program.result(self._job.scalars, outputs)

    def _pieces(self) -> Iterator[tuple[Walk, int, int]]:
        for walk, unit_count in self._program.walks:
            units = self._units_per_piece
            if walk in _SAMPLE_WALKS:
                units = _SAMPLES_PER_PIECE
            elif walk in _SHARED_WALKS:
                units *= self._arena.threads
            for begin in range(0, unit_count, units):
                yield walk, begin, min(begin + units, unit_count)

    def _compute(self, walk: Walk, begin: int, end: int) -> None:
        threads = min(self._arena.threads, end - begin) if walk in _SHARED_WALKS else 1
        if threads == 1 or self._pool is None:
            self._job.walk(walk, begin, end, 0)
            return
        edges = [begin + (end - begin) * thread // threads for thread in range(threads + 1)]
        others = [
            self._pool.submit(self._job.walk, walk, edges[thread], edges[thread + 1], thread)
            for thread in range(1, threads)
        ]
        self._job.walk(walk, edges[0], edges[1], 0)
        for other in others:
            other.result()


class PendingPieces:
    """A batch of one large request. Implements work.Pending."""

    def __init__(self, pieces: Pieces, failure: Callable[[Exception], WorkFailure], started_ns: int) -> None:
        """`failure` makes the outcome of an error; `started_ns` is when packing began, on perf_counter_ns's clock."""
        self._pieces = pieces
        self._failure = failure
        self._started_ns = started_ns
        self._packed_ns = self._computed_ns = perf_counter_ns()
        self._failed: WorkFailure | None = None
        self._has_more = True

    def advance(self) -> bool:
        """Compute the next piece; return whether there are more."""
        if self._has_more:
            try:
                self._has_more = not self._pieces.advance()
            except Exception as error:
                self._failed = self._failure(error)
                self._has_more = False
            self._computed_ns = perf_counter_ns()
        return self._has_more

    def is_done(self) -> bool:
        """Return whether all pieces are computed."""
        return not self._has_more

    def result(self) -> BatchResult:
        """Compute what is left and return the outcome. The time that other batches took between pieces is compute."""
        while self.advance():
            pass
        outcome = self._failed or self._pieces.result()
        return BatchResult(
            [outcome],
            self._packed_ns - self._started_ns,
            self._computed_ns - self._packed_ns,
            perf_counter_ns() - self._computed_ns,
        )
