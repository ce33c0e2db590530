"""lossgrad.torchmetrics.LossMetric among torchmetrics' own: in collections, with forward, copied, pickled, over ranks."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics

import lossgrad
from lossgrad import L1, MSE, InvalidRequest, LossClient, SmoothL1
from lossgrad.torchmetrics import LossMetric
from tests.server.serving import RunningServer

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(50, 3, generator=GENERATOR), torch.randn(50, 3, generator=GENERATOR)) for _ in range(6)]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[LossClient]:
    with LossClient(server.address) as client:
        yield client


def test_it_works_in_a_collection_beside_torchmetrics_own(client: LossClient) -> None:
    collection = torchmetrics.MetricCollection(
        {
            "mse": LossMetric(MSE(), client=client),
            "l1": LossMetric(L1(), client=client),
            "theirs": torchmetrics.MeanSquaredError(),
        }
    )
    assert isinstance(collection["mse"], torchmetrics.Metric)
    for input, target in BATCHES[:3]:
        collection.update(input, target)
    for input, target in BATCHES[3:]:
        values = collection(input, target)
        assert values["mse"].item() == client.mse(input, target).value
        assert values["mse"].item() == pytest.approx(values["theirs"].item(), rel=1e-6)
    computed = collection.compute()
    expected = client.evaluate(BATCHES, [MSE(), L1()])
    assert (computed["mse"].item(), computed["l1"].item()) == (expected[0].mean, expected[1].mean)
    assert computed["mse"].dtype == torch.float64
    assert computed["mse"].item() == pytest.approx(computed["theirs"].item(), rel=1e-6)
    copied = collection.clone(prefix="val_")
    collection.reset()
    assert copied.compute()["val_mse"].item() == expected[0].mean
    collection.update(*BATCHES[0])
    assert collection.compute()["mse"].item() == client.mse(*BATCHES[0]).value


def test_it_is_merged_copied_pickled_and_reset(client: LossClient) -> None:
    losses = [SmoothL1(beta=0.5), MSE(reduction="sum")]
    even, odd = (LossMetric(losses, client=client) for _ in range(2))
    for number, batch in enumerate(BATCHES):
        (odd if number % 2 else even).update(*batch, group=number % 3)
    expected = client.evaluate([(*batch, {"group": index % 3}) for index, batch in enumerate(BATCHES)], losses)
    odd.merge_state(even)
    assert odd.accumulation() == expected.accumulation
    copies: list[Any] = [odd, odd.clone(), pickle.loads(pickle.dumps(odd))]  # noqa: S301
    for each in copies:
        assert [value.item() for value in each.compute()] == [total.value for total in expected]
        assert set(each.report().groups) == {"0", "1", "2"}
    again: Any = odd.clone()
    again.update(*BATCHES[0])  # a copy goes on, with the same client
    assert again.accumulation().element_count == odd.accumulation().element_count + 150
    loaded = LossMetric(losses, client=client)
    odd.persistent(True)
    loaded.persistent(True)
    loaded.load_state_dict(odd.state_dict())
    assert loaded.accumulation() == expected.accumulation
    odd.reset()
    assert odd.accumulation().element_count == 0
    with pytest.raises(InvalidRequest, match="the state is of"):
        LossMetric(L1(), client=client).merge_state(loaded)


def test_a_batch_that_is_wrong_is_told_and_arrays_of_numpy_are_taken(client: LossClient) -> None:
    metric = LossMetric(L1(), client=client)
    with pytest.raises(InvalidRequest, match="send equal shapes"):
        metric(torch.ones(3), torch.ones(2))
    metric.reset()
    value = metric(np.ones(3, np.float32), np.zeros(3, np.float32), mask=np.array([True, False, True]))
    assert (value, metric.compute()) == (torch.tensor(1.0, dtype=torch.float64),) * 2
    assert len({metric}) == 1
    assert metric in {metric}


RANK = """
import sys
import torch, torch.distributed
import lossgrad
from lossgrad.torchmetrics import LossMetric
rank, store, target = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
generator = torch.Generator().manual_seed(0)
batches = [(torch.randn(50, 3, generator=generator), torch.randn(50, 3, generator=generator)) for _ in range(6)]
with lossgrad.LossClient(target) as client:
    metric = LossMetric(lossgrad.MSE(), client=client)
    if rank < 2:  # the third has nothing
        for batch in batches[rank::2]:
            metric.update(*batch, group="ab"[rank])
    else:
        metric._update_count = 1
    values = [metric.compute().item().hex()]
    if rank < 2:  # and goes on by itself
        metric.update(*batches[0])
    print(*values, metric.accumulation().element_count)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_it_is_synchronised_over_ranks_to_the_same_bits(
    client: LossClient, server: RunningServer, tmp_path: Path
) -> None:
    expected = client.evaluate(BATCHES, MSE())[0].mean.hex()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), server.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    printed: list[Any] = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], printed
    assert [out.split() for out, _ in printed] == [[expected, "600"], [expected, "600"], [expected, "0"]]


def test_the_module_is_found_as_an_attribute() -> None:
    assert lossgrad.torchmetrics.LossMetric is LossMetric
