"""A data set from files: which files go together, how it is cut, groups, weights, masks, and what NaN does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lossgrad.files import Dataset, DatasetFiles, FileError, NanFound, NanPolicy

_opened: list[Dataset] = []


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    while _opened:
        _opened.pop().close()


def save(path: str, array: Any, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    values = np.asarray(array, dtype)
    Path(path).parent.mkdir(exist_ok=True)
    np.save(path, values)
    return values


def dataset(predictions: str = "p.npy", targets: str = "t.npy", *, slice_elements: int = 8, **options: Any) -> Dataset:
    policy = options.pop("nan_policy", NanPolicy.PROPAGATE)
    keep = options.pop("keep_orders", False)
    files = DatasetFiles(predictions, targets, **options)
    _opened.append(Dataset(files, nan_policy=policy, slice_elements=slice_elements, keep_orders=keep))
    return _opened[-1]


def save_pair(shape: Any = (3, 7)) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    predictions = save("p.npy", np.arange(np.prod(shape)).reshape(shape))
    return predictions, save("t.npy", np.zeros(shape))


def test_slices_are_consecutive_elements_of_a_fixed_number() -> None:
    predictions, _ = save_pair()
    data = dataset()
    assert (len(data), data.element_count) == (3, 21)
    assert [batch["input"].size for batch in data] == [8, 8, 5]
    np.testing.assert_array_equal(np.concatenate([batch["input"] for batch in data]), predictions.reshape(-1))
    assert all(set(batch) == {"input", "target"} for batch in data)
    np.testing.assert_array_equal(data[1]["input"], predictions.reshape(-1)[8:16])
    with pytest.raises(IndexError):
        data[3]


def test_slices_begin_anew_with_each_file() -> None:
    for name, count in (("a", 10), ("c", 3), ("b", 0)):
        save(f"p/{name}.npy", np.full(count, ord(name)))
        save(f"t/{name}.npy", np.zeros(count))
    data = dataset("p", "t")
    assert [batch["input"].tolist() for batch in data] == [[97.0] * 8, [97.0] * 2, [99.0] * 3]
    assert [tuple(data.piece(index)) for index in range(3)] == [(0, 0, 8, 0), (0, 8, 10, 0), (2, 0, 3, 10)]
    assert [shard.predictions.name for shard in data.shards] == ["p/a.npy", "p/b.npy", "p/c.npy"]


@pytest.mark.parametrize("reference", ["p/*.npy", "p/[ab].npy", "./p", "**/p/*.npy"])
def test_patterns_and_folders_are_taken_in_the_order_of_their_names(reference: str) -> None:
    for name in "ba":
        save(f"p/{name}.npy", [1])
        save(f"t/{name}.npy", [1])
    save("p/.hidden.npy", [1]) if reference == "./p" else None
    assert [shard.predictions.path.stem for shard in dataset(reference, "t").shards] == ["a", "b"]


def test_a_bare_name_is_an_array_of_the_files_of_the_predictions() -> None:
    for name in "ab":
        np.savez(f"{name}.npz", p=np.ones(3), t=np.zeros(3), w=np.full(3, 2.0), m=np.ones(3, bool), g=np.arange(3))
    data = dataset("?.npz:p", "t", weight="w", mask="m", group="g")
    assert [shard.targets.name for shard in data.shards] == ["a.npz:t", "b.npz:t"]
    batch = data[0]
    assert batch["group"] == ["0", "1", "2"]
    assert [each.tolist() for each in batch["weight"]] == [[2.0]] * 3
    assert data.weight_sum() == 12.0


def test_weights_masks_and_groups_may_have_one_value_a_row() -> None:
    save_pair((4, 3))
    save("w.npy", [1, 2, 3, 4])
    save("m.npy", [[1], [0], [1], [1]], bool)
    data = dataset(weight="w.npy", mask="m.npy")
    assert data[0]["weight"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
    assert data[1]["weight"].tolist() == [3, 4, 4, 4]
    assert data[0]["mask"].tolist() == [True] * 3 + [False] * 3 + [True] * 2
    assert data.weight_sum() == 3 * (1 + 3 + 4)


def test_groups_gather_their_elements_in_order() -> None:
    save_pair((4, 3))
    save("g.npy", [2, 10, 2, 10], np.int64)
    save("w.npy", np.arange(12).reshape(4, 3))
    data = dataset(group="g.npy", weight="w.npy")
    assert data[0]["group"] == ["2", "10"]
    assert [each.tolist() for each in data[0]["input"]] == [[0, 1, 2, 6, 7], [3, 4, 5]]
    assert [each.tolist() for each in data[0]["weight"]] == [[0, 1, 2, 6, 7], [3, 4, 5]]
    assert [each.tolist() for each in data[1]["input"]] == [[8], [9, 10, 11]]
    assert data.take_order(0) is None


def test_the_places_of_groups_elements_are_kept_until_they_are_asked_for() -> None:
    predictions, _ = save_pair((4, 3))
    save("g.npy", [2, 10, 2, 10], np.int64)
    data = dataset(group="g.npy", keep_orders=True)
    assert data.take_order(0) is None
    gathered = np.concatenate(data[0]["input"])
    order = data.take_order(0)
    np.testing.assert_array_equal(predictions.reshape(-1)[:8][order], gathered)
    assert data.take_order(0) is None


def test_each_file_may_be_a_group() -> None:
    for name in "ab":
        save(f"p/{name}.npy", [1])
        save(f"t/{name}.npy", [1])
    assert [batch["group"] for batch in dataset("p", "t", group_by_file=True)] == ["a", "b"]


def test_columns_of_one_table_are_predictions_targets_and_groups() -> None:
    table = pa.table({"p": [1.0, 2.0, 3.0], "t": [0.0, 0.0, None], "g": ["x", "y", "x"]})
    pyarrow.parquet.write_table(table, "a.parquet")
    data = dataset("a.parquet:p", "t", group="g", nan_policy=NanPolicy.OMIT)
    (batch,) = data
    assert batch["group"] == ["x", "y"]
    assert [each.tolist() for each in batch["mask"]] == [[True, False], [True]]
    with pytest.raises(FileError, match=r"a\.parquet:t has no value \(null\) at \[2\]; fill it in"):
        dataset("a.parquet:p", "t")[0]


def save_nan() -> None:
    save("p.npy", [[1, math.nan], [3, 4], [5, 6], [7, 8], [math.inf, 10]])
    save("t.npy", [[1, 2], [3, math.nan], [5, 6], [7, 8], [9, 10]])
    save("w.npy", [1, 1, 1, math.nan, 1], np.float64)
    save("m.npy", [False, False, True, True, True], bool)


def test_nan_passes_through_unless_told_otherwise() -> None:
    save_nan()
    assert all("mask" not in batch for batch in dataset())


def test_nan_is_left_out_with_omit_and_infinity_is_not() -> None:
    save_nan()
    data = dataset(nan_policy=NanPolicy.OMIT)
    assert data[0]["mask"].tolist() == [True, False, True, False, True, True, True, True]
    assert "mask" not in data[1]
    assert data.weight_sum() == 8
    data = dataset(weight="w.npy", mask="m.npy", nan_policy=NanPolicy.OMIT)
    assert data[0]["mask"].tolist() == [False] * 4 + [True, True, False, False]
    assert data.weight_sum() == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "p.npy is NaN at [0, 1]; --nan-policy omit leaves such elements out"),
        ({"mask": "m.npy", "weight": "w.npy"}, "w.npy is NaN at [3]; "),
    ],
)
def test_nan_is_refused_with_raise_unless_it_is_masked(options: dict[str, Any], says: str) -> None:
    save_nan()
    with pytest.raises(NanFound) as raised:
        list(dataset(nan_policy=NanPolicy.RAISE, **options))
    assert says in str(raised.value)
    assert len(list(dataset(mask="m.npy", nan_policy=NanPolicy.RAISE))) == 2


def test_a_fingerprint_follows_the_data_and_how_it_is_cut() -> None:
    save_pair()
    own = dataset().fingerprint()
    assert own == dataset("./p.npy").fingerprint()
    others = [
        dataset("t.npy", "p.npy"),
        dataset(slice_elements=9),
        dataset(weight="p.npy"),
        dataset(nan_policy=NanPolicy.OMIT),
        dataset(group_by_file=True),
    ]
    assert len({own, *(other.fingerprint() for other in others)}) == 6
    save("p.npy", np.ones((3, 7)))
    assert own != dataset().fingerprint()


def make_wrong_files() -> None:
    save_pair((10, 1))
    save("flat.npy", np.ones(10))
    save("long.npy", np.ones((11, 1)))
    save("ints.npy", np.ones((10, 1)), np.int32)
    save("unsigned.npy", np.ones((10, 1)), np.uint32)
    save("complex.npy", np.ones((10, 1)), np.complex64)
    save("none.npy", np.ones((0, 1)))
    save("text.npy", [["a"]] * 10, np.str_)
    for side, names in (("p", "abc"), ("t", "bcd"), ("u", "ab"), ("v", "xy")):
        for name in names:
            save(f"{side}s/{name}.npy", [1])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"targets": "flat.npy"},
            "the target flat.npy has shape [10], the prediction p.npy [10, 1]; both have 10 elements: save one with the "
            "shape of the other (numpy.reshape)",
        ),
        (
            {"targets": "long.npy"},
            "the target long.npy has shape [11, 1], the prediction p.npy [10, 1]; give arrays of equal shapes",
        ),
        ({"targets": "nothing.npy"}, "'nothing.npy' cannot be read: No such file or directory"),
        ({"targets": "t"}, "'t' cannot be read: No such file or directory"),
        (
            {"predictions": "ints.npy", "targets": "ints.npy"},
            "the prediction ints.npy is int32 and the target ints.npy int32; save at least one as floating point",
        ),
        (
            {"targets": "unsigned.npy"},
            "unsigned.npy has data type uint32, which is not supported; save it as int64",
        ),
        (
            {"predictions": "complex.npy"},
            "complex.npy has data type complex64, which is not supported; save it as float32",
        ),
        (
            {"predictions": "none.npy", "targets": "none.npy"},
            "none.npy holds no elements; there is nothing to evaluate",
        ),
        (
            {"weight": "long.npy"},
            "--weight long.npy has shape [11, 1], the prediction p.npy [10, 1]; give the same shape, or its first "
            "dimensions for one a row",
        ),
        ({"weight": "complex.npy"}, "complex.npy has data type complex64"),
        ({"mask": "p.npy"}, "--mask p.npy is float32; save it as bool, true where an element counts: mask != 0"),
        ({"mask": "ts"}, "the predictions are 1 file, --mask 'ts' 3 files; give as many of both"),
        ({"group": "long.npy"}, "--group-by long.npy has shape [11, 1]"),
        ({"targets": "text.npy"}, "text.npy has data type text, which is not supported; save it as float32 or float64"),
        (
            {"predictions": "ps", "targets": "us"},
            "the predictions are 3 files, targets 'us' 2 files; give as many of both; ps/c.npy has no partner",
        ),
        (
            {"predictions": "ps", "targets": "vs"},
            "the predictions are 3 files, targets 'vs' 2 files; give as many of both",
        ),
        (
            {"predictions": "ps", "targets": "ts"},
            "ts/b.npy would be put beside ps/a.npy, though the predictions have a file of its name",
        ),
    ],
    ids=json.dumps,
)
def test_files_that_do_not_go_together_are_refused_by_name(files: dict[str, Any], says: str) -> None:
    make_wrong_files()
    with pytest.raises(FileError) as raised:
        dataset(**files)
    assert says in str(raised.value)


def test_a_data_set_may_have_more_files_than_a_process_may_open() -> None:
    import resource

    for index in range(100):
        save(f"p/{index:03}.npy", [index])
        save(f"t/{index:03}.npy", [0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        values = [batch["input"].tolist() for batch in dataset("p", "t")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert values == [[index] for index in range(100)]
