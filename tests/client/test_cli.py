"""The `lossgrad` command: what it prints, what it exits with, and that every mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossgrad import __version__
from lossgrad.cli import main
from tests.client.peer import Peer, Refused, status


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> Path:
    """Make a folder with arrays the working directory, and the peer the target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOSSGRAD_TARGET", target)
    np.save("a.npy", np.array([[0.0, 2.0], [3.0, 0.0]], np.float32))
    np.save("b.npy", np.zeros((2, 2), np.float32))
    np.save("row.npy", np.zeros(2, np.float32))
    np.save("weight.npy", np.array([[1.0, 2.0], [1.0, 1.0]]))
    np.save("mask.npy", np.array([[True, True], [False, True]]))
    return tmp_path


def run(*arguments: str) -> int:
    return main(arguments)


@pytest.mark.usefixtures("files")
def test_ping_says_that_the_server_serves(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ping") == 0
    out = capsys.readouterr().out
    assert out.startswith("serving; round trip ")
    assert out.endswith(" ms\n")


@pytest.mark.usefixtures("files")
def test_info_prints_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "server version       1.2.3\n" in out
    assert "data types           float32, bfloat16\n" in out
    assert "max stream requests  64\n" in out
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["limits"]["max_stream_requests"] == 64


@pytest.mark.usefixtures("files")
def test_compute_prints_a_line_for_each_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compute", "a.npy", "b.npy") == 0
    assert capsys.readouterr().out == "smooth_l1(beta=1) mean: 1.0 (4 elements)\n"
    losses = ["--loss", "smooth_l1:beta=0.5", "--loss", "huber:delta=2", "--loss", "l1", "--loss=mse"]
    assert run("compute", "a.npy", "b.npy", *losses, "--reduction", "sum") == 0
    assert capsys.readouterr().out.splitlines() == [
        "smooth_l1(beta=0.5) sum: 4.5 (4 elements)",
        "huber(delta=2) sum: 6.0 (4 elements)",
        "l1 sum: 5.0 (4 elements)",
        "mse sum: 13.0 (4 elements)",
    ]


@pytest.mark.usefixtures("files")
def test_compute_takes_weights_masks_and_broadcasting(capsys: pytest.CaptureFixture[str], peer: Peer) -> None:
    options = ["--loss", "l1", "--weight", "weight.npy", "--mask", "mask.npy", "--allow-broadcast", "--json"]
    assert run("compute", "a.npy", "row.npy", *options) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["loss"], result["value"], result["element_count"], result["weight_sum"]) == ("l1", 1.0, 3, 4.0)
    assert (result["shape"], result["dtype"], result["reduction"]) == ([], "float32", "mean")
    assert result["timing"]["device"] == "cpu"
    assert peer.requests[0].allow_broadcast


def test_compute_writes_the_gradient_and_the_loss(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "mse", "--reduction", "none", "--gradient-out", "gradient", "--loss-out", "loss.npy"]
    assert run("compute", "a.npy", "b.npy", *options) == 0
    assert capsys.readouterr().out == "mse none: [2, 2] float32 (4 elements)\n"
    np.testing.assert_array_equal(np.load(files / "gradient"), [[0.0, 4.0], [6.0, 0.0]])
    np.testing.assert_array_equal(np.load(files / "loss.npy"), [[0.0, 4.0], [9.0, 0.0]])


