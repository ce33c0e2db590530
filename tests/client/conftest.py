"""What the client's tests share: the peer, and clients of it."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator

import pytest

from lossgrad import AsyncLossClient, LossClient
from tests.client.doctor import Doctor
from tests.client.evaluating import Evaluate
from tests.client.peer import Peer, PeerServer
from tests.server.serving import RunningServer


@pytest.fixture(scope="session")
def peer_server() -> Iterator[PeerServer]:
    server = PeerServer()
    yield server
    server.stop()


@pytest.fixture
def peer(peer_server: PeerServer) -> Iterator[Peer]:
    peer_server.peer.reset()
    yield peer_server.peer
    peer_server.peer.hold.set()


@pytest.fixture
def target(peer_server: PeerServer, peer: Peer) -> str:
    return peer_server.target


@pytest.fixture
def client(target: str) -> Iterator[LossClient]:
    with LossClient(target) as client:
        yield client


@pytest.fixture
async def async_client(target: str) -> AsyncIterator[AsyncLossClient]:
    async with AsyncLossClient(target) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TOKEN", "TLS", "CA", "CERT", "KEY", "TIMEOUT", "RETRIES", "MAX_MESSAGE_BYTES", "COALESCE"):
        monkeypatch.delenv(f"LOSSGRAD_{name}", raising=False)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Let unequal shapes pass without torch's warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        yield


@pytest.fixture(scope="session")
def evaluation_server() -> Iterator[RunningServer]:
    with RunningServer(metrics_port=-1, engine="plain") as running:
        yield running


@pytest.fixture
def evaluate(evaluation_server: RunningServer, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(evaluation_server.address, capsys)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    return Doctor(capsys)
