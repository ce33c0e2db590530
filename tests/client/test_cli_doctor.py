"""`lossgrad doctor`: what it says of a server that can be reached, and what to do about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from lossgrad.cli import main, server_checks
from lossgrad.cli.checks import Check, State
from lossgrad.client import LossClient
from lossgrad.errors import Unauthenticated
from tests.client.doctor import Doctor
from tests.client.peer import Peer, Refused, status
from tests.server.serving import RunningServer


def test_a_server_in_order_passes_every_check(server: RunningServer, doctor: Doctor) -> None:
    code, checks = doctor("--target", server.address)
    assert (code, doctor.err) == (0, "")
    assert {check["state"] for check in checks.values()} == {"ok"}
    assert list(checks) == [
        "client",
        "settings",
        "dns",
        "tcp",
        "http2",
        "auth",
        "health",
        "version",
        "limits",
        "latency",
        "throughput",
        "parity",
    ]
    assert checks["parity"]["text"] == "losses and gradients agree with torch"


def test_each_check_is_one_line(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--target", server.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("ok    ") for line in lines)
    assert lines[1] == f"ok    settings    {server.address} (--target), no TLS, no token"
    check = Check("tcp", State.FAIL, "connection\nrefused", "start it")
    assert str(check) == "FAIL  tcp         connection refused -> start it"


def test_a_caller_who_is_not_known_is_told_about_tokens(
    target: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: LossClient) -> None:
        raise Unauthenticated("no token", grpc.StatusCode.UNAUTHENTICATED)

    monkeypatch.setattr(LossClient, "info", refuse)
    code, checks = doctor("--target", target)
    assert code == 1
    assert checks["auth"]["remedy"] == "give its token: --token-file FILE (LOSSGRAD_TOKEN)"
    (tmp_path / "token").write_text("wrong")
    _, checks = doctor("--target", target, "--token-file", str(tmp_path / "token"))
    assert checks["auth"]["remedy"].startswith("give another token")


def test_a_server_that_drains_is_told(target: str, peer: Peer, doctor: Doctor) -> None:
    peer.health = b"\x08\x02"
    code, checks = doctor("--target", target)
    assert code == 1
    assert checks["health"]["remedy"] == "wait until it has started; its log says what it does"


def test_other_limits_and_another_version_are_warnings(target: str, doctor: Doctor) -> None:
    code, checks = doctor("--target", target)  # the peer says that it is of version 1.2.3 and takes 64 MiB
    assert code == 0
    assert checks["limits"]["remedy"] == "set LOSSGRAD_MAX_MESSAGE_BYTES=67108864 here, or the same on the server"
    assert checks["version"]["remedy"] == "install the server's version here: pip install lossgrad==1.2.3"


def test_a_grpc_server_of_another_kind_is_told(doctor: Doctor) -> None:
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code, checks = doctor("--target", f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert code == 1
    assert checks["grpc"]["text"] == "a gRPC server is there, but it is no lossgrad server"


def test_wrong_numbers_are_found(target: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.client import peer as peer_module

    own = peer_module.elementwise
    monkeypatch.setattr(peer_module, "elementwise", lambda *arguments: own(*arguments) * 1.001)
    code, checks = doctor("--target", target)
    assert code == 1
    assert checks["parity"]["text"].startswith("SmoothL1(beta=0.5, gradient=True) of random values is ")
    assert checks["parity"]["remedy"].startswith("do not use these numbers")


def test_a_server_that_fails_to_compute_is_told(target: str, peer: Peer, doctor: Doctor) -> None:
    def fail(_: Any) -> None:
        raise Refused(status(grpc.StatusCode.INTERNAL, "broken", reason="INTERNAL"))

    peer.fail = fail
    code, checks = doctor("--target", target)
    assert (code, checks["compute"]["text"]) == (1, "the server does not compute: broken")


def test_without_torch_the_definitions_are_compared_with(target: str) -> None:
    program = "import sys\nsys.modules['torch'] = None\nfrom lossgrad.cli import main\nsys.exit(main())"
    program = program.replace("sys.modules['torch'] = None", BLOCK)
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--target", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ok    parity      losses and gradients agree with the definitions in float64\n" in done.stdout
    assert "skip  torch       torch is not installed here" in done.stdout


BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "rich", "pyarrow"):
            raise ModuleNotFoundError(name=name)
import importlib.util
own = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else own(name, package)
sys.meta_path.insert(0, Blocker())
"""


def test_a_slow_server_is_a_warning(target: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_checks, "_SLOW_PING_SECONDS", 0.0)
    monkeypatch.setattr(server_checks, "_SLOW_BYTES_PER_SECOND", 1e12)
    code, checks = doctor("--target", target)
    assert (code, checks["latency"]["state"], checks["throughput"]["state"]) == (0, "warn", "warn")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--timeout", "0"], "timeout is 0.0 seconds; it must be above 0"),
        (["--ca", "no.pem"], "ca 'no.pem' cannot be read"),
        (["--target", "far:1", "--token-file", "no"], "--token-file no cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert says in captured.err
