"""Whatever comes, every method answers, or refuses with a documented code: never INTERNAL, never anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossgrad_server.errors import Code, RequestError
from lossgrad_server.transport.call import Method
from tests.server import wire_messages as wire
from tests.server.open_inference.asking import DTYPES, MODEL_INFER, infer_request, messages, outputs_of, pair
from tests.server.serving import RunningServer

PREFIX = "/inference.GRPCInferenceService/"
UNARY = [method.name for method in messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods][:20]
# What a caller's own mistakes are answered with. A busy server has more codes, but this one is not.
DOCUMENTED = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED}


class InProcess:
    """A call of the test's own."""

    method = MODEL_INFER
    metadata: Mapping[str, str | bytes] = {}
    deadline = None
    peer = "inproc"
    begun_ns = 0


def method_of(server: RunningServer, name: str) -> Method:
    return next(one for one in server.server._core.methods if one.name == PREFIX + name)


def call(server: RunningServer, name: str, data: bytes) -> bytes | RequestError:
    """Call a method's handler; return what it answered or refused with. Anything else that it raises is the test's."""
    handler = method_of(server, name).unary
    assert handler is not None

    async def serve() -> bytes | RequestError:
        try:
            return await handler(data, InProcess())
        except RequestError as error:
            return error

    return server.run(serve())


# ---- Requests that are nearly right ----

NAMES = st.sampled_from(["INPUT", "TARGET", "WEIGHT", "MASK", "LOSS", "", "input", "\0"])
values = st.one_of(
    st.booleans().map(lambda value: messages.InferParameter(bool_param=value)),
    wire.INT64.map(lambda value: messages.InferParameter(int64_param=value)),
    st.integers(0, (1 << 64) - 1).map(lambda value: messages.InferParameter(uint64_param=value)),
    st.floats().map(lambda value: messages.InferParameter(double_param=value)),
    st.sampled_from(["", "0.5", "nan", "-inf", "1e999", "mean", "none", "sample_sum", "x" * 300]).map(
        lambda value: messages.InferParameter(string_param=value)
    ),
    st.just(messages.InferParameter()),
)
LOSS_PARAMETERS = ("beta", "delta", "reduction", "denominator", "gradient_scale")
REGION_PARAMETERS = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
OTHER_PARAMETERS = ("priority", "sequence_id", "classification", "triton_enable_empty_final_response", "other")
PARAMETERS = st.dictionaries(
    st.sampled_from((*LOSS_PARAMETERS, *REGION_PARAMETERS, *OTHER_PARAMETERS)), values, max_size=3
)
SHAPES = st.lists(st.integers(0, 4) | st.sampled_from([-1, 1 << 31, (1 << 63) - 1, -(1 << 63)]), max_size=4)
CONTENTS = st.builds(
    messages.InferTensorContents,
    fp32_contents=st.lists(st.floats(width=32), max_size=4),
    fp64_contents=st.lists(st.floats(), max_size=2),
    int_contents=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=3),
    bool_contents=st.lists(st.booleans(), max_size=3),
    bytes_contents=st.lists(st.binary(max_size=3), max_size=1),
)


def changed(request: Any, draw: Any) -> bytes:
    """Return a good request after a few changes, each of which may make it a bad one."""
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.integers(0, 8))
        inputs = request.inputs
        if change == 0 and inputs:
            inputs[draw(st.integers(0, len(inputs) - 1))].name = draw(NAMES)
        elif change == 1 and inputs:
            inputs[0].datatype = draw(st.sampled_from([*DTYPES, "BYTES", "FP8", ""]))
        elif change == 2 and inputs:
            one = inputs[draw(st.integers(0, len(inputs) - 1))]
            del one.shape[:]
            one.shape.extend(draw(SHAPES))
        elif change == 3:
            for name, value in draw(PARAMETERS).items():
                request.parameters[name].CopyFrom(value)
        elif change == 4 and inputs:
            for name, value in draw(PARAMETERS).items():
                inputs[0].parameters[name].CopyFrom(value)
        elif change == 5:
            output = request.outputs.add(name=draw(NAMES))
            for name, value in draw(PARAMETERS).items():
                output.parameters[name].CopyFrom(value)
        elif change == 6 and inputs:
            inputs[-1].contents.CopyFrom(draw(CONTENTS))
            if draw(st.booleans()):
                del request.raw_input_contents[:]
        elif change == 7 and request.raw_input_contents:
            del request.raw_input_contents[-1]
        elif change == 8:
            request.raw_input_contents.append(draw(st.binary(max_size=30)))
    data: bytes = request.SerializeToString()
    return data


