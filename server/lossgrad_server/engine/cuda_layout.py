"""A launch's arena: where each job's share of each region starts, and the tables that tell programs what to compute.

An arena is one block of device memory: what is copied in, in one piece (INPUT, STATE, tables, NUMBERS); what is copied
out, in one piece (NUMBERS, OUTPUT); and SCRATCH. All is worked out with numpy for all jobs at once, because a batch may
hold a thousand, over which Python takes longer than the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossgrad_server.engine.cuda_template import TILE_BYTES, Int64Array, Kernel, Place, Region, Template, aligned

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of the arena."""

    start: int
    stop: int

    @property
    def byte_count(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel: its table has an entry for each tile, and each tile a program."""

    kernel: Kernel
    table: Span
    records: Int64Array  # where they are in the arena
    tile_counts: Int64Array  # of each
    tile_count: int


class Layout:
    """Where everything is. `fill` makes the tables; until then nothing as large as a job is allocated."""

    def __init__(self, templates: Sequence[Template]) -> None:
        self.templates = templates
        sizes = np.array([template.sizes for template in templates], np.int64)
        totals = sizes.sum(axis=0).tolist()
        # Exclusive sums: where each job's share starts within the region.
        starts = np.cumsum(sizes, axis=0) - sizes
        state_start = totals[Region.INPUT]
        end = state_start + totals[Region.STATE]

        self.launches: list[Launch] = []
        programs = np.concatenate([template.programs for template in templates])
        program_jobs = np.repeat(np.arange(len(templates)), [len(template.programs) for template in templates])
        records = programs[:, 1] + starts[program_jobs, Region.STATE] + state_start
        for code in np.unique(programs[:, 0]).tolist():
            chosen = programs[:, 0] == code
            tile_counts = programs[chosen, 2]
            tile_count = int(tile_counts.sum())
            table = Span(end, end + TILE_BYTES * tile_count)
            self.launches.append(Launch(Kernel.of_code(code), table, records[chosen], tile_counts, tile_count))
            end = aligned(table.stop)

        numbers = Span(end, end + totals[Region.NUMBERS])
        output = Span(numbers.stop, numbers.stop + totals[Region.OUTPUT])
        self.byte_count = output.stop + totals[Region.SCRATCH]
        # What the host writes beside the operands, what the device needs of the host, what the host gets of it.
        self.tables = Span(state_start, numbers.stop)
        self.upload = Span(0, numbers.stop)
        self.download = Span(numbers.start, output.stop)
        self._numbers = numbers
        region_starts = [0, 0, state_start, numbers.start, output.start, output.stop]
        self.starts: Int64Array = starts + np.array(region_starts, np.int64)

    def offset(self, job: int, place: Place) -> int:
        """Return where in the arena a job's place is."""
        return int(self.starts[job, place.region]) + place.offset

    def fill(self, tables: ByteArray) -> None:
        """Write the bytes of `tables`: the records that the kernels read, the tables of tiles, the numbers."""
        numbers = tables.view(np.int64)
        first = self.tables.start // 8
        state = np.concatenate([template.state for template in self.templates])
        regions = np.concatenate([template.state_regions for template in self.templates])
        jobs = np.repeat(np.arange(len(self.templates)), [len(template.state) for template in self.templates])
        # Places become offsets; what is not a place is in the region NOWHERE, which starts at 0.
        np.add(state, self.starts[jobs, regions], out=numbers[: len(state)])
        for launch in self.launches:
            table = numbers[launch.table.start // 8 - first :][: 2 * launch.tile_count].reshape(-1, 2)
            table[:, 0] = np.repeat(launch.records, launch.tile_counts)
            firsts = np.cumsum(launch.tile_counts) - launch.tile_counts
            table[:, 1] = np.arange(launch.tile_count) - np.repeat(firsts, launch.tile_counts)
        values = np.concatenate([template.numbers for template in self.templates])
        numbers[self._numbers.start // 8 - first :][: len(values)] = values
