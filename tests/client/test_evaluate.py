"""LossClient.evaluate over a real server: data sets of every kind, exact; what is promised about batches and errors."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lossgrad import (
    L1,
    MSE,
    BatchResult,
    EvaluationReport,
    InvalidRequest,
    LossClient,
    Progress,
    RequestTooLarge,
    SmoothL1,
    Unavailable,
)
from lossgrad.progress import ProgressLine
from tests.server.serving import RunningServer, StartServer

RANDOM = np.random.default_rng(3)
ROWS, COLUMNS, BATCH = 700, 11, 64
INPUT = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
TARGET = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
WEIGHT = RANDOM.random((ROWS, COLUMNS)).astype(np.float32)
MASK = RANDOM.random((ROWS, COLUMNS)) < 0.7
LABEL = RANDOM.integers(0, 4, ROWS)
STARTS = range(0, ROWS, BATCH)
LOSSES = (SmoothL1(beta=0.5), MSE(reduction="sum"))


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[LossClient]:
    with LossClient(server.address) as client:
        yield client


def rows(*arrays: Any) -> Iterator[tuple[Any, ...]]:
    for start in STARTS:
        yield tuple(array[start : start + BATCH] for array in arrays)


def exact(select: Any = slice(None), *, weight: Any = None, mask: Any = None) -> tuple[float, float]:
    """Return the mean of SmoothL1(0.5) and the sum of MSE in float64, by hand."""
    difference = np.abs(INPUT.astype(np.float64) - TARGET)[select]
    weights = np.ones_like(difference) if weight is None else weight[select].astype(np.float64)
    weights = weights if mask is None else np.where(mask[select], weights, 0.0)
    smooth = np.where(difference < 0.5, difference**2, difference - 0.25)
    return math.fsum((smooth * weights).ravel()) / math.fsum(weights.ravel()), math.fsum(
        (difference**2 * weights).ravel()
    )


def assert_is(report: EvaluationReport, expected: tuple[float, float]) -> None:
    assert [summary.value for summary in report] == pytest.approx(expected, rel=1e-6)


class Boxes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": INPUT[index], "target": TARGET[index], "mask": MASK[index], "label": int(LABEL[index])}


KINDS: dict[str, Callable[[], Any]] = {
    "a generator of arrays": lambda: rows(INPUT, TARGET),
    "a list of lists": lambda: [[a, b] for a, b in rows(INPUT, TARGET)],
    "dictionaries": lambda: ({"input": a, "target": b, "id": 7} for a, b in rows(INPUT, TARGET)),
    "torch tensors": lambda: rows(torch.tensor(INPUT), torch.tensor(TARGET)),
    "a DataLoader": lambda: DataLoader(TensorDataset(torch.tensor(INPUT), torch.tensor(TARGET)), batch_size=BATCH),
    "a DataLoader of dictionaries": lambda: (
        {"input": batch["input"], "target": batch["target"]} for batch in DataLoader(Boxes(), batch_size=BATCH)
    ),
    "lists of tensors": lambda: ((list(a), list(b)) for a, b in rows(INPUT, TARGET)),
    "plain lists of numbers": lambda: ((a.tolist(), b.tolist()) for a, b in rows(INPUT, TARGET)),
    "one batch of all": lambda: [(INPUT, TARGET)],
    "rows in any order": lambda: [
        (INPUT[i : i + 1], TARGET[i : i + 1]) for i in np.random.default_rng(0).permutation(ROWS)
    ],
    "memory in Fortran order": lambda: ((np.asfortranarray(a), b[::1]) for a, b in rows(INPUT, TARGET)),
    "with empty batches": lambda: [(INPUT[:0], TARGET[:0]), (INPUT, TARGET), (INPUT[:0], TARGET[:0])],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_of_any_kind_gives_the_exact_mean_and_sum(client: LossClient, kind: str) -> None:
    report = client.evaluate(KINDS[kind](), LOSSES)
    assert_is(report, exact())
    assert [summary.element_count for summary in report] == [INPUT.size] * 2
    assert report[0].max == pytest.approx(np.abs(INPUT - TARGET).max() - 0.25, rel=1e-5)
    assert report[1].min == pytest.approx(float(((INPUT - TARGET) ** 2).min()), rel=1e-4, abs=1e-12)
    assert report.accumulation.element_count == INPUT.size


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"mask": MASK}, {"weight": WEIGHT, "mask": MASK}])
def test_weights_and_masks_count(client: LossClient, options: dict[str, Any]) -> None:
    batches = ((a, b, dict(zip(options, more, strict=True))) for a, b, *more in rows(INPUT, TARGET, *options.values()))
    report = client.evaluate(batches, LOSSES)
    assert_is(report, exact(**options))
    assert report[0].element_count == (MASK.sum() if "mask" in options else INPUT.size)


def test_one_batch_has_the_bits_of_one_call(client: LossClient) -> None:
    report = client.evaluate(
        [(INPUT, TARGET, {"weight": WEIGHT, "mask": MASK})], [SmoothL1(beta=0.5), L1(denominator=3.0)]
    )
    alone = client.compute(INPUT, TARGET, [SmoothL1(beta=0.5), L1(denominator=3.0)], weight=WEIGHT, mask=MASK)
    assert [summary.mean for summary in report] == [result.value for result in alone]
    assert report[0].weight_sum == alone[0].weight_sum


def test_groups_of_batches_and_groups_of_rows(client: LossClient) -> None:
    by_batch = client.evaluate(rows(INPUT, TARGET, LABEL), LOSSES, group=lambda batch: f"from {batch[2][0]}")
    assert_is(by_batch, exact())
    assert sum(each[0].element_count for each in by_batch.groups.values()) == INPUT.size
    by_row = client.evaluate(DataLoader(Boxes(), batch_size=BATCH), LOSSES, group="label", mask="mask")
    assert set(by_row.groups) == {"0", "1", "2", "3"}
    for label in range(4):
        values = [summary.value for summary in by_row.groups[str(label)]]
        assert values == pytest.approx(exact(label == LABEL, mask=MASK), rel=1e-6)


def test_ten_thousand_groups_are_fine(client: LossClient) -> None:
    ones = np.ones(3, np.float32)
    report = client.evaluate([(ones * n, ones * 0, {"group": n}) for n in range(10_000)], L1())
    assert len(report.groups) == 10_000
    assert report.groups["9999"][0].mean == 9999.0


def test_types_are_those_of_calls(client: LossClient) -> None:
    half = INPUT.astype(np.float16), TARGET.astype(np.float16)
    brain = INPUT.astype(ml_dtypes.bfloat16), torch.tensor(TARGET).bfloat16()
    for input, target in (
        half,
        brain,
        (INPUT.astype(np.float64), TARGET),
        (INPUT, np.ones(INPUT.shape, np.int64)),
        (INPUT, 0.5),
    ):
        allow_broadcast = input.shape != getattr(target, "shape", ())
        report = client.evaluate([(input, target)], L1(), allow_broadcast=allow_broadcast)
        assert report[0].mean == client.l1(input, target, allow_broadcast=allow_broadcast).value


def test_a_batch_above_the_slice_size_is_cut_with_the_same_bits(client: LossClient) -> None:
    input, target = (RANDOM.normal(size=(300, 301)) for _ in range(2))
    whole = client.evaluate([(input, target)], LOSSES)
    for slice_bytes in (1, 70_000, 1 << 18):
        cut = client.evaluate([(input, target)], LOSSES, slice_bytes=slice_bytes)
        assert cut.throughput is not None
        assert cut.throughput.slice_count > 4
        assert cut.accumulation == whole.accumulation


def test_a_batch_above_the_servers_limit_is_cut_too(start_server: StartServer, client: LossClient) -> None:
    server = start_server(max_message_bytes=200_000)
    with LossClient(server.address) as small:
        report = small.evaluate([(INPUT.repeat(20, 0), TARGET.repeat(20, 0))], LOSSES)
        with pytest.raises(RequestTooLarge, match=r"batch 1: .* the limit is 199936"):
            small.evaluate(
                [(INPUT, TARGET), (np.ones((7, 30_001)), np.ones((7, 1)))],
                L1(gradient=True, reduction="sum"),
                allow_broadcast=True,
                on_batch=print,
            )
    assert report.accumulation == client.evaluate([(INPUT.repeat(20, 0), TARGET.repeat(20, 0))], LOSSES).accumulation


def test_each_batchs_own_losses_are_kept_where_asked_for(client: LossClient) -> None:
    report = client.evaluate(rows(INPUT, TARGET, LABEL), LOSSES, group=lambda batch: batch[2][0], per_batch=True)
    assert [batch.index for batch in report.batches] == list(range(len(STARTS)))
    for batch, (input, target, label) in zip(report.batches, rows(INPUT, TARGET, LABEL), strict=True):
        alone = client.compute(input, target, LOSSES)
        assert [summary.value for summary in batch.results] == [result.value for result in alone]
        assert batch.group == str(label[0])
    assert client.evaluate(rows(INPUT, TARGET), LOSSES).batches == ()


@pytest.mark.parametrize("kind", ["numpy", "torch", "lists", "groups", "cut"])
def test_gradients_are_those_of_the_whole_mean(client: LossClient, kind: str) -> None:
    seen: dict[int, BatchResult] = {}
    as_kind: Any = torch.tensor if kind == "torch" else np.asarray
    batches = list(rows(as_kind(INPUT), as_kind(TARGET), LABEL))
    if kind == "cut":
        batches = [(INPUT.repeat(9, 0), TARGET.repeat(9, 0), None)]
    if kind == "lists":
        batches = [(list(a), list(b), None) for a, b, _ in batches]
    count = INPUT.size * (9 if kind == "cut" else 1)
    losses = [SmoothL1(beta=0.5, gradient=True), L1(), MSE(gradient=True, reduction="sum", gradient_scale=0.5)]
    client.evaluate(
        batches,
        losses,
        element_count=count,
        on_batch=lambda batch: seen.update({batch.index: batch}),
        group=2 if kind == "groups" else None,
        slice_bytes=100_000,
    )
    assert sorted(seen) == list(range(len(batches)))
    x = torch.tensor(INPUT).double().requires_grad_()
    F.smooth_l1_loss(x, torch.tensor(TARGET).double(), beta=0.5).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    expected = x.grad.numpy() if kind != "cut" else x.grad.numpy().repeat(9, 0) / 9
    together = []
    for index in range(len(batches)):
        first, none, third = seen[index].gradients
        assert none is None
        assert type(first) is (list if kind == "lists" else type(batches[index][0]))
        together.append(
            np.concatenate([np.asarray(each)[None] for each in first]) if kind == "lists" else np.asarray(first)
        )
        flat = np.concatenate([np.asarray(each).ravel() for each in third])
        np.testing.assert_allclose(
            flat,
            np.concatenate([np.asarray(a - b).ravel() for a, b in zip(*batches[index][:2], strict=True)]),
            rtol=1e-6,
        )
        assert seen[index].target_gradients == (None, None, None)
    np.testing.assert_allclose(np.concatenate(together), expected, rtol=1e-5, atol=1e-12)


def test_gradients_of_broadcast_targets_come_too(client: LossClient) -> None:
    seen: list[BatchResult] = []
    client.evaluate(
        [(INPUT[:3], TARGET[:1])], L1(gradient=True, reduction="sum"), allow_broadcast=True, on_batch=seen.append
    )
    alone = client.l1(INPUT[:3], TARGET[:1], allow_broadcast=True, gradient=True, reduction="sum")
    np.testing.assert_array_equal(seen[0].target_gradients[0], alone.target_gradient)


@pytest.mark.parametrize(
    ("losses", "options", "says"),
    [
        ([L1(gradient=True)], {}, "which nobody takes; give on_batch"),
        ([L1(gradient=True)], {"on_batch": print}, "give element_count, or the loss's denominator"),
        ([L1(reduction="none")], {}, "has reduction 'none'; a data set is evaluated with 'mean' or 'sum'"),
        ([L1(reduction="sample_mean")], {}, "client.stream gives every result"),
        ([L1()] * 17, {}, "holds 17 losses"),
        (["l1"], {}, "losses holds 'l1'"),
    ],
)
def test_losses_that_a_data_set_cannot_have_are_refused_before_anything_is_read(
    client: LossClient, losses: Any, options: Any, says: str
) -> None:
    def never() -> Iterator[Any]:
        if losses is not None:
            raise AssertionError
        yield

    with pytest.raises(InvalidRequest, match=says):
        client.evaluate(never(), losses, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_error": "ignore"}, ValueError),
        ({"slice_bytes": 0}, ValueError),
        ({"in_flight_bytes": 0}, ValueError),
        ({"patience": -1.0}, ValueError),
        ({"timeout": 0.0}, InvalidRequest),
        ({"element_count": -1}, ValueError),
        ({"endpoints": []}, ValueError),
        ({"endpoints": ["a:1", "a:1"]}, ValueError),
        ({"endpoints": "a:1"}, TypeError),
        ({"group": 1.5}, TypeError),
    ],
)
def test_options_out_of_their_range_are_refused(client: LossClient, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        client.evaluate([(INPUT, TARGET)], **options)


def test_the_count_of_elements_is_checked_at_the_end(client: LossClient) -> None:
    assert client.evaluate([(INPUT, TARGET, {"mask": MASK})], element_count=INPUT.size)[0].element_count == MASK.sum()
    with pytest.raises(InvalidRequest, match=f"element_count is 5, but the batches hold {INPUT.size} elements"):
        client.evaluate([(INPUT, TARGET)], element_count=5)


def test_a_mean_gradient_with_weights_needs_a_denominator(client: LossClient) -> None:
    batch = (INPUT, TARGET, {"weight": WEIGHT})
    with pytest.raises(InvalidRequest, match="batch 0: the gradient of a mean over a data set with weights"):
        client.evaluate([batch], L1(gradient=True), element_count=INPUT.size, on_batch=print)
    seen: list[BatchResult] = []
    client.evaluate([batch], L1(gradient=True, denominator=10.0), on_batch=seen.append)
    np.testing.assert_array_equal(
        seen[0].gradients[0], client.l1(INPUT, TARGET, weight=WEIGHT, denominator=10.0, gradient=True).gradient
    )


BAD = {
    1: (INPUT[:3], TARGET[:2]),  # shapes, found by the server
    3: (INPUT[:3], None),  # found here
    4: (INPUT[:3] + 1j, TARGET[:3]),
    6: ([INPUT[:3], INPUT[:3]], [TARGET[:3], TARGET[:2]]),  # half of it is good
}


def test_a_bad_batch_raises_and_says_which_it_is(client: LossClient) -> None:
    for index, bad in BAD.items():
        batches = [(INPUT, TARGET)] * index + [bad] + [(INPUT, TARGET)] * 3
        with pytest.raises(InvalidRequest, match=f"^batch {index}: "):
            client.evaluate(batches, LOSSES)


def test_bad_batches_are_left_out_whole_and_listed_where_errors_are_collected(client: LossClient) -> None:
    batches = [BAD.get(index, (INPUT, TARGET)) for index in range(9)]
    report = client.evaluate(batches, LOSSES, on_error="collect", slice_bytes=50_000)
    assert [error.index for error in report.errors] == sorted(BAD)
    assert all(isinstance(error.error, InvalidRequest) for error in report.errors)
    assert report.accumulation == client.evaluate([(INPUT, TARGET)] * 5, LOSSES, slice_bytes=50_000).accumulation
    assert "4 failed and left out" in repr(report)


def test_what_the_callers_functions_raise_passes_through(client: LossClient) -> None:
    def fail(_: Any) -> Any:
        raise KeyError("mine")

    everything: list[dict[str, Any]] = [{"group": fail}, {"on_batch": fail}]
    for options in everything:
        with pytest.raises(KeyError, match="mine"):
            client.evaluate([(INPUT, TARGET)], LOSSES, on_error="collect", **options)


def test_batches_are_read_in_the_callers_thread_and_not_far_ahead(client: LossClient, server: RunningServer) -> None:
    threads, read, answered = set(), 0, 0

    def batches() -> Iterator[Any]:
        nonlocal read
        for _ in range(60):
            threads.add(threading.get_ident())
            read += 1
            assert read - answered <= 10  # eight under way, one that waits, one being read
            yield np.zeros(65_536, np.float32), np.ones(65_536, np.float32)

    def count(_: BatchResult) -> None:
        nonlocal answered
        threads.add(threading.get_ident())
        answered += 1

    client.evaluate(batches(), L1(), in_flight_bytes=4 << 20, on_batch=count)
    assert threads == {threading.get_ident()}
    assert answered == 60


def test_arrays_may_be_reused_once_the_next_batch_is_asked_for(client: LossClient) -> None:
    small, large = np.empty(100, np.float32), np.empty(300_000, np.float32)

    def batches(array: Any) -> Iterator[Any]:
        for number in range(20):
            array[:] = number
            yield array, np.zeros_like(array)

    for array in (small, large):
        assert client.evaluate(batches(array), L1())[0].mean == 9.5


def test_progress_is_told_from_the_first_to_the_last(client: LossClient) -> None:
    told: list[Progress] = []
    client.evaluate([(INPUT, TARGET)] * 10 + [BAD[1]], on_error="collect", progress=told.append)
    last = told[-1]
    assert last.is_finished
    assert (last.batch_count, last.total_batches, last.failed_batch_count) == (10, 11, 1)
    assert last.element_count == 10 * INPUT.size
    assert last.byte_count > 2 * 10 * INPUT.nbytes
    counts = [each.batch_count for each in told]
    assert counts == sorted(counts)
    client.evaluate(iter([(INPUT, TARGET)]), progress=told.append)
    assert told[-1].total_batches is None


def test_the_line_of_progress_is_written_in_place_at_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    half = Progress(5, 10, 1, 5_000_000, 20 << 20, 2.0)
    end = Progress(10, 10, 1, 10_000_000, 40 << 20, 3_725.0, is_finished=True)
    terminal, log = Terminal(), io.StringIO()
    for file in (terminal, log):
        line = ProgressLine(file)
        line(half)
        line(end)
    assert terminal.getvalue().startswith(
        "\r5 of 10 batches (50%), 1 failed, 5,000,000 elements, 2.5 M/s, 10 MiB/s, 2.0 s left"
    )
    assert terminal.getvalue().endswith("done in 1:02:05\n")
    assert "\r" not in log.getvalue()
    assert log.getvalue().count("\n") == 1


def test_no_batches_are_an_empty_report_and_no_call() -> None:
    with LossClient("127.0.0.1:9", retries=0) as nobody:
        report = nobody.evaluate([], LOSSES)
    assert math.isnan(report[0].mean)
    assert report[0].element_count == 0


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with LossClient("127.0.0.1:9", retries=0) as nobody, pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        nobody.evaluate([(INPUT, TARGET)])
