"""What cannot be read is refused in one sentence that names the file and says what to change."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from lossgrad.files import FileError, open_arrays


def write_safetensors_header(path: str, header: Any, size: int = 100) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files()
    return folder


def make_files() -> None:
    ones = np.ones((10, 3), np.float32)
    np.save("a.npy", ones)
    np.savez("two.npz", pred=ones, target=ones)
    np.savez("none.npz")
    save_file({"pred": ones, "target": ones}, "two.safetensors")
    many: dict[str, Any] = {f"x{index}": ones for index in range(20)}
    np.savez("many.npz", **many)
    Path("text.npy").write_text("not an array")
    Path("empty.npy").write_bytes(b"")
    Path("short.npy").write_bytes(Path("a.npy").read_bytes()[:-3])
    Path("header.npy").write_bytes(Path("a.npy").read_bytes()[:60])
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("halves.npy", np.zeros(2, "V2"))
    np.save("records.npy", np.zeros(2, [("ä", "f4"), ("b", "i4")]))
    np.savez("objects.npz", x=np.array([{}], dtype=object))
    np.savez_compressed("fortran.npz", x=np.asfortranarray(ones))
    np.savez_compressed("bad.npz", x=np.random.default_rng(0).standard_normal(100_000))
    data = bytearray(Path("bad.npz").read_bytes())
    data[-2000:-1980] = bytes(20)
    Path("bad.npz").write_bytes(data)
    Path("cut.npz").write_bytes(Path("two.npz").read_bytes()[:200])
    with zipfile.ZipFile("lies.npz", "w") as archive:
        header = io.BytesIO()
        np.save(header, ones)
        archive.writestr("x.npy", header.getvalue()[:-4])
    Path("model.pt").write_bytes(Path("two.npz").read_bytes())
    Path("data.pkl").write_bytes(pickle.dumps([1]))
    Path("data.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    Path("data.csv").write_text("1,2\n")
    Path("data.npy.gz").write_bytes(b"\x1f\x8b\x08")
    Path("old.feather").write_bytes(b"FEA1....")
    Path("bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    Path("bad.arrow").write_bytes(b"ARROW1\0\0 and nothing else")
    Path("bad.safetensors").write_bytes(b"\xff" * 20)
    write_safetensors_header("array.safetensors", [1])
    write_safetensors_header("deep.safetensors", b"[" * 100_000)
    write_safetensors_header("odd.safetensors", {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}})
    write_safetensors_header("beyond.safetensors", {"x": {"dtype": "F32", "shape": [4], "data_offsets": [200, 216]}})
    write_safetensors_header("minus.safetensors", {"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}})
    write_safetensors_header("f8.safetensors", {"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}})
    write_safetensors_header("bare.safetensors", {"x": {"dtype": "F32"}})
    make_tables()
    Path("folder").mkdir()
    Path("folder/readme.txt").write_text("no arrays here")


def make_tables() -> None:
    table = pa.table(
        {
            "lists": pa.array([[1.0, 2.0], [3.0], [4.0, 5.0]]),
            "nested": pa.array([[[1.0]], [[2.0]], [[3.0]]]),
            "dates": pa.array([1, 2, 3], pa.timestamp("s")),
            "structs": pa.array([{"x": 1.0}] * 3),
            "holes": pa.array([[1.0], None, [2.0]]),
            "names": pa.array(["a", None, "b"]),
            "prices": pa.array([1, 2, 3], pa.decimal128(5)),
        }
    )
    pyarrow.parquet.write_table(table, "t.parquet")
    pyarrow.feather.write_feather(table, "t.feather")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("no.npy", "'no.npy' cannot be read: No such file or directory"),
        ("no.npz:pred", "'no.npz' cannot be read: No such file or directory"),
        ("no*.npy", "'no*.npy' matches no file"),
        ("folder", "the folder 'folder' has no .npy, .npz, .safetensors, .parquet, .arrow or .feather file"),
        ("folder/*", "'folder/readme.txt' is none of the files that can be read; give .npy, "),
        ("a.npy:x", "'a.npy' is a .npy file and holds one array without a name; leave out ':x'"),
        ("two.npz", "'two.npz' holds 2 arrays: pred, target; say which, such as 'two.npz:pred'"),
        ("two.npz:label", "'two.npz' has no array 'label'; it has pred, target"),
        ("many.npz", "x7 and 12 more; say which"),
        ("none.npz", "'none.npz' holds no array"),
        (
            "two.safetensors",
            "'two.safetensors' holds 2 tensors: pred, target; say which, such as 'two.safetensors:pred'",
        ),
        ("t.parquet:x", "'t.parquet' has no column 'x'; it has lists, nested, "),
        ("text.npy", "'text.npy' cannot be read as a .npy file: it begins with b'not an'"),
        ("empty.npy", "'empty.npy' is empty"),
        ("short.npy", "short.npy is cut short: its float32[10, 3] needs 248 bytes of the file, which has 245"),
        ("header.npy", "'header.npy' cannot be read as a .npy file: "),
        (
            "objects.npy",
            "'objects.npy' holds Python objects (a pickle), which could run any program when read; save it as",
        ),
        ("objects.npz", "'objects.npz:x' holds Python objects (a pickle)"),
        ("halves.npy", "'halves.npy' has data type |V2, as NumPy saves bfloat16 and records; save it as float32"),
        ("records.npy", "'records.npy' has data type [('ä', '<f4'), ('b', '<i4')], as NumPy saves"),
        ("fortran.npz", "fortran.npz:x is compressed and in Fortran order"),
        ("lies.npz", "lies.npz:x is cut short: it needs 248 bytes and has 244; write it anew"),
        ("cut.npz", "'cut.npz' cannot be read as a .npz archive: File is not a zip file"),
        ("model.pt", "'model.pt' is what torch.save writes, a pickle, which could run any program when read; save it"),
        ("data.pkl", "'data.pkl' is a pickle"),
        ("data.h5", "'data.h5' is an HDF5 file; save its data set with numpy.save"),
        ("data.csv", "'data.csv' is none of the files that can be read"),
        ("data.npy.gz", "'data.npy.gz' is a gzip archive; unpack it"),
        ("old.feather", "'old.feather' is a Feather file of version 1; write it with version 2"),
        ("bad.parquet", "'bad.parquet' cannot be read as a Parquet file: "),
        ("bad.arrow", "'bad.arrow' cannot be read as an Arrow file: "),
        (
            "bad.safetensors",
            "'bad.safetensors' is no .safetensors file: its header would have 18446744073709551615 bytes",
        ),
        ("array.safetensors", "'array.safetensors' is no .safetensors file: its header is no JSON object"),
        ("deep.safetensors", "'deep.safetensors' is no .safetensors file: its header is no JSON object"),
        ("odd.safetensors", "odd.safetensors:x has shape [4] of F32 in bytes 0 to 12, which do not fit together"),
        ("beyond.safetensors", "beyond.safetensors:x is cut short"),
        ("minus.safetensors", "minus.safetensors:x has shape [-4] of F32 in bytes 0 to -16, which do not fit together"),
        ("f8.safetensors", "f8.safetensors:x has data type F8_E4M3, which is not supported; save it as F32 or BF16"),
        ("bare.safetensors", "bare.safetensors:x has no shape, dtype and data_offsets"),
        ("t.parquet:dates", "t.parquet:dates is a column of timestamp[ms]; save it as float32 or float64"),
        ("t.feather:structs", "t.feather:structs is a column of struct<x: double>; save it as float32"),
        ("t.parquet:prices", "t.parquet:prices is a column of decimal128(5, 0)"),
        (
            "t.parquet:nested",
            "t.parquet:nested has lists of lists (list<element: list<element: double>>); save it with",
        ),
    ],
)
def test_what_cannot_be_opened_is_refused(
    reference: str, says: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(FileError) as raised:
        open_arrays(reference)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("bad.npz", "bad.npz:x cannot be unpacked: "),
        ("t.parquet:lists", "t.parquet:lists has a list of 1 in row 1 and of 2 in row 0; all rows must have as many"),
        ("t.feather:lists", "t.feather:lists has a list of 1 in row 1 and of 2 in row 0"),
        ("t.feather:holes", "t.feather:holes has no list (null) in row 1 and of 1 in row 0"),
    ],
)
def test_what_turns_out_to_be_wrong_when_it_is_read_is_refused(
    reference: str, says: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    (array,) = open_arrays(reference)
    with pytest.raises(FileError) as raised:
        array.read(0, array.element_count)
    array.close()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_label_must_be_there_and_must_not_be_a_fraction(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    (names,) = open_arrays("t.parquet:names")
    with pytest.raises(FileError, match=r"t\.parquet:names has no value \(null\) at \[1\]; fill it in"):
        names.labels(0, 3)
    (numbers,) = open_arrays("a.npy")
    with pytest.raises(FileError, match=r"a\.npy holds float32; groups are named by integers, text or bool"):
        numbers.labels(0, 3)


@pytest.mark.parametrize("name", ["a.npy", "a.feather", "a.npz"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(
    name: str, tmp_path: Path
) -> None:
    array = np.ones(100_000)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", x=array)
    pyarrow.feather.write_feather(pa.table({"x": array}), tmp_path / "a.feather", compression="uncompressed")
    path = tmp_path / name
    (file,) = open_arrays(str(path))
    file.read(0, 10)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)
    file.close()
    with pytest.raises(FileError, match=r"cut short|cannot be unpacked"):
        file.read(90_000, 100_000)
    path.unlink()
    file.close()
    with pytest.raises(FileError, match="No such file"):
        file.read(0, 10)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("a.npz", ("a.npz", None)),
        ("a.npz:x", ("a.npz", "x")),
        ("a.npz:x:y", ("a.npz", "x:y")),
        ("b/*.npz:x", ("b/*.npz", "x")),
        ("s3:b/*.npz:x/y", ("s3:b/*.npz", "x/y")),
        ("C:\\data\\a.npy", ("C:\\data\\a.npy", None)),
        ("there:x", ("there", "x")),
        ("with:colon", ("with:colon", None)),
    ],
)
def test_a_reference_is_a_path_and_perhaps_a_name(
    reference: str, expected: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lossgrad.files.opening import split_reference

    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("with:colon").touch()
    assert split_reference(reference) == expected


def test_without_pyarrow_a_table_says_what_to_install(files: Path) -> None:
    program = f"""
import sys
sys.modules["pyarrow"] = None
from lossgrad.files import open_arrays
open_arrays({str(files / "t.parquet")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "t.parquet' needs pyarrow, which is not installed: pip install 'lossgrad[files]'" in done.stderr
