"""A fuzzer on the raw connection (R26): HTTP/2 and gRPC in every way that they should not be, beside a good caller."""

from __future__ import annotations

import select
import socket
import time
from collections import Counter
from typing import Any

import pytest
from hpack import Decoder, HPACKError

from tests.faults import http2
from tests.faults.fuzz import Adversary
from tests.faults.generator import message
from tests.faults.noise import INSIDE, Noise
from tests.faults.programs import serving
from tests.faults.resources import MIB, descriptors, resident_bytes, threads
from tests.faults.victim import Victim
from tests.server.program import Program
from tests.server.serving import eventually

PER_CONNECTION = 8
# What a call may come to, by its number. OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED are
# ours; UNKNOWN, INTERNAL and UNAVAILABLE here are gRPC's own words for frames that are no gRPC.
OURS = {"0", "3", "4", "8", "12"}
OF_GRPC = {"2", "13", "14"}
QUIET_SECONDS = 0.3


class Answers:
    """Reads what a server sends on a raw connection."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.resets = 0
        self.ended = 0
        self.texts: set[str] = set()
        self._decoder = Decoder()
        self._data = b""

    def take(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= 9 and len(self._data) >= 9 + (size := int.from_bytes(self._data[:3], "big")):
            kind, flags, payload = self._data[3], self._data[4], self._data[9 : 9 + size]
            self._data = self._data[9 + size :]
            if kind == http2.HEADERS:
                fields: dict[Any, Any] = dict(self._decoder.decode(payload))
                if "grpc-status" in fields:
                    self.statuses[str(fields["grpc-status"])] += 1
                    if fields.get("grpc-message"):
                        self.texts.add(f"{fields['grpc-status']}: {fields['grpc-message']}")
                elif flags & http2.END_STREAM:
                    self.statuses[f"HTTP {fields.get(':status')}"] += 1
                self.ended += bool(flags & http2.END_STREAM)
            elif kind == http2.RST_STREAM:
                self.resets += 1


def converse(address: str, data: bytes, request_count: int, answers: Answers) -> None:
    """Send all, read what comes, until every request has ended, the server hangs up, or says nothing more."""
    host, _, port = address.rpartition(":")
    ended = answers.ended + answers.resets
    with socket.create_connection((host, int(port)), timeout=10) as one:
        one.setblocking(False)
        heard_at = time.monotonic()
        while time.monotonic() - heard_at < QUIET_SECONDS and answers.ended + answers.resets - ended < request_count:
            readable, writable, _ = select.select([one], [one] if data else [], [], 0.05)
            try:
                if writable:
                    data = data[one.send(data) :]
                if readable:
                    got = one.recv(1 << 16)
                    if not got:
                        return
                    heard_at = time.monotonic()
                    answers.take(got)
            except BlockingIOError:
                continue
            except OSError:  # it hung up before it had read all
                return


def check_fuzz(request_count: int) -> None:
    noise = Noise(261)
    good = message(5, 64)

    def next_message() -> bytes:
        return good if adversary.requests % 4 == 0 else noise.message()

    adversary = Adversary(26, next_message)
    statuses: Counter[str] = Counter()
    texts: set[str] = set()
    resets = garbled = 0
    with serving(Program("--port=0", "--metrics-port=-1", "--threads=1", "--transfer-timeout-seconds=2")) as started:
        program, address = started
        pid = program.process.pid
        # What a process takes once, it takes before: connections, threads, the pools of its allocator.
        before = (0, 0, 0)
        with Victim(address) as victim:
            while adversary.requests < request_count:
                if before == (0, 0, 0) and adversary.requests >= request_count // 4:
                    before = resident_bytes(pid), descriptors(pid), threads(pid)
                answers = Answers()
                try:
                    converse(address, adversary.connection(PER_CONNECTION), PER_CONNECTION, answers)
                except HPACKError:  # of what it answers to headers that made no sense, the table may make none
                    garbled += 1
                statuses += answers.statuses
                texts |= answers.texts
                resets += answers.resets
            # What it was sent and never finished ends at the read deadline.
            eventually(lambda: descriptors(pid) <= before[1] + 5)
            after = resident_bytes(pid), descriptors(pid), threads(pid)
            again = victim.check(1.5)
    print(
        f"\n{adversary.requests} fuzzed requests on raw connections: statuses {dict(sorted(statuses.items()))}, {resets} "
        f"streams reset; memory {(after[0] - before[0]) / MIB:+.1f} MiB, descriptors {after[1] - before[1]:+d}, threads "
        f"{after[2] - before[2]:+d} after the first quarter; {again}"
    )
    print("of gRPC's own: " + "; ".join(sorted(text for text in texts if text[: text.index(":")] in OF_GRPC)))
    assert program.process.poll() == -9  # lived until the test ended it
    assert not garbled
    assert {status for status in statuses if not status.startswith("HTTP ")} <= OURS | OF_GRPC
    assert not [text for text in texts if any(word in text for word in INSIDE)]
    assert statuses["0"] > request_count / 50
    assert statuses["3"] > request_count / 10
    assert after[0] - before[0] < 16 * MIB
    assert after[2] <= before[2] + 4
    assert not [line for line in program.logged if "ERROR" in line or "Traceback" in line]
    for text in sorted(texts):
        if text[: text.index(":")] in OF_GRPC:
            assert not any(word in text for word in ("lossgrad", "specs", "tensor")), text  # none of ours


def test_r26_a_fuzzer_on_raw_connections_gets_documented_codes_and_harms_nobody() -> None:
    check_fuzz(400)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_r26_ten_thousand_fuzzed_requests_on_raw_connections() -> None:
    check_fuzz(10_000)
