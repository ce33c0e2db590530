"""The methods beside inference: what the server tells of itself and its models, and what it honestly does not do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lossgrad_server import __version__
from lossgrad_server.transport.open_inference.models import MODELS, configuration
from tests.server.calling import Connect, Failure, failure_of
from tests.server.open_inference.asking import infer, infer_request, messages, pair, stub_on
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer

ALL_METHODS = [method.name for method in messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]


def failure(call: Callable[..., Any], request: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=PATIENCE_SECONDS)
    return failure_of(caught.value)


# ---- The server ----


def test_a_server_that_serves_is_live_and_ready_and_so_are_its_models(triton: Any) -> None:
    assert triton.ServerLive(messages.ServerLiveRequest()).live
    assert triton.ServerReady(messages.ServerReadyRequest()).ready
    for name in MODELS:
        assert triton.ModelReady(messages.ModelReadyRequest(name=name)).ready
    assert triton.ModelReady(messages.ModelReadyRequest(name="mse", version="1")).ready
    assert not triton.ModelReady(messages.ModelReadyRequest(name="mse", version="2")).ready
    assert not triton.ModelReady(messages.ModelReadyRequest(name="resnet")).ready


def test_a_server_that_drains_is_live_and_not_ready(start_server: StartServer, connect: Connect) -> None:
    running = start_server()
    stub = stub_on(connect(running.address))
    assert stub.ServerReady(messages.ServerReadyRequest()).ready
    running.server._core.set_ready(False)  # what draining begins with
    assert stub.ServerLive(messages.ServerLiveRequest()).live
    assert not stub.ServerReady(messages.ServerReadyRequest()).ready
    assert not stub.ModelReady(messages.ModelReadyRequest(name="mse")).ready


def test_the_servers_metadata_lists_the_extensions_that_are_served(triton: Any) -> None:
    metadata = triton.ServerMetadata(messages.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("lossgrad", __version__)
    assert set(metadata.extensions) == {"model_configuration", "binary_tensor_data", "parameters", "statistics"}


# ---- The models ----


def test_there_is_a_model_for_each_loss_with_and_without_mask_and_gradient(triton: Any) -> None:
    index = triton.RepositoryIndex(messages.RepositoryIndexRequest()).models
    kinds = ("smooth_l1", "huber", "l1", "mse")
    expected = {kind + rest for kind in kinds for rest in ("", "_grad", "_masked", "_masked_grad")}
    assert {one.name for one in index} == expected == set(MODELS)
    assert {(one.version, one.state, one.reason) for one in index} == {("1", "READY", "")}


@pytest.mark.parametrize("name", MODELS)
def test_metadata_and_configuration_agree(triton: Any, name: str) -> None:
    metadata = triton.ModelMetadata(messages.ModelMetadataRequest(name=name))
    config = triton.ModelConfig(messages.ModelConfigRequest(name=name)).config
    assert (metadata.name, list(metadata.versions), metadata.platform) == (name, ["1"], "torch_loss")
    assert (config.name, config.platform, config.backend) == (name, "torch_loss", "lossgrad")
    assert config.max_batch_size > 0
    for shown, configured in ((metadata.inputs, config.input), (metadata.outputs, config.output)):
        assert [one.name for one in shown] == [one.name for one in configured]
        for one, other in zip(shown, configured, strict=True):
            assert list(one.shape) == [-1, *other.dims]  # the batch dimension stands in the metadata only
            assert other.data_type == getattr(descriptor_of_types(), f"TYPE_{one.datatype}")
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert not config.model_transaction_policy.decoupled
    assert not config.HasField("response_cache")
    assert [one.optional for one in config.input] == ([False, False, True, True] if "masked" in name else [False] * 2)


def descriptor_of_types() -> Any:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def test_a_models_tensors_are_what_its_name_says(triton: Any) -> None:
    def names(model: str) -> tuple[list[str], list[str]]:
        metadata = triton.ModelMetadata(messages.ModelMetadataRequest(name=model))
        return [one.name for one in metadata.inputs], [one.name for one in metadata.outputs]

    assert names("smooth_l1") == (["INPUT", "TARGET"], ["LOSS", "COUNT"])
    assert names("smooth_l1_grad") == (["INPUT", "TARGET"], ["LOSS", "COUNT", "GRAD"])
    assert names("huber_masked") == (["INPUT", "TARGET", "WEIGHT", "MASK"], ["LOSS", "COUNT"])
    assert names("huber_masked_grad") == (["INPUT", "TARGET", "WEIGHT", "MASK"], ["LOSS", "COUNT", "GRAD"])


@pytest.mark.parametrize(("model", "parameter"), [("smooth_l1", "beta"), ("huber", "delta"), ("mse", None)])
def test_the_configuration_tells_what_parameters_are_where_none_are_sent(
    triton: Any, model: str, parameter: str | None
) -> None:
    config = triton.ModelConfig(messages.ModelConfigRequest(name=model)).config
    texts = {name: value.string_value for name, value in config.parameters.items()}
    assert texts.pop("denominator")
    assert texts == {"reduction": "sample_mean", "gradient_scale": "1", **({parameter: "1"} if parameter else {})}
    explicit = infer(triton, infer_request(model, pair(3, 4), parameters=texts))
    implicit = infer(triton, infer_request(model, pair(3, 4)))
    assert explicit["LOSS"].tobytes() == implicit["LOSS"].tobytes()


@pytest.mark.parametrize(
    ("device", "kind", "gpus"), [("cpu", "KIND_CPU", []), ("cuda:0", "KIND_GPU", [0]), ("cuda:3", "KIND_GPU", [3])]
)
def test_the_configuration_names_the_device(device: str, kind: str, gpus: list[int]) -> None:
    config = configuration(MODELS["mse"], device=device, max_rows=8, max_queued_requests=5).config
    (group,) = config.instance_group
    assert group.Kind.Name(group.kind) == kind
    assert list(group.gpus) == gpus
    assert (config.max_batch_size, config.dynamic_batching.default_queue_policy.max_queue_size) == (8, 5)


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
@pytest.mark.parametrize(("name", "version"), [("resnet", ""), ("mse", "7")])
def test_a_model_that_is_not_there_is_not_found(triton: Any, method: str, name: str, version: str) -> None:
    request = getattr(messages, f"{method}Request")(name=name, version=version)
    error = failure(getattr(triton, method), request)
    assert (error.code, error.info.reason) == (5, "UNKNOWN_MODEL")
    assert (name if name == "resnet" else version) in error.message


# ---- What is told and not changed, and what is not done ----


def test_models_are_neither_loaded_nor_unloaded(triton: Any) -> None:
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        error = failure(getattr(triton, method), getattr(messages, f"{method}Request")(model_name="mse"))
        assert (error.code, error.info.reason) == (12, "UNIMPLEMENTED")


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR])
def test_log_settings_are_told_and_not_changed(triton: Any, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(level, logger="lossgrad_server"):
        settings = triton.LogSettings(messages.LogSettingsRequest()).settings
    assert settings["log_error"].bool_param
    assert settings["log_info"].bool_param is (level <= logging.INFO)
    assert settings["log_verbose_level"].uint32_param == (1 if level == logging.DEBUG else 0)
    request = messages.LogSettingsRequest()
    request.settings["log_info"].bool_param = False
    assert failure(triton.LogSettings, request).code == 12


def test_trace_settings_are_told_and_not_changed(triton: Any) -> None:
    assert list(triton.TraceSetting(messages.TraceSettingRequest()).settings["trace_level"].value) == ["OFF"]
    request = messages.TraceSettingRequest(model_name="mse")
    assert list(triton.TraceSetting(request).settings["trace_level"].value) == ["OFF"]
    request.settings["trace_level"].value.append("TIMESTAMPS")
    assert failure(triton.TraceSetting, request).code == 12
    assert failure(triton.TraceSetting, messages.TraceSettingRequest(model_name="resnet")).code == 5


def test_a_server_that_shares_no_memory_says_so_and_has_no_regions(triton: Any) -> None:
    for kind in ("System", "Cuda"):
        status = getattr(triton, f"{kind}SharedMemoryStatus")
        assert not status(getattr(messages, f"{kind}SharedMemoryStatusRequest")()).regions
        # perf_analyzer and Triton's examples begin with this, and stop where it fails.
        getattr(triton, f"{kind}SharedMemoryUnregister")(getattr(messages, f"{kind}SharedMemoryUnregisterRequest")())
        register = getattr(messages, f"{kind}SharedMemoryRegisterRequest")(name="r", byte_size=8)
        error = failure(getattr(triton, f"{kind}SharedMemoryRegister"), register)
        assert (error.code, error.info.reason) == (12, "SHARED_MEMORY_OFF")


@pytest.mark.parametrize("method", [name for name in ALL_METHODS if name != "ModelStreamInfer"])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x02\xff\xff"], ids=["no message", "no text"])
def test_bytes_that_are_no_message_are_refused_by_every_method(
    server: RunningServer, connect: Connect, method: str, data: bytes
) -> None:
    call: Callable[..., Any] = connect(server.address).unary_unary(f"/inference.GRPCInferenceService/{method}")
    if data != b"\xff" and method.startswith("Server"):
        assert call(data, timeout=PATIENCE_SECONDS)  # the field is not one of the message's, and is ignored
        return
    error = failure(call, data)
    assert (error.code, error.info.reason) == (3, "MALFORMED_MESSAGE")


def test_a_message_of_more_than_a_header_is_refused_unread(server: RunningServer, connect: Connect) -> None:
    call: Callable[..., Any] = connect(server.address).unary_unary("/inference.GRPCInferenceService/ServerLive")
    error = failure(call, bytes(70_000))
    assert (error.code, error.info.reason) == (3, "HEADER_TOO_LARGE")


# ---- Beside the native service ----


def test_without_the_setting_there_is_no_such_service(start_server: StartServer, connect: Connect) -> None:
    stub = stub_on(connect(start_server(open_inference=False).address))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ServerLive(messages.ServerLiveRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_metrics_of_a_method_begin_with_its_first_call(start_server: StartServer, connect: Connect) -> None:
    """Twenty methods that most servers never see must not fill every scrape."""
    running = start_server(metrics_port=0)
    assert "GRPCInferenceService" not in running.scrape()
    stub = stub_on(connect(running.address))
    infer(stub, infer_request("huber_grad", pair(2, 3)))
    list(stub.ModelStreamInfer(iter([infer_request("mse", pair(2, 3)), infer_request("resnet", {})])))
    text = running.scrape()
    ok = 'grpc_code="OK",grpc_method="{}",grpc_service="inference.GRPCInferenceService",grpc_type="{}"} 1.0'
    assert "grpc_server_handled_total{" + ok.replace("{}", "ModelInfer", 1).replace("{}", "unary") in text
    assert "grpc_server_handled_total{" + ok.replace("{}", "ModelStreamInfer", 1).replace("{}", "bidi_stream") in text
    for labels in (
        'api="open_inference",loss="huber",mode="loss_grad",outcome="ok"',
        'api="open_inference_stream",loss="mse",mode="loss",outcome="ok"',
        'api="open_inference_stream",loss="unknown",mode="unknown",outcome="invalid"',
    ):
        assert f"lossgrad_requests_total{{{labels}}} 1.0" in text


@pytest.mark.parametrize("is_served", [True, False])
def test_reflection_describes_both_services(start_server: StartServer, connect: Connect, is_served: bool) -> None:
    running = start_server(reflection=True, open_inference=is_served, worker=HeldWorker())
    stub = reflection_pb2_grpc.ServerReflectionStub(connect(running.address))  # type: ignore[no-untyped-call]
    ask = reflection_pb2.ServerReflectionRequest
    services = ["lossgrad_api.v1.LossService", "inference.GRPCInferenceService"]
    requests = [ask(list_services=""), *(ask(file_containing_symbol=name) for name in services)]
    listed, native, triton = stub.ServerReflectionInfo(iter(requests), timeout=PATIENCE_SECONDS)
    assert {services[0]} <= {one.name for one in listed.list_services_response.service}
    assert (services[1] in {one.name for one in listed.list_services_response.service}) is is_served
    assert "lossgrad_api/v1/tensor.proto" in files_of(native)
    assert ("inference/model_config.proto" in files_of(triton)) is is_served
    assert triton.HasField("error_response") is not is_served


def files_of(answer: Any) -> set[str]:
    files = answer.file_descriptor_response.file_descriptor_proto
    return {descriptor_pb2.FileDescriptorProto.FromString(file).name for file in files}
