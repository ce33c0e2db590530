"""Evaluations that are shared among servers, interrupted and gone on with: each batch exactly once, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossgrad import MSE, Checkpoint, LossClient, SmoothL1
from tests.server.serving import RunningServer, StartServer

RANDOM = np.random.default_rng(3)
INPUT = RANDOM.normal(size=(700, 11)).astype(np.float32)
TARGET = RANDOM.normal(size=(700, 11)).astype(np.float32)
LOSSES = (SmoothL1(beta=0.5), MSE(reduction="sum"))


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[LossClient]:
    with LossClient(server.address) as client:
        yield client


def test_several_servers_share_the_work_with_the_same_bits(client: LossClient, start_server: StartServer) -> None:
    servers = [start_server() for _ in range(2)]
    batches = [(INPUT[i:], TARGET[i:], {"group": i % 3}) for i in range(200)]
    shared = client.evaluate(batches, LOSSES, endpoints=[server.address for server in servers], per_batch=True)
    alone = client.evaluate(batches, LOSSES, per_batch=True)
    assert shared.accumulation == alone.accumulation
    assert [batch.to_dict() for batch in shared.batches] == [batch.to_dict() for batch in alone.batches]
    assert {server.target for server in shared.servers} == {server.address for server in servers}


class Interrupting:
    """Batches that can be indexed, that stop the run where told, and that say which were read."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.read: list[int] = []

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return INPUT[index:], TARGET[index:], {"group": index % 3}


@pytest.mark.parametrize("stops", [[0], [20], [49], [1, 2, 30, 31, 48]])
def test_an_interrupted_evaluation_goes_on_where_it_was(client: LossClient, tmp_path: Path, stops: list[int]) -> None:
    path = tmp_path / "run.lossgrad"
    uninterrupted = client.evaluate(Interrupting(-1), LOSSES, per_batch=True)
    counted = 0
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            client.evaluate(Interrupting(stop), LOSSES, per_batch=True, checkpoint=Checkpoint(path, key="boxes"))
    last = Interrupting(-1)
    report = client.evaluate(last, LOSSES, per_batch=True, checkpoint=Checkpoint(path, key="boxes"))
    counted = report.resumed_batch_count
    assert report.accumulation == uninterrupted.accumulation
    assert [batch.to_dict() for batch in report.batches] == [batch.to_dict() for batch in uninterrupted.batches]
    assert len(last.read) == 50 - counted
    again = Interrupting(-1)
    assert client.evaluate(again, LOSSES, checkpoint=Checkpoint(path, key="boxes")).accumulation == report.accumulation
    assert again.read == []


def test_an_interruption_while_a_batch_is_counted_leaves_the_file_as_it_was(client: LossClient, tmp_path: Path) -> None:
    path = tmp_path / "run.lossgrad"
    client.evaluate([(INPUT, TARGET)] * 3, LOSSES, checkpoint=path)
    before = path.read_bytes()
    calls = 0

    class Interrupted(str):
        """A group's name that is interrupted when the dictionary of groups compares it."""

        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise KeyboardInterrupt
            return super().__hash__()

    batches = [(INPUT, TARGET)] * 3 + [(INPUT, TARGET, {"group": Interrupted("a")})]
    with pytest.raises(KeyboardInterrupt):
        client.evaluate(batches, LOSSES, checkpoint=path)
    assert path.read_bytes() == before


def test_a_batch_that_failed_is_tried_again_by_the_next_run(client: LossClient, tmp_path: Path) -> None:
    path = tmp_path / "run.lossgrad"
    first = client.evaluate([(INPUT, TARGET), (INPUT[:3], TARGET[:2])], LOSSES, on_error="collect", checkpoint=path)
    assert len(first.errors) == 1
    second = client.evaluate([(INPUT, TARGET), (INPUT, TARGET)], LOSSES, checkpoint=path)
    assert second.resumed_batch_count == 1
    assert second.accumulation == client.evaluate([(INPUT, TARGET)] * 2, LOSSES).accumulation
