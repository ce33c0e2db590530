"""NVIDIA's tritonclient, unchanged, against the server: sync, callbacks, asyncio and streams, beside our SDK."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.grpc.aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

import lossgrad
from tests.server.serving import PATIENCE_SECONDS, RunningServer

triton: Any = tritonclient.grpc  # it has no types
triton_aio: Any = tritonclient.grpc.aio

Array = NDArray[Any]
TORCH = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64}
NUMPY = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<f4"}  # tritonclient has no bfloat16 but float32
LOSSES: dict[str, tuple[Any, dict[str, float]]] = {
    "smooth_l1": (torch.nn.functional.smooth_l1_loss, {"beta": 0.5}),
    "huber": (torch.nn.functional.huber_loss, {"delta": 0.5}),
    "l1": (torch.nn.functional.l1_loss, {}),
    "mse": (torch.nn.functional.mse_loss, {}),
}
# What torch's own rounding in the dtype allows, as in parity.py.
TOLERANCES = {"FP16": 4e-3, "BF16": 3e-2, "FP32": 1e-5, "FP64": 1e-13}


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    client = triton.InferenceServerClient(server.address)
    yield client
    client.close()


@pytest.fixture
async def aio_client(server: RunningServer) -> AsyncIterator[Any]:
    client = triton_aio.InferenceServerClient(server.address)
    yield client
    await client.close()


def values(*shape: int, dtype: str = "FP32", seed: int = 1) -> Array:
    """Return random numbers that the type has exactly."""
    array = torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(TORCH[dtype])
    numbers: Array = array.to(torch.float32 if dtype == "BF16" else TORCH[dtype]).numpy()
    return numbers


def tensors(dtype: str, **arrays: Array) -> list[Any]:
    """Return arrays as tritonclient's inputs."""
    inputs = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), "BOOL" if name == "MASK" else dtype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def text(parameters: dict[str, float]) -> dict[str, str]:
    """Return parameters as the one type of number that tritonclient 2.41 sends: a string."""
    return {name: repr(value) for name, value in parameters.items()}


