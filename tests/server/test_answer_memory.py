"""Large answers are computed in the bytes that are sent, and read as those that are joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lossgrad_api import codec
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.wire import read_length, read_tag
from lossgrad_server.jobs import unpack_header
from lossgrad_server.transport import answers
from lossgrad_server.transport.answer_memory import AnswerMemory
from lossgrad_server.transport.checks import RequestChecker
from tests.server.calling import Connect, stub_on
from tests.server.requests import request
from tests.server.serving import RunningServer

MEAN = pb.LossSpec(smooth_l1=pb.SmoothL1Loss(), include_gradient=True)
NONE = pb.LossSpec(mse=pb.MseLoss(), reduction=pb.REDUCTION_NONE)


@pytest.mark.parametrize("byte_count", [1, 63, 64, 65, 100_000])
@pytest.mark.parametrize("head", [b"", b"a", bytes(range(256)) * 2], ids=len)
def test_a_message_is_its_head_and_its_data_between_paddings(byte_count: int, head: bytes) -> None:
    memory = AnswerMemory(byte_count)
    assert np.frombuffer(memory.data, np.uint8).ctypes.data % 64 == 0
    elements = bytes(range(1, 256)) * (byte_count // 255 + 1)
    memory.data[:] = elements[:byte_count]
    message = memory.finish(head)
    assert message is not None
    _, begin = padding(message, 0)
    end = begin + len(head) + byte_count
    assert message[begin:end] == head + elements[:byte_count]
    assert padding(message, end)[1] == len(message)


def padding(message: bytes, position: int) -> tuple[bytes, int]:
    """Return the padding at `position`, and the position behind it."""
    tag, position = read_tag(message, position, len(message))
    assert tag == 15 << 3 | 2
    begin, end = read_length(message, position, len(message))
    assert set(message[begin:end]) <= {0}
    return message[begin:end], end


def test_a_head_without_room_is_refused() -> None:
    memory = AnswerMemory(10)
    assert memory.finish(bytes(900)) is None
    assert memory.finish(b"") is not None


@pytest.mark.parametrize("spec", [MEAN, NONE], ids=["gradient", "losses"])
@pytest.mark.parametrize("key", ["", "k" * 128])
@pytest.mark.parametrize("shape", [(50_000,), (2, 1, 5, 1, 5000, 1, 1)])
def test_an_answer_in_place_says_what_a_joined_one_says(
    server: RunningServer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    spec: pb.LossSpec,
    key: str,
    shape: tuple[int, ...],
) -> None:
    generator = np.random.default_rng(1)
    input, target = generator.standard_normal((2, *shape)).astype(np.float32)
    message = request(input, target, spec)
    message.idempotency_key = key
    call: Any = connect(server.address).unary_unary(codec.COMPUTE_LOSS)
    in_place = call(message.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr(answers, "IS_SUPPORTED", False)
        joined = call(message.SerializeToString())
    assert len(in_place) > len(joined)
    assert without_times(in_place) == without_times(joined)
    assert codec.decode_compute_response(in_place).results == codec.decode_compute_response(joined).results


def without_times(message: bytes) -> pb.ComputeLossResponse:
    response = pb.ComputeLossResponse.FromString(message)
    assert response.stats.compute_ns
    response.ClearField("stats")
    response.ClearField("padding")
    return response


def test_an_answer_without_room_for_its_memory_is_left_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(byte_count: int) -> Any:
        raise MemoryError

    message = request(np.zeros(50_000, np.float32), np.zeros(50_000, np.float32), MEAN).SerializeToString()
    plan, item, _ = RequestChecker(1 << 30).check(message)
    assert unpack_header(item.header) == plan
    memory = answers.answer_memory(item.header)
    assert memory is not None
    assert len(memory.data) == 200_000
    monkeypatch.setattr(answers, "AnswerMemory", fail)
    assert answers.answer_memory(item.header) is None


def test_small_answers_and_those_of_several_tensors_are_joined(server: RunningServer, connect: Connect) -> None:
    stub = stub_on(connect(server.address))
    large = np.ones(50_000, np.float32)
    for message in (request(large[:10], large[:10], MEAN), request(large, large, MEAN, MEAN)):
        answer = stub.ComputeLoss(message)
        assert not answer.padding
        assert all(len(result.input_gradient.data) for result in answer.results)