@st.composite
def nearly_right(draw: Any) -> bytes:
    model = draw(
        st.sampled_from(["smooth_l1", "huber_grad", "l1_masked", "mse_masked_grad", "l1", "mse_grad", "resnet"])
    )
    shape = draw(st.sampled_from([(2, 3), (1, 1), (0, 3), (5,), ()]))
    inputs = pair(*shape, dtype=draw(st.sampled_from(["FP16", "BF16", "FP32", "FP64"])))
    if "masked" in model and draw(st.booleans()):
        inputs["MASK"] = inputs["INPUT"] > 0
    return changed(infer_request(model, inputs, id=draw(st.text(max_size=5))), draw)


def check_answer(answer: bytes | RequestError) -> None:
    if isinstance(answer, RequestError):
        assert answer.code in DOCUMENTED, answer
        assert answer.message
    else:
        outputs_of(messages.ModelInferResponse.FromString(answer))


@settings(max_examples=400)
@given(data=nearly_right())
def test_requests_that_are_nearly_right_are_answered_or_refused(server: RunningServer, data: bytes) -> None:
    check_answer(call(server, "ModelInfer", data))


@settings(max_examples=400)
@given(data=wire.damaged(nearly_right()))
def test_requests_that_were_damaged_are_answered_or_refused(server: RunningServer, data: bytes) -> None:
    check_answer(call(server, "ModelInfer", data))


@given(data=st.binary(max_size=60))
def test_bytes_that_nobody_made_are_refused(server: RunningServer, data: bytes) -> None:
    answer = call(server, "ModelInfer", data)
    assert isinstance(answer, RequestError)
    assert answer.code in DOCUMENTED


@settings(max_examples=30)
@given(requests=st.lists(nearly_right() | wire.damaged(nearly_right()), min_size=1, max_size=12))
def test_a_stream_answers_every_message_whatever_it_is(server: RunningServer, requests: list[bytes]) -> None:
    handler = method_of(server, "ModelStreamInfer").stream
    assert handler is not None

    async def serve() -> list[bytes]:
        answers: list[bytes] = []

        async def received() -> AsyncIterator[bytes]:
            for data in requests:
                yield data
                await asyncio.sleep(0)

        async def send(answer: bytes) -> None:
            answers.append(answer)

        await handler(received(), send, InProcess())
        return answers

    answers = [messages.ModelStreamInferResponse.FromString(one) for one in server.run(serve())]
    assert len(answers) == len(requests)
    for data, answer in zip(requests, answers, strict=True):
        alone = call(server, "ModelInfer", data)
        if isinstance(alone, RequestError):
            assert answer.error_message == alone.message
        else:
            expected = messages.ModelInferResponse.FromString(alone)
            assert not answer.error_message
            assert list(answer.infer_response.raw_output_contents) == list(expected.raw_output_contents)


@pytest.mark.parametrize("name", [name for name in UNARY if name not in ("ModelInfer", "ModelStreamInfer")])
@settings(max_examples=60)
@given(
    data=wire.soup(
        wire.text_field(1),
        wire.payload_field(1, wire.soup(wire.text_field(1), wire.number_field(2), known=frozenset((1, 2)))),
        wire.payload_field(2, st.binary(max_size=10)),
        wire.number_field(3),
        wire.number_field(4),
        known=frozenset(),
    )
    | st.binary(max_size=30)
)
def test_every_other_method_answers_or_refuses(server: RunningServer, name: str, data: bytes) -> None:
    answer = call(server, name, data)
    if isinstance(answer, RequestError):
        assert answer.code in DOCUMENTED, answer
    else:
        getattr(messages, f"{name}Response").FromString(answer)