def test_json_has_no_bare_nan(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("nan.npy", np.array([np.nan, np.inf], np.float32))
    assert run("compute", "nan.npy", "row.npy", "--json", "--loss", "smooth_l1:beta=inf") == 0
    out = capsys.readouterr().out
    (result,) = json.loads(out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert (result["value"], result["beta"], result["nonfinite_count"]) == ("nan", "inf", 2)
    assert run("compute", "nan.npy", "row.npy", "--loss", "l1") == 0
    assert capsys.readouterr().out == "l1 mean: nan (2 elements, 2 not finite)\n"


def make_bad_files() -> None:
    Path("text.npy").write_text("not an array")
    Path("empty.npy").write_bytes(b"")
    np.savez("many.npz", a=np.ones(1), b=np.ones(1))
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("halves.npy", np.zeros(2, "V2"))
    np.save("complex.npy", np.zeros(2, np.complex64))
    Path("short.npy").write_bytes(Path("a.npy").read_bytes()[:-3])
    Path("token").write_text("a b")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "the following arguments are required: COMMAND (see: lossgrad --help)"),
        ("fly", "invalid choice: 'fly'"),
        ("ping --timeout soon", "argument --timeout: invalid float value: 'soon' (see: lossgrad ping --help)"),
        ("ping --timeout 0", "timeout is 0.0 seconds; it must be above 0"),
        ("ping --ca nothing.pem", "ca 'nothing.pem' cannot be read: No such file or directory"),
        ("ping --cert a.npy", "only one of cert and key is given"),
        ("ping --token-file nothing", "--token-file nothing cannot be read: No such file or directory"),
        ("ping --token-file token", "token is empty or has spaces"),
        ("ping extra", "unrecognized arguments: extra"),
        ("compute a.npy", "the following arguments are required: B.npy"),
        ("compute no.npy b.npy", "the input 'no.npy' cannot be read as a .npy file: No such file or directory"),
        ("compute a.npy text.npy", "the target 'text.npy' cannot be read as a .npy file: "),
        ("compute a.npy empty.npy", "the target 'empty.npy' cannot be read as a .npy file: "),
        ("compute a.npy short.npy", "the target 'short.npy' cannot be read as a .npy file: "),
        ("compute a.npy many.npz", "the target 'many.npz' is an archive of arrays"),
        ("compute a.npy objects.npy", "the target 'objects.npy' cannot be read as a .npy file: Object arrays"),
        ("compute a.npy halves.npy", "the target 'halves.npy' has data type |V2, as NumPy saves bfloat16"),
        ("compute a.npy complex.npy", "target has data type complex64, which is not supported"),
        ("compute a.npy .", "the target '.' cannot be read as a .npy file: Is a directory"),
        ("compute a.npy row.npy", "send equal shapes"),
        ("compute a.npy b.npy --weight no.npy", "--weight 'no.npy' cannot be read"),
        ("compute a.npy b.npy --mask a.npy", "mask is float32; send bool"),
        ("compute a.npy b.npy --loss l2", "--loss 'l2' names no loss; give one such as smooth_l1:beta=0.5"),
        ("compute a.npy b.npy --loss smooth_l1:delta=1", "smooth_l1 takes only beta="),
        ("compute a.npy b.npy --loss l1:beta=1", "l1 takes no parameter"),
        ("compute a.npy b.npy --loss huber:delta=x", "'x' is not a number"),
        ("compute a.npy b.npy --loss huber:delta=0", "delta is 0.0; it must be above 0"),
        ("compute a.npy b.npy --reduction max", "reduction is 'max'; it must be one of"),
        ("compute a.npy b.npy --loss l1 --loss mse --gradient-out g", "--gradient-out names one file for 2 losses"),
        ("compute a.npy b.npy --loss-out l", "--loss-out is for arrays, and --reduction mean gives one number"),
        ("compute a.npy b.npy --gradient-out no/g.npy", "--gradient-out 'no/g.npy' cannot be written: No such file"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change_and_exits_2(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bad_files()
    assert run(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lossgrad: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_call_that_fails_is_one_line_and_exits_3(files: Path, capsys: pytest.CaptureFixture[str], peer: Peer) -> None:
    def fail(_: Any) -> None:
        import grpc

        raise Refused(status(grpc.StatusCode.INTERNAL, "broken\ninside", reason="INTERNAL"))

    peer.fail = fail
    assert run("compute", "a.npy", "b.npy") == 3
    assert capsys.readouterr().err == "lossgrad: broken inside\n"
    assert run("ping", "--target", "127.0.0.1:1") == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "is a server running there? See: lossgrad ping --target 127.0.0.1:1" in captured.err


def test_a_token_comes_from_a_file(files: Path, peer: Peer) -> None:
    (files / "token").write_text("secret\n")
    assert run("info", "--token-file", "token") == 0
    assert peer.metadata[-1]["authorization"] == "Bearer secret"


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        ("--version", f"lossgrad {__version__}"),
        ("--help", "Exit codes: 0 done; 1 a check failed"),
    ):
        with pytest.raises(SystemExit) as raised:
            run(arguments)
        assert raised.value.code == 0
        assert says in " ".join(capsys.readouterr().out.split())


def test_the_command_runs_as_a_program_into_a_closed_pipe(target: str) -> None:
    command = f"{sys.executable} -m lossgrad.cli info --target {target}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1)
    assert done.stderr == "" or "health_check_client" in done.stderr
    done = subprocess.run([*command.split()], capture_output=True, text=True, check=True)
    assert "server version       1.2.3" in done.stdout
