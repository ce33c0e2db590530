"""Tensors in shared memory, over regions that a test keeps itself: what the service asks of SharedMemoryRegions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pytest

from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError
from lossgrad_server.transport.call import Call
from lossgrad_server.transport.open_inference.regions import CudaRegion, RegionView, SystemRegion
from lossgrad_server.transport.open_inference.service import OpenInferenceDescription, OpenInferenceService
from lossgrad_server.work import Buffer
from tests.server.open_inference.asking import (
    MODEL_INFER,
    Array,
    infer_request,
    messages,
    outputs_of,
    pair,
    set_parameters,
)
from tests.server.serving import HeldWorker, RunningServer, StartServer

PREFIX = "/inference.GRPCInferenceService/"


class Part:
    """A part of a region of a test, which counts what becomes of it."""

    is_direct = True
    executor = None

    def __init__(self, regions: Regions, memory: memoryview) -> None:
        self._regions = regions
        self.memory = memory
        self.written = 0

    def write(self, data: Buffer) -> None:
        self._regions.writes += 1
        self.memory[: len(data)] = data

    def release(self) -> None:
        self._regions.held -= 1
        if self._regions.is_gone:
            raise InvalidRequest("the region went away", reason=Reason.BAD_REGION)


class Regions:
    """Regions that are bytearrays of the test."""

    kinds = ("system", "cuda")

    def __init__(self, **regions: bytearray) -> None:
        self.regions = regions
        self.held = 0
        self.views = 0
        self.writes = 0
        self.is_gone = False
        self.calls: list[tuple[Any, ...]] = []

    def owner(self, call: Call) -> str:
        return call.peer

    def register_system(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        self.calls.append(("register_system", owner, name, key, offset, byte_size))

    def unregister_system(self, owner: str, name: str) -> None:
        self.calls.append(("unregister_system", owner, name))

    def system_regions(self, owner: str, name: str) -> Sequence[SystemRegion]:
        return [SystemRegion("r", "/r", 8, 1 << 40)]

    def register_cuda(self, owner: str, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        self.calls.append(("register_cuda", owner, name, raw_handle, device_id, byte_size))

    def unregister_cuda(self, owner: str, name: str) -> None:
        self.calls.append(("unregister_cuda", owner, name))

    def cuda_regions(self, owner: str, name: str) -> Sequence[CudaRegion]:
        return [CudaRegion("g", 2, 1 << 40)]

    def view(self, owner: str, name: str, offset: int, byte_size: int, *, writable: bool) -> RegionView:
        assert owner == "inproc"
        if name not in self.regions:
            raise RequestError(f"no {name}", code=Code.NOT_FOUND, reason=Reason.UNKNOWN_REGION)
        memory = memoryview(self.regions[name])[offset : offset + byte_size]
        self.held += 1
        self.views += 1
        return Part(self, memory if writable else memory.toreadonly())

    def close(self) -> NoReturn:
        raise AssertionError("nobody closes these")


class InProcess:
    """A call of the test's own."""

    method = MODEL_INFER
    metadata: Mapping[str, str | bytes] = {}
    deadline = None
    peer = "inproc"
    begun_ns = 0


def service_of(running: RunningServer, regions: Regions) -> OpenInferenceService:
    description = OpenInferenceDescription("0", "cpu", 1 << 28, 100, 100)
    pipeline = running.server._core.pipeline
    return OpenInferenceService(pipeline, description, is_ready=lambda: True, regions=regions)


def ask(running: RunningServer, regions: Regions, request: Any) -> Any:
    """Call ModelInfer of a service with these regions."""
    service = service_of(running, regions)
    return messages.ModelInferResponse.FromString(
        running.run(service.model_infer(request.SerializeToString(), InProcess()))
    )


def place(tensor: Any, region: str, size: int, offset: int = 0) -> None:
    set_parameters(tensor.parameters, {"shared_memory_region": region, "shared_memory_byte_size": size})
    if offset:  # as clients have it: a zero is left out
        tensor.parameters["shared_memory_offset"].int64_param = offset


