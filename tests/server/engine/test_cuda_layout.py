"""Arenas: no two things in one place, everything aligned, and kernels for exactly the tiles that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lossgrad_server.engine.cuda_builder import template_of
from lossgrad_server.engine.cuda_fields import ALIGNMENT, BLOCK_ELEMENTS, CHUNK_ELEMENTS
from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.cuda_template import Kernel, Region, Stage, TooManyBytes
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from tests.server.engine.building import ALL_SPECS_PARAMETERS, FLOATS, spec


def random_plan(random: np.random.Generator) -> JobPlan:
    rank = int(random.integers(0, 4))
    shape = tuple(
        int(extent) for extent in random.choice([0, 1, 2, 3, 17, 40], rank, p=[0.03, 0.17, 0.2, 0.2, 0.2, 0.2])
    )
    narrow = tuple(1 if random.random() < 0.2 else extent for extent in shape)
    reductions = list(Reduction) if rank else list(Reduction)[:3]
    specs = tuple(
        SpecPlan(kind, ALL_SPECS_PARAMETERS[kind], reductions[random.integers(len(reductions))], random.random() < 0.7)
        for kind in map(LossKind, random.integers(1, 5, size=random.integers(1, 5)).tolist())
    )
    types = random.choice(np.array([1, 2, 3, 4]), 3).tolist()
    return JobPlan(
        specs,
        TensorPlan(DataType(types[0]), shape),
        TensorPlan(DataType(types[0] if random.random() < 0.6 else types[1]), narrow),
        weight=TensorPlan(DataType(types[2]), narrow) if random.random() < 0.3 else None,
        mask=TensorPlan(DataType.BOOL, shape) if random.random() < 0.3 else None,
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_two_things_are_in_one_place(seed: int) -> None:
    random = np.random.default_rng(seed)
    layout = Layout([template_of(random_plan(random).header) for _ in range(random.integers(1, 30))])
    spans: list[tuple[int, int]] = []
    for job, template in enumerate(layout.templates):
        for region in list(Region)[1:]:
            start = int(layout.starts[job, region])
            assert start % ALIGNMENT == 0
            assert template.sizes[region] % ALIGNMENT == 0
            spans.append((start, start + template.sizes[region]))
    spans += [(launch.table.start, launch.table.stop) for launch in layout.launches]
    spans = sorted(span for span in spans if span[1] > span[0])
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.byte_count
    assert layout.byte_count <= sum(template.arena_bytes for template in layout.templates) + 8192
    assert layout.upload.start == 0
    assert layout.tables.stop == layout.upload.stop <= layout.download.stop


@pytest.mark.parametrize("seed", range(20))
def test_a_job_s_blocks_lie_apart_and_within_their_region(seed: int) -> None:
    template = template_of(random_plan(np.random.default_rng(100 + seed)).header)
    plan = template.plan
    blocks = [(place, operand.byte_count) for place, operand in zip(template.operands, plan.operands, strict=True)]
    blocks += [(place, output.tensor.byte_count) for place, output in zip(template.outputs, plan.outputs, strict=True)]
    blocks += [(one.target, plan.element_count * one.data_type.itemsize) for one in template.expansions]
    blocks += list({one.source: 8 * plan.element_count for one in template.roundings}.items())
    occupied: dict[Region, list[tuple[int, int]]] = {}
    for place, byte_count in blocks:
        assert place.offset % ALIGNMENT == 0
        if byte_count:
            occupied.setdefault(place.region, []).append((place.offset, place.offset + byte_count))
    for region, spans in occupied.items():
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(sorted(spans)))
        assert max(stop for _, stop in spans) <= template.sizes[region]


def test_the_tables_name_each_tile_once_and_places_of_the_arena() -> None:
    plans = [
        JobPlan((spec(),), TensorPlan(DataType.FLOAT32, (count,)), TensorPlan(DataType.FLOAT32, (count,)))
        for count in (1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, 3 * CHUNK_ELEMENTS, 0)
    ]
    layout = Layout([template_of(plan.header) for plan in plans])
    tables = np.zeros(layout.tables.byte_count, np.uint8)
    layout.fill(tables)
    losses, folds = layout.launches
    assert losses.kernel == Kernel(Stage.LOSSES, operand=DataType.FLOAT32, output=DataType.FLOAT32)
    start = losses.table.start - layout.tables.start
    entries = tables[start : start + losses.table.byte_count].view(np.int64).reshape(-1, 2).tolist()
    assert [tile for _, tile in entries] == [0, 0, 0, 1, 0, 1, 2]
    records = sorted({record for record, _ in entries})
    assert len(records) == 4
    # An empty sum is folded, too: someone must write 0 and NaN.
    assert folds.kernel == Kernel(Stage.LOSS_FOLDS)
    assert folds.tile_count == 5


@pytest.mark.parametrize("data_type", FLOATS)
def test_the_common_case_is_read_and_written_where_it_lies(data_type: DataType) -> None:
    tensor = TensorPlan(data_type, (40, 30))
    template = template_of(JobPlan((spec(), spec(reduction=Reduction.NONE)), tensor, tensor).header)
    assert template.expansions == ()
    assert template.roundings == ()
    assert {Kernel.of_code(code).stage for code in template.programs[:, 0].tolist()} == {Stage.LOSSES, Stage.LOSS_FOLDS}
    # One partial sum, and nothing else, is neither copied in nor out.
    assert template.sizes[Region.SCRATCH] == ALIGNMENT


def test_rows_are_laid_beside_each_other_up_to_a_block() -> None:
    for length, tiles in ((1, 3), (2, 5), (3, 9), (BLOCK_ELEMENTS, 2049), (BLOCK_ELEMENTS + 1, 2049), (5000, 2 * 2049)):
        tensor = TensorPlan(DataType.FLOAT32, (2049, length))
        one = spec(reduction=Reduction.SAMPLE_SUM)
        template = template_of(JobPlan((one,), tensor, tensor).header)
        losses = [row for row in template.programs.tolist() if Kernel.of_code(row[0]).stage == Stage.LOSSES]
        assert [tile_count for _, _, tile_count in losses] == [tiles]


def test_kernels_survive_their_code() -> None:
    for kernel in (
        Kernel(Stage.WEIGHTS, has_rows=True),
        Kernel(Stage.LOSSES, False, True, 3, 4),
        Kernel(Stage.LOSS_FOLDS),
    ):
        assert Kernel.of_code(kernel.code) == kernel


def test_a_job_that_no_device_holds_is_refused_before_anything_overflows() -> None:
    side = 1 << 31
    plan = JobPlan((spec(),), TensorPlan(DataType.FLOAT32, (side, 1)), TensorPlan(DataType.FLOAT32, (1, side)))
    with pytest.raises(TooManyBytes) as caught:
        template_of(plan.header)
    assert caught.value.required_bytes > 4 * side * side
