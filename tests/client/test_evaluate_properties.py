"""Whatever is done to a data set's slices, an evaluation gives the same bytes: properties, over a real server.

What is expected comes from the server's own accumulator, `AccumulateLoss`, over the slices in their order.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lossgrad
from lossgrad import Accumulation, BatchResult, Checkpoint, LossClient
from lossgrad_api import accumulation as api
from lossgrad_api import codec
from lossgrad_api.loss_totals import LossTotal
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.embedded import EmbeddedServer
from tests.server.accumulate_calls import CHUNK, MSE, SMOOTH_L1, Answers, config, slice_of

LOSSES = (lossgrad.SmoothL1(beta=0.5), lossgrad.MSE(reduction="sum"))
SIZES = (1, 5, 700, CHUNK, 3 * CHUNK + 17, 0)
Totals = dict[str, tuple[LossTotal, ...]]


def numbers(length: int, seed: int) -> Any:
    """Return float64 of all sizes, so that their sums differ in their bits with the order of plain additions."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=length) * 10.0 ** rng.uniform(-2, 2, length)


def batch_of(index: int) -> Any:
    length = SIZES[index % len(SIZES)]
    options: dict[str, Any] = {"group": "abc"[index % 3]}
    if index % 4 == 1:
        options["weight"] = np.abs(numbers(length, 3 * index + 2))
    return numbers(length, 3 * index), numbers(length, 3 * index + 1), options


BATCHES = [batch_of(index) for index in range(20)]


@pytest.fixture(scope="module")
def embedded() -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(device="cpu", threads=1)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(embedded: EmbeddedServer) -> Iterator[LossClient]:
    with LossClient.from_channel(embedded.channel()) as client:
        yield client


def accumulated(embedded: EmbeddedServer, batches: list[Any]) -> Totals:
    """Return what `AccumulateLoss` makes of the batches."""
    call = embedded.channel().stream_stream(
        codec.ACCUMULATE_LOSS, pb.AccumulateLossRequest.SerializeToString, pb.AccumulateLossResponse.FromString
    )
    answers = Answers()
    slices = [
        slice_of(number, input, target, weight=more.get("weight"), group=more.get("group", ""), dtype="float64")
        for number, (input, target, more) in enumerate(batches, 1)
    ]
    for message in call(iter([config(SMOOTH_L1, MSE), *slices]), timeout=30):
        answers.take(message)
    return {name: group.totals for name, group in answers.state.groups.items()}


@pytest.fixture(scope="module")
def expected(embedded: EmbeddedServer) -> Totals:
    return accumulated(embedded, BATCHES)


def totals_of(accumulation: Accumulation) -> Totals:
    return {name: accumulation.exact(name) for name in accumulation.group_names}


def bytes_of(totals: Totals) -> bytes:
    """Return totals in the form in which they travel."""
    functions = [api.LossFunction("smooth_l1", 0.5), api.LossFunction("mse")]
    groups = [api.GroupTotals(name, each) for name, each in totals.items()]
    return api.Accumulation(functions, groups).to_bytes()


def assert_is(accumulation: Accumulation, expected: Totals, batches: list[Any]) -> None:
    assert bytes_of(totals_of(accumulation)) == bytes_of(expected)
    assert accumulation.element_count == sum(input.size for input, *_ in batches)


def merged(data: st.DataObject, parts: list[Accumulation]) -> Accumulation:
    """Merge parts, any two or more of them at a time, until one is left."""
    while len(parts) > 1:
        parts = data.draw(st.permutations(parts))
        count = data.draw(st.integers(2, len(parts)))
        parts = [Accumulation.merge(*parts[:count]), *parts[count:]]
    return parts[0]


CUTS = st.sampled_from([1, 70_000, 1 << 22])  # of slices: at each chunk, now and then, never


def test_plain_additions_in_another_order_would_give_other_bits() -> None:
    terms = [float(((input - target) ** 2).sum()) for input, target, _ in BATCHES]
    shuffles = [random.Random(seed).sample(terms, len(terms)) for seed in range(100)]
    assert len({sum(shuffle) for shuffle in shuffles}) > 3
    assert len({math.fsum(shuffle) for shuffle in shuffles}) == 1


@settings(max_examples=25)
@given(data=st.data())
def test_any_partition_permutation_and_merge_tree(client: LossClient, expected: Totals, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(BATCHES))))
    edges = sorted({0, len(order), *data.draw(st.sets(st.integers(0, len(order)), max_size=5))})
    parts = []
    for start, stop in itertools.pairwise(edges):
        report = client.evaluate(
            [BATCHES[index] for index in order[start:stop]],
            LOSSES,
            slice_bytes=data.draw(CUTS),
            in_flight_bytes=data.draw(st.sampled_from([1, 1 << 26])),
        )
        parts.append(report.accumulation)
    assert_is(merged(data, parts), expected, BATCHES)


WHOLE = numbers(9 * CHUNK + 123, 1000), numbers(9 * CHUNK + 123, 1001)


@pytest.fixture(scope="module")
def expected_whole(embedded: EmbeddedServer) -> Totals:
    return accumulated(embedded, [(*WHOLE, {})])


@settings(max_examples=25)
@given(data=st.data())
def test_any_way_of_cutting_a_tensor_at_whole_chunks_into_batches(
    client: LossClient, expected_whole: Totals, data: st.DataObject
) -> None:
    cuts = data.draw(st.sets(st.integers(1, 9)))
    edges = sorted({0, len(WHOLE[0]), *(cut * CHUNK for cut in cuts)})
    batches = [tuple(array[start:stop] for array in WHOLE) for start, stop in itertools.pairwise(edges)]
    report = client.evaluate(data.draw(st.permutations(batches)), LOSSES, slice_bytes=data.draw(CUTS))
    assert_is(report.accumulation, expected_whole, [WHOLE])


class Stop(BaseException):
    """What ends a run in the middle, as ctrl-C does."""


class Interrupted:
    """The batches in some order, of which reading one, or counting so many, ends the run."""

    def __init__(self, order: list[int], *, read: int | None = None, counted: int | None = None) -> None:
        self._order = order
        self._read = read
        self._counted = counted
        self.count = 0

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        if index == self._read:
            raise Stop
        return BATCHES[self._order[index]]

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def on_batch(self, _: BatchResult) -> None:
        if self.count == self._counted:
            raise Stop
        self.count += 1


POINTS = st.tuples(st.sampled_from(["read", "counted"]), st.integers(0, len(BATCHES) - 1))


@settings(max_examples=25)
@given(data=st.data(), points=st.lists(POINTS, min_size=1, max_size=4))
def test_any_resume_point(
    client: LossClient,
    expected: Totals,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    points: list[tuple[str, int]],
) -> None:
    path: Path = tmp_path_factory.mktemp("resume") / "checkpoint"
    order = data.draw(st.permutations(range(len(BATCHES))))
    # What never comes about (so few are left) ends no run.
    runs: list[Any] = [Interrupted(order, **{kind: point}) for kind, point in points] + [Interrupted(order)]
    total = 0
    for run in runs:
        with contextlib.suppress(Stop):
            report = client.evaluate(
                run,
                LOSSES,
                on_batch=run.on_batch,
                # In turn: written at every batch, and only where the run ends.
                checkpoint=Checkpoint(path, every_seconds=data.draw(st.sampled_from([0.0, 1e6]))),
                in_flight_bytes=data.draw(st.sampled_from([1, 1 << 26])),
            )
        total += run.count
    assert_is(report.accumulation, expected, BATCHES)
    assert total == len(BATCHES)  # no batch was counted by two runs
    assert report.resumed_batch_count == total - runs[-1].count