def shared_request(model: str, inputs: dict[str, Array], shared: Sequence[str], outputs: Sequence[str] = ()) -> Any:
    """Return a request whose `shared` inputs are in the region "in", 16 bytes apart, and `outputs` to be in "out"."""
    request = infer_request(model, inputs)
    del request.raw_input_contents[:]
    offset = 16
    for one in request.inputs:
        if one.name in shared:
            place(one, "in", inputs[one.name].nbytes, offset)
            offset += inputs[one.name].nbytes + 16
        else:
            request.raw_input_contents.append(inputs[one.name].tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return request


def region_with(inputs: dict[str, Array], shared: Sequence[str]) -> bytearray:
    return bytearray(b"".join(bytes(16) + inputs[name].tobytes() for name in inputs if name in shared))


@pytest.mark.parametrize(
    "shared", [["INPUT", "TARGET"], ["INPUT"], ["TARGET"], ["WEIGHT", "TARGET"], ["MASK"]], ids=str
)
def test_inputs_in_regions_and_in_the_message_mix(server: RunningServer, shared: list[str]) -> None:
    inputs = pair(3, 40) | {"WEIGHT": pair(3, 40, seed=8)["INPUT"], "MASK": pair(3, 40, seed=9)["INPUT"] > 0}
    regions = Regions(**{"in": region_with(inputs, shared)})
    expected = outputs_of(ask(server, regions, infer_request("huber_masked_grad", inputs)))
    request = shared_request("huber_masked_grad", inputs, shared)
    for _ in range(2):  # the second time from memory
        outputs = outputs_of(ask(server, regions, request))
        assert {name: one.tobytes() for name, one in outputs.items()} == {
            name: one.tobytes() for name, one in expected.items()
        }
    assert (regions.held, regions.views) == (0, 2 * len(shared))


def test_an_output_in_a_region_is_written_there_and_leaves_an_empty_entry(server: RunningServer) -> None:
    inputs = pair(2, 50)
    expected = outputs_of(ask(server, Regions(), infer_request("smooth_l1_grad", inputs)))
    regions = Regions(out=bytearray(b"\xaa" * 1000))
    request = infer_request("smooth_l1_grad", inputs)
    for name, offset, size in (("LOSS", 0, 8), ("COUNT", 8, 20), ("GRAD", 100, 500)):
        place(request.outputs.add(name=name), "out", size, offset)
    response = ask(server, regions, request)
    assert list(response.raw_output_contents) == [b"", b"", b""]
    assert [(one.name, tuple(one.shape)) for one in response.outputs] == [
        ("LOSS", (2, 1)), ("COUNT", (2, 1)), ("GRAD", (2, 50)),
    ]  # fmt: skip
    out = bytes(regions.regions["out"])
    assert out[:8] == expected["LOSS"].tobytes()
    assert out[8:24] == expected["COUNT"].tobytes()
    assert out[24:100] == b"\xaa" * 76
    assert out[100:500] == expected["GRAD"].tobytes()
    assert out[500:] == b"\xaa" * 500  # a place may be larger than what it holds
    assert regions.held == 0


def test_the_gradient_may_take_the_place_of_its_input(server: RunningServer) -> None:
    inputs = pair(2, 5000)
    expected = outputs_of(ask(server, Regions(), infer_request("mse_grad", inputs)))
    regions = Regions(**{"in": region_with(inputs, ["INPUT", "TARGET"])})
    request = shared_request("mse_grad", inputs, ["INPUT", "TARGET"], ["LOSS"])
    place(request.outputs.add(name="GRAD"), "in", 40_000, 16)
    response = ask(server, regions, request)
    assert response.raw_output_contents[0] == expected["LOSS"].tobytes()
    assert bytes(regions.regions["in"][16:40_016]) == expected["GRAD"].tobytes()
    assert bytes(regions.regions["in"][40_032:]) == inputs["TARGET"].tobytes()


def test_an_output_that_half_covers_an_input_is_written_after_the_computing(server: RunningServer) -> None:
    inputs = pair(2, 5000)
    expected = outputs_of(ask(server, Regions(), infer_request("mse_grad", inputs)))
    regions = Regions(**{"in": region_with(inputs, ["INPUT", "TARGET"])})
    request = shared_request("mse_grad", inputs, ["INPUT", "TARGET"], ["LOSS"])
    place(request.outputs.add(name="GRAD"), "in", 40_000, 20_000)
    assert ask(server, regions, request).raw_output_contents[0] == expected["LOSS"].tobytes()
    assert bytes(regions.regions["in"][20_000:60_000]) == expected["GRAD"].tobytes()


def test_the_worker_is_told_where_outputs_are_wanted(start_server: StartServer) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    seen: list[tuple[Buffer | None, ...]] = []
    compute = worker.run
    worker.run = lambda items: (seen.extend(item.destinations for item in items), compute(items))[1]  # type: ignore[method-assign, func-returns-value]
    regions = Regions(**{"in": bytearray(2000), "out": bytearray(2000)})
    inputs = pair(2, 50)

    def destinations(*placed: tuple[str, str, int], parameters: Mapping[str, str] | None = None) -> list[int | None]:
        request = shared_request("l1_grad", inputs, ["INPUT", "TARGET"])
        set_parameters(request.parameters, parameters or {})
        for name, region, offset in placed:
            place(request.outputs.add(name=name), region, 400, offset)
        seen.clear()
        ask(running, regions, request)
        return [None if one is None else len(one) for one in seen[0]]

    assert destinations(("GRAD", "out", 0)) == [None, 400]  # of the job's two tensors, the row losses come first
    assert destinations(("LOSS", "out", 400), ("GRAD", "out", 0)) == [8, 400]
    assert destinations(("GRAD", "in", 16)) == [None, 400]  # the very bytes of INPUT
    assert destinations(("GRAD", "in", 20)) == []  # half of them
    assert destinations(("LOSS", "out", 0), ("GRAD", "out", 4)) == [8, None]  # one over the other
    assert destinations(("COUNT", "out", 0)) == []  # not of the worker's making
    assert destinations(("LOSS", "out", 0), parameters={"reduction": "mean"}) == []
    assert destinations() == []


def test_views_are_released_whatever_becomes_of_the_request(start_server: StartServer) -> None:
    worker = HeldWorker()
    running = start_server(worker=worker)
    inputs = pair(2, 5)
    regions = Regions(**{"in": region_with(inputs, ["INPUT", "TARGET"])})
    request = shared_request("mse_grad", inputs, ["INPUT", "TARGET"])
    place(request.outputs.add(name="GRAD"), "out", 40)
    with pytest.raises(RequestError, match="no out"):  # its last view is refused
        ask(running, regions, request)
    assert (regions.held, regions.views) == (0, 2)
    regions.regions["out"] = bytearray(40)
    worker.failure = RuntimeError("a fault of the worker")
    with pytest.raises(RequestError) as caught:
        ask(running, regions, request)
    assert caught.value.code == Code.INTERNAL
    assert (regions.held, regions.views) == (0, 5)
    worker.failure = None
    running.server._core.pipeline.is_warm = False
    with pytest.raises(RequestError, match="warming up"):
        ask(running, regions, request)
    assert (regions.held, regions.views) == (0, 8)


def test_a_result_over_memory_that_went_away_is_an_error(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = pair(2, 5)
    regions = Regions(**{"in": region_with(inputs, ["INPUT", "TARGET"])})
    regions.is_gone = True
    with caplog.at_level(logging.ERROR), pytest.raises(RequestError, match="the region went away") as caught:
        ask(server, regions, shared_request("mse", inputs, ["INPUT", "TARGET"]))
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert not caplog.records  # the caller's fault, not ours
    assert regions.held == 0


def test_the_methods_of_shared_memory_reach_the_regions(server: RunningServer) -> None:
    regions = Regions()
    methods = {one.name: one for one in service_of(server, regions).methods()}

    def call(name: str, /, **fields: Any) -> Any:
        handler = methods[PREFIX + name].unary
        assert handler is not None
        request = getattr(messages, f"{name}Request")(**fields)

        async def answer() -> bytes:
            return await handler(request.SerializeToString(), InProcess())

        data = server.run(answer())
        return getattr(messages, f"{name}Response").FromString(data)

    call("SystemSharedMemoryRegister", name="r", key="/r", offset=8, byte_size=64)
    call("SystemSharedMemoryUnregister", name="r")
    call("CudaSharedMemoryRegister", name="g", raw_handle=b"handle", device_id=2, byte_size=64)
    call("CudaSharedMemoryUnregister")
    assert regions.calls == [
        ("register_system", "inproc", "r", "/r", 8, 64),
        ("unregister_system", "inproc", "r"),
        ("register_cuda", "inproc", "g", b"handle", 2, 64),
        ("unregister_cuda", "inproc", ""),
    ]
    system = call("SystemSharedMemoryStatus").regions["r"]
    assert (system.name, system.key, system.offset, system.byte_size) == ("r", "/r", 8, 1 << 40)
    cuda = call("CudaSharedMemoryStatus").regions["g"]
    assert (cuda.name, cuda.device_id, cuda.byte_size) == ("g", 2, 1 << 40)
    assert set(call("ServerMetadata").extensions) >= {"system_shared_memory", "cuda_shared_memory"}


def test_an_empty_tensor_in_a_region_is_taken(server: RunningServer) -> None:
    inputs = {name: np.zeros((0, 4), "<f4") for name in ("INPUT", "TARGET")}
    regions = Regions(**{"in": bytearray(100)})
    outputs = outputs_of(ask(server, regions, shared_request("mse_grad", inputs, ["INPUT", "TARGET"])))
    assert outputs["GRAD"].shape == (0, 4)
    assert regions.held == 0
