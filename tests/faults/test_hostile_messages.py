"""Messages made to cost more than they should, and messages made of noise (R23, R24, R25, R26)."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from lossgrad_api import codec
from lossgrad_api.codec import COMPUTE_LOSS, STREAM_COMPUTE_LOSS
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from tests.faults.http2 import Peer, headers_of
from tests.faults.noise import INSIDE, Noise
from tests.faults.programs import serving
from tests.faults.resources import MIB, peak_bytes, reset_peak, resident_bytes
from tests.server import wire_messages as wire
from tests.server.program import Program
from tests.server.requests import L1, request

LIMIT_BYTES = 64 * MIB
# What is told to those who send nonsense: what they must change.
DOCUMENTED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Program, str]]:
    with serving(
        Program("--port=0", "--metrics-port=-1", "--threads=1", f"--max-message-bytes={LIMIT_BYTES}")
    ) as started:
        yield started


Call = Callable[..., bytes]


@pytest.fixture
def call(served: tuple[Program, str]) -> Iterator[Call]:
    """Give ComputeLoss on bytes."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(served[1], options=options) as channel:
        yield channel.unary_unary(COMPUTE_LOSS)


def refusal(call: Call, message: bytes) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(message, timeout=30)
    return caught.value


def test_r23_a_gzip_bomb_is_not_unpacked(served: tuple[Program, str]) -> None:
    program, address = served
    bomb = gzip.compress(bytes(500_000_000), 6)
    before = resident_bytes(program.process.pid)
    reset_peak(program.process.pid)
    with Peer(address) as peer:
        peer.send(
            peer.open(headers_of(COMPUTE_LOSS, ("grpc-encoding", "gzip"))),
            b"\x01" + struct.pack(">I", len(bomb)) + bomb,
            end=True,
        )
        status, text = peer.status(30)
    more = peak_bytes(program.process.pid) - before
    print(f"\ngzip bomb, {len(bomb)} bytes for 500 MB: status {status} ({text}), {more / MIB:.0f} MiB more")
    assert status in ("8", "12")  # RESOURCE_EXHAUSTED, or gzip not taken at all
    assert more < LIMIT_BYTES + 16 * MIB  # what any message of the largest size may take; never 500 MB


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_r24_the_size_limit_is_exact(call: Call, over: int) -> None:
    def sized(data_bytes: int) -> bytes:
        tensor = tensor_pb2.Tensor(
            data_type=tensor_pb2.DATA_TYPE_FLOAT16, shape=[data_bytes // 2], data=bytes(data_bytes)
        )
        return pb.ComputeLossRequest(specs=[L1], input=tensor, target=tensor).SerializeToString()

    room = LIMIT_BYTES + over
    message = sized((room - 100) // 4 * 2)
    (padding,) = (pad for size in range(1, 400) if len(pad := wire.delimited(15, bytes(size))) == room - len(message))
    message += padding
    assert len(message) == room
    if over <= 0:
        assert pb.ComputeLossResponse.FromString(call(message, timeout=30)).results[0].scalar == 0
        return
    error = refusal(call, message)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(room) in error.details()
    assert str(LIMIT_BYTES) in error.details()


@pytest.mark.parametrize("kind", ["varints", "empty messages", "empty strings"])
def test_r25_parsing_costs_no_more_than_the_message(served: tuple[Program, str], call: Call, kind: str) -> None:
    def message(size: int) -> bytes:
        return {
            "varints": lambda: wire.delimited(7, wire.delimited(2, bytes(size))),
            "empty messages": lambda: b"\x0a\x00" * (size // 2),
            "empty strings": lambda: b"\x1a\x00" * (size // 2),
        }[kind]()

    size = 60 * MIB
    refusal(call, message(MIB))  # what a process takes the first time only is not the large message's
    pid = served[0].process.pid
    before = resident_bytes(pid)
    reset_peak(pid)
    error = refusal(call, message(size))
    more = peak_bytes(pid) - before
    print(f"\n60 MiB of {kind}: {more / MIB:.0f} MiB more")
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert more < 3 * size


def check_noise(served: tuple[Program, str], call: Any, count: int) -> None:
    program, _ = served
    pid = program.process.pid
    noise = Noise(26)
    codes: Counter[str] = Counter()
    before = 0
    at_a_time = 50
    for number in range(0, count, at_a_time):
        if not before and number >= count // 4:
            before = resident_bytes(pid)  # warm by now
        calls = [call.future(noise.message(), timeout=60) for _ in range(at_a_time)]
        for one in calls:
            codes[one.code().name] += 1  # waits for it
            text = one.details() or ""
            assert not any(word in text for word in INSIDE), text
    grown = resident_bytes(pid) - before
    print(f"\n{count} messages of noise: {dict(codes)}, {grown / MIB:.1f} MiB more after the first quarter")
    assert set(codes) <= DOCUMENTED
    assert codes["INVALID_ARGUMENT"] > count / 2
    assert grown < 8 * MIB
    assert not [line for line in program.logged if "ERROR" in line or "Traceback" in line]


def test_r26_noise_gets_documented_codes_and_sees_nothing_of_the_inside(
    served: tuple[Program, str], call: Call
) -> None:
    check_noise(served, call, 3000)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_r26_a_hundred_thousand_messages_of_noise(served: tuple[Program, str], call: Call) -> None:
    check_noise(served, call, 100_000)


def test_r26_noise_on_a_stream_ends_that_stream_or_that_request_alone(served: tuple[Program, str]) -> None:
    noise = Noise(27)
    codes: Counter[str] = Counter()
    with grpc.insecure_channel(served[1]) as channel:
        method: Any = channel.stream_stream(STREAM_COMPUTE_LOSS)
        for _ in range(200):
            good = request([5.0], [0.0], L1).SerializeToString()
            tagged = [(tag, 0, [noise.message() if tag != 4 else good]) for tag in range(8)]
            try:
                answers = list(
                    method(iter([codec.encode_stream_request(tagged)]), timeout=30)
                )  # one message or several
                responses = [one for text in answers for one in pb.StreamComputeLossResponse.FromString(text).responses]
                by_tag = {one.tag: one for one in responses}
                assert len(by_tag) == len(responses)
                assert by_tag[4].response.results[0].scalar == 5.0
                assert len(by_tag) == 8
                codes["answered"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
    print(f"\n200 streams of noise around one right request: {dict(codes)}")
    assert set(codes) <= {"answered", *DOCUMENTED}
    assert codes["answered"] > 0
