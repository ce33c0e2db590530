"""One large request, computed piece by piece, so that others can be computed in between."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from lossgrad_server.engine.cpu_layout import CHUNK, Program, Stage, Walk
from lossgrad_server.engine.cpu_memory import Arena, BufferTable, Memory, output_memory
from lossgrad_server.work import SPEC_RESULT, Buffer, WorkResult

# Walks whose units are samples of which only the sums are touched.
_SAMPLE_WALKS: Final = (Walk.DIVIDE_ROWS, Walk.FINISH_ROWS)
_SAMPLES_PER_PIECE: Final = 1 << 14
# Walks over chunks: any of their units may be done by any thread.
_SHARED_WALKS: Final = (Walk.WEIGH_ALL, Walk.WEIGH_ROWS, Walk.WALK_ALL, Walk.WALK_ROWS)


class Pieces:
    """A request that is being computed. Call `advance` until it returns True, then `result`, once."""

    def __init__(
        self,
        arena: Arena,
        table: BufferTable,
        pool: ThreadPoolExecutor | None,
        program: Program,
        operands: tuple[Buffer, ...],
        piece_work: int,
    ) -> None:
        """ValueError if the operands are not what the program expects, MemoryError if there is no room for the answer.

        `piece_work` is about how much one thread does in a piece, elements times losses.
        """
        self._arena = arena
        self._pool = pool
        self._program = program
        # Held until the end: the kernels know addresses only.
        self._operands = operands
        self._outputs = output_memory(program.output_bytes)
        _, outputs = table.resolve(list(operands), self._outputs, program.operand_sizes)
        self._state: Memory = arena.take_state(program.state_bytes)
        # The program, the operands' addresses and the results outlive this call, so they get memory of their own.
        self._addresses = table.copy(len(operands))
        self._code = Memory(len(program.code))
        self._code.view[:] = program.code
        self._results = Memory(SPEC_RESULT.size * program.spec_count)
        self._frame = {
            "program": self._code.address,
            "operands": self._addresses.address,
            "outputs": outputs,
            "results": self._results.address,
            "state": self._state.address,
        }
        self._units_per_piece = max(1, piece_work // (CHUNK * program.spec_count))
        self._left = self._pieces()

    def advance(self) -> bool:
        """Compute the next piece. Returns whether that was the last."""
        piece = next(self._left, None)
        if piece is not None:
            self._compute(*piece)
            return False
        return True

    def result(self) -> WorkResult:
        """Return the answer. Gives back the memory that the request took."""
        self._arena.give_back(self._state)
        outputs = tuple([self._outputs[begin:end] for begin, end in self._program.output_spans])
        return WorkResult(self._results.view.tobytes(), outputs)

    def _pieces(self) -> Iterator[tuple[Stage, int, int]]:
        for stage in self._program.stages:
            units = self._units_per_piece
            if stage.walk in _SAMPLE_WALKS:
                units = _SAMPLES_PER_PIECE
            elif stage.walk in _SHARED_WALKS:
                units *= self._arena.threads
            for begin in range(0, stage.unit_count, units):
                yield stage, begin, min(begin + units, stage.unit_count)

    def _compute(self, stage: Stage, begin: int, end: int) -> None:
        threads = min(self._arena.threads, end - begin) if stage.walk in _SHARED_WALKS else 1
        if threads == 1 or self._pool is None:
            self._arena.walk(self._frame, 0, stage.walk, begin, end)
            return
        edges = [begin + (end - begin) * thread // threads for thread in range(threads + 1)]
        others = [
            self._pool.submit(self._arena.walk, self._frame, thread, stage.walk, edges[thread], edges[thread + 1])
            for thread in range(1, threads)
        ]
        self._arena.walk(self._frame, 0, stage.walk, edges[0], edges[1])
        for other in others:
            other.result()
