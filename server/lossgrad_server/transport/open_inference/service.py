"""The handlers of inference.GRPCInferenceService, written against `Call` and bytes; they see no grpcio.

What each of the twenty methods does is in docs/open-inference.md; the work itself is in infer.py and stream.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final

from lossgrad_api.inference import SERVICE, messages, pool
from lossgrad_api.wire import CodecError
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.transport.call import Call, Method, Send, UnaryHandler
from lossgrad_server.transport.open_inference import stream
from lossgrad_server.transport.open_inference.codec import parse
from lossgrad_server.transport.open_inference.infer import InferRequests, PendingInfer, malformed
from lossgrad_server.transport.open_inference.models import MODELS, VERSION, configuration, find_model, metadata
from lossgrad_server.transport.open_inference.regions import NoRegions, SharedMemoryRegions
from lossgrad_server.transport.open_inference.statistics import Statistics
from lossgrad_server.transport.open_inference.stream import InferStream
from lossgrad_server.transport.pipeline import Answer, RequestPipeline, joined

API: Final = "open_inference"

NAME: Final = "lossgrad"

# A row is at least a two-byte element of INPUT and one of TARGET.
_LEAST_ROW_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class OpenInferenceDescription:
    """What the service tells about the server, and its limits."""

    server_version: str
    device: str
    max_message_bytes: int
    max_queued_requests: int
    max_stream_requests: int


class OpenInferenceService:
    """Serves the losses as models, through the pipeline that the native service uses too."""

    def __init__(
        self,
        pipeline: RequestPipeline,
        description: OpenInferenceDescription,
        *,
        is_ready: Callable[[], bool],
        regions: SharedMemoryRegions | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._description = description
        self._is_ready = is_ready
        self._regions = regions or NoRegions()
        self.statistics = Statistics()
        self._requests = InferRequests(pipeline, self._regions, self.statistics, description.max_message_bytes)

    def methods(self) -> list[Method]:
        """Return the service's methods."""
        handlers: dict[str, Callable[[Any, Call], Any]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_change,
            "RepositoryModelUnload": self._repository_change,
            "SystemSharedMemoryStatus": self._system_status,
            "SystemSharedMemoryRegister": self._system_register,
            "SystemSharedMemoryUnregister": self._system_unregister,
            "CudaSharedMemoryStatus": self._cuda_status,
            "CudaSharedMemoryRegister": self._cuda_register,
            "CudaSharedMemoryUnregister": self._cuda_unregister,
            "TraceSetting": self._trace_setting,
            "LogSettings": self._log_settings,
        }
        methods: list[Method] = []
        for method in pool().FindServiceByName(SERVICE).methods:
            name = f"/{SERVICE}/{method.name}"
            if method.name == "ModelInfer":
                methods.append(Method(name, unary=self.model_infer, is_occasional=True, api=API))
            elif method.name == "ModelStreamInfer":
                methods.append(Method(name, stream=self.model_stream_infer, is_occasional=True, api=stream.API))
            else:
                handler = _with_messages(method.input_type.name, handlers[method.name])
                methods.append(Method(name, unary=handler, is_occasional=True))
        return methods

    async def model_infer(self, data: bytes, call: Call) -> bytes:
        """Answer a ModelInferRequest with a ModelInferResponse."""
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def on_answer(_: PendingInfer, answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        request = self._requests.open(data, call, api=API, on_answer=on_answer)
        if await request.prepare():
            self._pipeline.submit([request])
        try:
            answer = await answered
        except asyncio.CancelledError:
            request.abandon()
            raise
        if isinstance(answer, RequestError):
            answer.request_id = request.request_id.decode()
            raise answer
        return await joined(answer, API, self._pipeline.metrics)

    async def model_stream_infer(self, requests: AsyncIterator[bytes], send: Send, call: Call) -> None:
        """Answer ModelInferRequests with ModelStreamInferResponses, in their order."""
        stream = InferStream(
            self._requests,
            send,
            max_requests=self._description.max_stream_requests,
            max_bytes=self._description.max_message_bytes,
        )
        await stream.run(requests, call)

    # --- server and models ---

    def _server_live(self, request: Any, call: Call) -> Any:
        return messages().ServerLiveResponse(live=True)

    def _server_ready(self, request: Any, call: Call) -> Any:
        return messages().ServerReadyResponse(ready=self._is_ready())

    def _model_ready(self, request: Any, call: Call) -> Any:
        is_ours = request.name in MODELS and request.version in ("", VERSION)
        return messages().ModelReadyResponse(ready=is_ours and self._is_ready())

    def _server_metadata(self, request: Any, call: Call) -> Any:
        extensions = ["model_configuration", "binary_tensor_data", "parameters", "schedule_policy", "statistics"]
        extensions += [f"{kind}_shared_memory" for kind in self._regions.kinds]
        return messages().ServerMetadataResponse(
            name=NAME, version=self._description.server_version, extensions=extensions
        )

    def _model_metadata(self, request: Any, call: Call) -> Any:
        return metadata(find_model(request.name, request.version))

    def _model_config(self, request: Any, call: Call) -> Any:
        return configuration(
            find_model(request.name, request.version),
            device=self._description.device,
            max_rows=self._description.max_message_bytes // _LEAST_ROW_BYTES,
            max_queued_requests=self._description.max_queued_requests,
        )

    def _model_statistics(self, request: Any, call: Call) -> Any:
        model = find_model(request.name, request.version) if request.name else None
        return self.statistics.message(model)

    def _repository_index(self, request: Any, call: Call) -> Any:
        is_ready = self._is_ready()
        state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "the server is warming up or shutting down")
        names = MODELS if is_ready or not request.ready else ()
        return messages().RepositoryIndexResponse(
            models=[{"name": name, "version": VERSION, "state": state, "reason": reason} for name in names]
        )

    def _repository_change(self, request: Any, call: Call) -> Any:
        raise _unimplemented("the models of this server are its losses: all are there, and none is loaded or unloaded")

    # --- shared memory ---

    def _system_status(self, request: Any, call: Call) -> Any:
        response = messages().SystemSharedMemoryStatusResponse()
        for region in self._regions.system_regions(self._regions.owner(call), request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    def _system_register(self, request: Any, call: Call) -> Any:
        owner = self._regions.owner(call)
        self._regions.register_system(owner, request.name, request.key, request.offset, request.byte_size)
        return messages().SystemSharedMemoryRegisterResponse()

    def _system_unregister(self, request: Any, call: Call) -> Any:
        self._regions.unregister_system(self._regions.owner(call), request.name)
        return messages().SystemSharedMemoryUnregisterResponse()

    def _cuda_status(self, request: Any, call: Call) -> Any:
        response = messages().CudaSharedMemoryStatusResponse()
        for region in self._regions.cuda_regions(self._regions.owner(call), request.name):
            status = response.regions[region.name]
            status.name, status.device_id, status.byte_size = region.name, region.device_id, region.byte_size
        return response

    async def _cuda_register(self, request: Any, call: Call) -> Any:
        owner = self._regions.owner(call)
        registering = self._regions.register_cuda(
            owner, request.name, request.raw_handle, request.device_id, request.byte_size
        )
        if registering is not None:
            await registering
        return messages().CudaSharedMemoryRegisterResponse()

    def _cuda_unregister(self, request: Any, call: Call) -> Any:
        self._regions.unregister_cuda(self._regions.owner(call), request.name)
        return messages().CudaSharedMemoryUnregisterResponse()

    # --- settings: told, and not changed by callers ---

    def _trace_setting(self, request: Any, call: Call) -> Any:
        if request.model_name:
            find_model(request.model_name, "")
        if request.settings:
            raise _unimplemented("this server traces nothing on a caller's behalf; send no settings to read them")
        return messages().TraceSettingResponse(settings={"trace_level": {"value": ["OFF"]}})

    def _log_settings(self, request: Any, call: Call) -> Any:
        if request.settings:
            raise _unimplemented(
                "callers cannot change what this server logs; send no settings to read them, and restart it with "
                "--log-level to change them"
            )
        level = logging.getLogger(__name__).getEffectiveLevel()
        return messages().LogSettingsResponse(
            settings={
                "log_error": {"bool_param": level <= logging.ERROR},
                "log_warning": {"bool_param": level <= logging.WARNING},
                "log_info": {"bool_param": level <= logging.INFO},
                "log_verbose_level": {"uint32_param": int(level <= logging.DEBUG)},
                "log_file": {"string_param": ""},
                "log_format": {"string_param": "default"},
            }
        )


def _with_messages(request_name: str, handler: Callable[[Any, Call], Any]) -> UnaryHandler:
    """Return a handler of bytes that gives a handler of messages what it wants."""

    async def serve(data: bytes, call: Call) -> bytes:
        try:
            request = parse(request_name, data)
        except CodecError as error:
            raise malformed(error) from None
        response = handler(request, call)
        if isawaitable(response):
            response = await response
        serialized: bytes = response.SerializeToString()
        return serialized

    return serve


def _unimplemented(message: str) -> RequestError:
    return RequestError(message, code=Code.UNIMPLEMENTED, reason=Reason.UNIMPLEMENTED)
