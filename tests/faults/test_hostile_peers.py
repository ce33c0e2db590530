"""Peers that speak HTTP/2 as no client does: that do not read, do not write, and flood (R11, R12, R13, R27, R28)."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from h2.events import SettingsAcknowledged

import lossgrad
from lossgrad_api.codec import COMPUTE_LOSS, STREAM_COMPUTE_LOSS
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.faults import http2
from tests.faults.generator import message
from tests.faults.http2 import Peer, frame, framed, headers_of
from tests.faults.programs import serving
from tests.faults.resources import MIB, descriptors, resident_bytes
from tests.faults.victim import Victim
from tests.server.calling import message as stream_message
from tests.server.program import Program
from tests.server.requests import request, zeros
from tests.server.scraping import Scrape
from tests.server.serving import RunningServer

TIMEOUT_SECONDS = 2
READ_SECONDS = 6
ANSWER_BYTES = 4 * MIB
X, Y = np.linspace(-2, 2, 64, dtype=np.float32), np.zeros(64, np.float32)


@pytest.fixture
def served() -> Iterator[tuple[Program, str]]:
    with serving(
        Program(
            "--port=0",
            "--metrics-port=-1",
            "--threads=1",
            f"--transfer-timeout-seconds={TIMEOUT_SECONDS}",
            f"--max-queued-bytes={64 * MIB}",
            "--max-connections=200",
        )
    ) as started:
        yield started


@pytest.fixture
def patient() -> Iterator[tuple[Program, str]]:
    """Give a server that waits for its readers for longer than a test of them takes to ask."""
    flags = (f"--transfer-timeout-seconds={READ_SECONDS}", f"--max-queued-bytes={64 * MIB}")
    with serving(Program("--port=0", "--metrics-port=-1", "--threads=1", *flags)) as started:
        yield started


def outer_difference(side: int) -> pb.ComputeLossRequest:
    """Return a small request with an answer of 4 * side**2 bytes."""
    spec = pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_NONE)
    return request(zeros(side, 1), zeros(1, side), spec, allow_broadcast=True)


@pytest.mark.parametrize("path", [COMPUTE_LOSS, STREAM_COMPUTE_LOSS])
def test_r11_slow_readers_cost_bounded_memory_and_nobody_else(patient: tuple[Program, str], path: str) -> None:
    program, address = patient
    pid = program.process.pid
    small = outer_difference(1024)
    body = framed((stream_message(small) if path == STREAM_COMPUTE_LOSS else small).SerializeToString())
    with Victim(address) as victim:
        # What the first such answer makes the server load is not the slow readers' doing.
        with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
            call: Callable[..., bytes] = channel.unary_unary(COMPUTE_LOSS)
            assert len(call(small.SerializeToString(), timeout=30)) > 4 * MIB
        before = peak = resident_bytes(pid)
        refused = 0
        with Peer(address, window=0) as peer:
            for _ in range(100):
                peer.send(peer.open(headers_of(path)), body, end=path == COMPUTE_LOSS)
                # It is told of each call's end, but never opens a window for an answer.
                refused += sum(isinstance(event, http2.StreamEnded) for event in peer.receive(0.02))
                peak = max(peak, resident_bytes(pid))
            # A call's answer stays until the connection ends, a stream is cut at the timeout.
            began = time.monotonic()
            while path == STREAM_COMPUTE_LOSS and time.monotonic() - began < READ_SECONDS + 1:
                refused += sum(isinstance(event, http2.StreamEnded) for event in peer.receive(0.2))
                peak = max(peak, resident_bytes(pid))
        again = victim.check(0.5)
    print(f"\n100 answers of 4 MiB on {path} unread: {refused} refused; {(peak - before) / MIB:.0f} MiB more; {again}")
    assert refused >= 90  # a quarter of what may be queued holds 4 of them
    assert peak - before < (16 + 80) * MIB


def test_r12_slow_writers_are_cut_off(served: tuple[Program, str]) -> None:
    _, address = served
    with Victim(address) as victim:
        with Peer(address) as peer:
            began = time.monotonic()
            for _ in range(100):
                peer.send(peer.open(headers_of()), struct.pack(">BI", 0, 60_000_000) + bytes(100))
            ended = 0
            while ended < 100 and time.monotonic() - began < TIMEOUT_SECONDS + 20:
                ended += sum(isinstance(event, http2.StreamEnded) for event in peer.receive(0.5))
            seconds = time.monotonic() - began
        again = victim.check(0.5)
    print(f"\n100 slow writers: cut after {seconds:.1f} s of {TIMEOUT_SECONDS} allowed; {again}")
    assert ended == 100
    assert TIMEOUT_SECONDS - 1 < seconds < TIMEOUT_SECONDS + 5


def test_r13_a_connection_flood_is_refused_and_others_are_served(served: tuple[Program, str]) -> None:
    program, address = served
    host, _, port = address.rpartition(":")
    with Victim(address) as victim:
        sockets = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2000)]
        time.sleep(1)
        open_now = descriptors(program.process.pid)
        again = victim.check(0.5)
        for one in sockets:
            one.close()
    with lossgrad.LossClient(address) as client:
        began = time.monotonic()
        client.l1(X, Y, timeout=10)
        seconds = time.monotonic() - began
    print(f"\n2000 silent connections: {open_now} descriptors open; {again}; a new caller came in in {seconds:.2f} s")
    assert open_now < 200 + 100
    assert seconds < 5


def test_calls_of_one_connection_are_bounded_whatever_it_was_told(served: tuple[Program, str]) -> None:
    program, address = served
    before = resident_bytes(program.process.pid)
    with Victim(address) as victim:
        with Peer(address) as peer:
            peer.until(SettingsAcknowledged, 5)
            header = peer.encoder.encode(headers_of())
            for number in range(12_000):  # as frames, for h2 itself would keep to the limit
                peer.raw(frame(http2.HEADERS, http2.END_HEADERS, 2 * number + 1, header))
                header = header if number else peer.encoder.encode(headers_of())
            time.sleep(0.5)
            grown = resident_bytes(program.process.pid) - before
            is_cut = peer.is_cut(TIMEOUT_SECONDS + 10)
        again = victim.check(1.5)
    print(f"\n12,000 calls without a body: {grown / MIB:.0f} MiB more; connection cut: {is_cut}; {again}")
    assert grown < 160 * MIB


def rapid_reset(peer: Peer) -> None:
    for _ in range(200):
        peer.reset(peer.open(headers_of()))


def pings(peer: Peer) -> None:
    for _ in range(100):
        peer.raw(frame(http2.PING, 0, 0, b"12345678"))


def settings(peer: Peer) -> None:
    for size in range(1000):
        peer.raw(frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 70_000 + size)))


def continuations(peer: Peer) -> None:
    peer.raw(frame(http2.HEADERS, 0, 1, peer.encoder.encode(headers_of())))
    for number in range(2000):
        peer.raw(frame(http2.CONTINUATION, 0, 1, peer.encoder.encode([(f"x-{number}", "y" * 500)])))


@pytest.mark.parametrize("flood", [rapid_reset, pings, settings, continuations])
def test_r27_floods_of_frames_harm_no_other_caller(served: tuple[Program, str], flood: Callable[[Peer], None]) -> None:
    program, address = served
    before = resident_bytes(program.process.pid)
    cut = 0
    with Victim(address) as victim:
        end = time.monotonic() + 3
        while time.monotonic() < end or len(victim.seconds) < 30:
            with Peer(address) as peer:
                try:
                    flood(peer)
                except OSError:
                    cut += 1
        grown = resident_bytes(program.process.pid) - before
        again = victim.check(1.5)
    print(f"\n{flood.__name__}: {cut} connections cut; {grown / MIB:.1f} MiB more; {again}")
    assert grown < 64 * MIB


@pytest.mark.parametrize(
    "path",
    [
        COMPUTE_LOSS[1:],
        "/" + COMPUTE_LOSS,
        COMPUTE_LOSS.replace("s/", "%73/") + "%73",
        COMPUTE_LOSS.upper(),
        COMPUTE_LOSS + "/",
        "/evil/Method",
        "/",
    ],
)
def test_r28_only_the_exact_path_is_a_method(server: RunningServer, path: str) -> None:
    before = Scrape(server.scrape()).series()
    with Peer(server.address) as peer:
        peer.send(peer.open(headers_of(path)), framed(message(5, 64)), end=True)
        status, _ = peer.status()
    assert status in ("12", "StreamReset")  # UNIMPLEMENTED, or not HTTP/2
    assert Scrape(server.scrape()).series() == before  # nobody can add a label


@pytest.mark.parametrize(("size", "codes"), [(4_000, {"0"}), (20_000, {"8"}), (100_000, {"8"})])
def test_r28_metadata_is_bounded(server: RunningServer, size: int, codes: set[str]) -> None:
    with Peer(server.address) as peer:
        peer.send(peer.open(headers_of(COMPUTE_LOSS, ("x-large", "a" * size))), framed(message(5, 64)), end=True)
        assert peer.status()[0] in codes
    with lossgrad.LossClient(server.address) as client:
        assert client.l1(X, X).value == 0