def close(actual: Array, expected: torch.Tensor, dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(
        actual.astype("f8"), expected.detach().double().numpy(), rtol=tolerance, atol=tolerance * 1e-2
    )


def status_of(error: Any) -> str:
    return str(error.status())


def message_of(error: Any) -> str:
    return str(error.message())


# ---- What torch gives ----


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_torchs(client: Any, loss: str, dtype: str) -> None:
    function, parameters = LOSSES[loss]
    input, target = values(6, 37, dtype=dtype), values(6, 37, dtype=dtype, seed=2)
    inputs = tensors(dtype, INPUT=input, TARGET=target)
    for reduction in (None, "mean", "sum", "none"):
        asked = text(parameters) | ({} if reduction is None else {"reduction": reduction})
        result = client.infer(f"{loss}_grad", inputs, parameters=asked)
        predicted = torch.from_numpy(input).to(TORCH[dtype]).requires_grad_()
        truth = torch.from_numpy(target).to(TORCH[dtype])
        if reduction is None:
            rows = function(predicted, truth, reduction="none", **parameters).mean(1, keepdim=True)
            rows.sum().backward()
            close(result.as_numpy("LOSS"), rows, dtype)
            assert result.as_numpy("LOSS").shape == (6, 1)
            assert result.as_numpy("COUNT").tolist() == [[37]] * 6
        else:
            expected = function(predicted, truth, reduction=reduction, **parameters)
            expected.backward(torch.ones_like(expected))
            close(result.as_numpy("LOSS"), expected.reshape(1) if reduction != "none" else expected, dtype)
            assert result.as_numpy("COUNT").tolist() == [6 * 37]
        assert predicted.grad is not None
        close(result.as_numpy("GRAD"), predicted.grad, dtype)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_and_masks_are_torchs_selection(client: Any, loss: str, dtype: str) -> None:
    function, parameters = LOSSES[loss]
    input, target = values(4, 20, dtype=dtype), values(4, 20, dtype=dtype, seed=2)
    weight, mask = abs(values(4, 20, dtype=dtype, seed=3)), values(4, 20, seed=4) > 0
    input[0, ~mask[0]] = np.nan  # behind the mask it stays there
    inputs = tensors(dtype, INPUT=input, TARGET=target, WEIGHT=weight, MASK=mask)
    result = client.infer(f"{loss}_masked_grad", inputs, parameters=text(parameters) | {"reduction": "sum"})
    predicted = torch.from_numpy(input).to(TORCH[dtype]).requires_grad_()
    chosen = torch.from_numpy(mask)
    each = function(
        predicted[chosen], torch.from_numpy(target).to(TORCH[dtype])[chosen], reduction="none", **parameters
    )
    total = (each * torch.from_numpy(weight).to(TORCH[dtype])[chosen]).double().sum()
    total.backward()
    close(result.as_numpy("LOSS"), total.reshape(1), dtype)
    assert result.as_numpy("COUNT").tolist() == [mask.sum()]
    assert predicted.grad is not None
    close(result.as_numpy("GRAD"), predicted.grad, dtype)


# ---- What our own SDK gives, in the same process ----


def native_loss(model: str, reduction: str) -> lossgrad.Loss:
    gradient = model.endswith("_grad")
    options: dict[str, Any] = {"reduction": reduction, "gradient": gradient}
    if model.startswith("smooth_l1"):
        return lossgrad.SmoothL1(0.5, **options)
    if model.startswith("huber"):
        return lossgrad.Huber(0.5, **options)
    return (lossgrad.L1 if model.startswith("l1") else lossgrad.MSE)(**options)


def native(array: Array, dtype: str) -> Array:
    """Return an array as our SDK takes it: it has bfloat16 where tritonclient has float32 only."""
    return array.astype(ml_dtypes.bfloat16) if dtype == "BF16" else array


def tritons(array: Any, dtype: str) -> bytes:
    """Return the bytes of a result of our SDK as tritonclient gives it."""
    return bytes(np.asarray(array).astype(NUMPY[dtype]).tobytes())


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("loss", LOSSES)
def test_both_clients_in_one_process_get_the_same_bits(
    client: Any, server: RunningServer, loss: str, dtype: str
) -> None:
    _, parameters = LOSSES[loss]
    input, target = values(5, 41, dtype=dtype), values(5, 41, dtype=dtype, seed=2)
    weight, mask = abs(values(5, 41, dtype=dtype, seed=3)), values(5, 41, seed=4) > 0
    with lossgrad.LossClient(server.address) as ours:
        for suffix in ("", "_grad", "_masked", "_masked_grad"):
            arrays = {"INPUT": input, "TARGET": target}
            more: dict[str, Any] = {}
            if "masked" in suffix:
                arrays |= {"WEIGHT": weight, "MASK": mask}
                more = {"weight": native(weight, dtype), "mask": mask}
            for reduction in ("sample_mean", "sample_sum", "mean", "sum", "none"):
                asked = text(parameters) | {"reduction": reduction}
                theirs = client.infer(loss + suffix, tensors(dtype, **arrays), parameters=asked)
                pair = (native(input, dtype), native(target, dtype))
                (result,) = ours.compute(*pair, [native_loss(loss + suffix, reduction)], **more)
                assert theirs.as_numpy("LOSS").tobytes() == tritons(result.loss, dtype), (suffix, reduction)
                if "grad" in suffix:
                    assert result.gradient is not None
                    assert theirs.as_numpy("GRAD").tobytes() == tritons(result.gradient, dtype)


async def test_asyncio_and_streams_get_the_bits_of_the_plain_client(
    client: Any, aio_client: Any, server: RunningServer
) -> None:
    pair = tensors("FP32", INPUT=values(7, 33), TARGET=values(7, 33, seed=2))
    asked = {"parameters": {"reduction": "sum"}, "inputs": pair}
    expected = client.infer("smooth_l1_grad", **asked)
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("smooth_l1_grad", **asked)
    streamed, error = await asyncio.to_thread(answers.get, timeout=PATIENCE_SECONDS)
    assert error is None
    client.stop_stream()
    for result in (await aio_client.infer("smooth_l1_grad", **asked), streamed):
        for name in ("LOSS", "COUNT", "GRAD"):
            assert result.as_numpy(name).tobytes() == expected.as_numpy(name).tobytes()


# ---- Many at a time ----

SHAPES = [(1 + index % 5, 1 + 7 * index) for index in range(63)] + [(3, 200_000)]


def expected_rows(input: Array, target: Array) -> Array:
    rows: Array = abs(input - target).mean(1, keepdims=True)
    return rows


async def test_64_requests_of_mixed_shapes_at_a_time_get_their_own_answers(aio_client: Any) -> None:
    pairs = [(values(*shape, seed=index), values(*shape, seed=100 + index)) for index, shape in enumerate(SHAPES)]
    calls = [
        aio_client.infer("l1_grad", tensors("FP32", INPUT=input, TARGET=target), request_id=str(index))
        for index, (input, target) in enumerate(pairs)
    ]
    for index, result in enumerate(await asyncio.gather(*calls)):
        input, target = pairs[index]
        assert result.get_response().id == str(index)
        np.testing.assert_allclose(result.as_numpy("LOSS"), expected_rows(input, target), rtol=1e-5)
        np.testing.assert_array_equal(result.as_numpy("GRAD"), np.sign(input - target) / np.float32(input.shape[1]))


def test_64_requests_with_callbacks_get_their_own_answers(client: Any) -> None:
    pairs = [(values(*shape, seed=index), values(*shape, seed=100 + index)) for index, shape in enumerate(SHAPES)]
    results: dict[int, Any] = {}
    all_there = threading.Event()

    for index, (input, target) in enumerate(pairs):

        def done(result: Any, error: Any, index: int = index) -> None:
            results[index] = error or result
            if len(results) == len(pairs):
                all_there.set()

        client.async_infer("l1", tensors("FP32", INPUT=input, TARGET=target), done)
    assert all_there.wait(PATIENCE_SECONDS)
    for index, (input, target) in enumerate(pairs):
        np.testing.assert_allclose(results[index].as_numpy("LOSS"), expected_rows(input, target), rtol=1e-5)


# ---- Streams ----


def test_a_stream_answers_in_order_and_tells_errors_one_by_one(client: Any) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    pairs = [(values(*shape, seed=index), values(*shape, seed=100 + index)) for index, shape in enumerate(SHAPES)]
    for index, (input, target) in enumerate(pairs):
        model = "resnet" if index == 5 else "l1"
        client.async_stream_infer(
            model,
            tensors("FP32", INPUT=input, TARGET=target),
            request_id=str(index),
            enable_empty_final_response=index % 2 == 0,
        )
    for index, (input, target) in enumerate(pairs):
        result, error = answers.get(timeout=PATIENCE_SECONDS)
        if index == 5:
            assert "there is no model 'resnet'" in message_of(error)
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(index)
        assert ("triton_final_response" in response.parameters) is (index % 2 == 0)
        np.testing.assert_allclose(result.as_numpy("LOSS"), expected_rows(input, target), rtol=1e-5)
    client.stop_stream()


async def test_an_asyncio_stream_answers_in_order(aio_client: Any) -> None:
    pairs = [(values(2, 1 + index, seed=index), values(2, 1 + index, seed=50 + index)) for index in range(20)]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, (input, target) in enumerate(pairs):
            inputs = tensors("FP32", INPUT=input, TARGET=target)
            yield {"model_name": "l1", "inputs": inputs, "request_id": str(index)}

    answers = aio_client.stream_infer(requests())
    index = 0
    async for result, error in answers:
        assert error is None
        assert result.get_response().id == str(index)
        np.testing.assert_allclose(result.as_numpy("LOSS"), expected_rows(*pairs[index]), rtol=1e-5)
        index += 1
    assert index == len(pairs)


# ---- Errors, as the client shows them ----


@pytest.mark.parametrize(
    ("model", "arrays", "parameters", "status", "words"),
    [
        ("resnet", {"INPUT": (2, 3), "TARGET": (2, 3)}, {}, "NOT_FOUND", "there is no model 'resnet'"),
        ("l1", {"INPUT": (2, 3)}, {}, "INVALID_ARGUMENT", "no input TARGET"),
        ("l1", {"INPUT": (2, 3), "TARGET": (3, 2)}, {}, "INVALID_ARGUMENT", "TARGET has shape [3, 2], INPUT [2, 3]"),
        ("smooth_l1", {"INPUT": (2,), "TARGET": (2,)}, {"beta": "-1"}, "INVALID_ARGUMENT", "beta is -1.0"),
        ("huber", {"INPUT": (2,), "TARGET": (2,)}, {"beta": "1"}, "INVALID_ARGUMENT", "has delta instead"),
    ],
)
def test_errors_have_tritons_codes(
    client: Any, model: str, arrays: Any, parameters: Any, status: str, words: str
) -> None:
    inputs = tensors("FP32", **{name: values(*shape) for name, shape in arrays.items()})
    with pytest.raises(InferenceServerException, match="StatusCode") as caught:
        client.infer(model, inputs, parameters=parameters)
    assert status_of(caught.value) == f"StatusCode.{status}"
    assert words in message_of(caught.value)


def test_a_timeout_of_the_client_is_a_deadline(client: Any) -> None:
    inputs = tensors("FP32", INPUT=values(2, 3), TARGET=values(2, 3))
    with pytest.raises(InferenceServerException) as caught:
        client.infer("l1", inputs, client_timeout=1e-9)
    assert status_of(caught.value) == "StatusCode.DEADLINE_EXCEEDED"
    # The server's own, in microseconds, and a priority: a minute is enough, and the priority changes nothing.
    assert client.infer("l1", inputs, timeout=60_000_000, priority=1).as_numpy("LOSS").shape == (2, 1)


# ---- Everything else that the client asks ----


def test_every_question_of_the_client_is_answered(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mse", "1")
    assert client.get_server_metadata(as_json=True)["name"] == "lossgrad"
    assert client.get_model_metadata("mse", as_json=True)["platform"] == "torch_loss"
    assert client.get_model_config("mse", as_json=True)["config"]["backend"] == "lossgrad"
    assert len(client.get_model_repository_index(as_json=True)["models"]) == 16
    assert client.get_inference_statistics("mse", as_json=True)["model_stats"][0]["name"] == "mse"
    assert len(client.get_inference_statistics(as_json=True)["model_stats"]) == 16
    assert client.get_system_shared_memory_status(as_json=True) == {}
    assert client.get_cuda_shared_memory_status(as_json=True) == {}
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    assert client.get_log_settings(as_json=True)["settings"]["log_error"] == {"bool_param": True}
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"] == {"value": ["OFF"]}
    refusals: list[Callable[[], Any]] = [
        lambda: client.load_model("mse"),
        lambda: client.unload_model("mse"),
        lambda: client.update_log_settings({"log_info": False}),
        lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
        lambda: client.register_system_shared_memory("r", "/r", 64),
    ]
    for refused in refusals:
        with pytest.raises(InferenceServerException) as caught:
            refused()
        assert status_of(caught.value) == "StatusCode.UNIMPLEMENTED"


async def test_the_asyncio_client_is_answered_too(aio_client: Any) -> None:
    assert await aio_client.is_server_live()
    assert await aio_client.is_model_ready("huber_masked_grad")
    assert (await aio_client.get_server_metadata(as_json=True))["name"] == "lossgrad"
    with pytest.raises(InferenceServerException) as caught:
        await aio_client.get_model_config("resnet")
    assert status_of(caught.value) == "StatusCode.NOT_FOUND"
