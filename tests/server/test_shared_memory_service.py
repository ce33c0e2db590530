"""ComputeLoss over shared memory, called with the generated stubs: the same bits as over the wire, and every refusal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from lossgrad_api.v1.tensor_pb2 import SharedMemory, Tensor
from lossgrad_server.shared_memory.segments import why_impossible
from lossgrad_server.work import BatchResult, WorkItem
from tests.server.calling import Connect, answers_by_tag, failure, message, results_of, stub_on
from tests.server.requests import L1, SMOOTH_L1, request, tensor
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually
from tests.server.sharing import Caller, Region, offer_of

MIB = 1 << 20
MAPS = Path("/proc/self/maps")
NONE = pb.LossSpec(huber=pb.HuberLoss(delta=0.7), reduction=pb.REDUCTION_NONE, include_gradient=True)
ROWS = pb.LossSpec(mse=pb.MseLoss(), reduction=pb.REDUCTION_SAMPLE_MEAN, include_gradient=True)


@pytest.fixture(scope="module", params=["fused", "plain"])
def sharing(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    if reason := why_impossible():
        pytest.skip(reason)
    with RunningServer(allow_shared_memory=True, engine=request.param) as running:
        yield running


@pytest.fixture
def stub(sharing: RunningServer, connect: Connect) -> LossServiceStub:
    return stub_on(connect(sharing.address))


@pytest.fixture
def caller(stub: LossServiceStub) -> Iterator[Caller]:
    with Caller(offer_of(stub).socket) as caller:
        yield caller


@pytest.fixture
def region(caller: Caller) -> Region:
    return caller.region(64 * MIB)


def compute(stub: LossServiceStub, one: pb.ComputeLossRequest) -> pb.ComputeLossResponse:
    answer: pb.ComputeLossResponse = stub.ComputeLoss(one, timeout=PATIENCE_SECONDS)
    return answer


def shared(one: pb.ComputeLossRequest, region: Region) -> pb.ComputeLossRequest:
    """Return a request whose tensors are in a region, and whose answer's are wanted behind them."""
    result = pb.ComputeLossRequest()
    result.CopyFrom(one)
    end = 0
    for name in ("input", "target", "weight", "mask"):
        if one.HasField(name):
            data = getattr(one, name)
            getattr(result, name).CopyFrom(region.tensor(end, data))
            end += -(-len(data.data) // 64) * 64
    result.outputs.CopyFrom(region.place(end, region.byte_count - end))
    return result


def with_data(answer: pb.ComputeLossResponse, place: SharedMemory, region: Region) -> pb.ComputeLossResponse:
    """Return an answer with the tensors' bytes from where they were wanted."""
    result = pb.ComputeLossResponse()
    result.CopyFrom(answer)
    end = place.offset
    for one in result.results:
        for name in ("tensor", "target_gradient", "input_gradient"):
            if one.HasField(name):
                field: Tensor = getattr(one, name)
                assert not field.data
                size = int(np.prod(tuple(field.shape), dtype=np.int64)) * {1: 2, 2: 2, 3: 4, 4: 8}[field.data_type]
                end = place.offset + -(-(end - place.offset) // 64) * 64
                field.data = region.memory[end : end + size]
                end += size
    return result


def pair(*shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=shape), random.normal(size=shape)


REQUESTS: dict[str, Callable[[], pb.ComputeLossRequest]] = {
    "scalar only": lambda: request(*pair(100), L1),
    "gradient": lambda: request(*pair(1000), SMOOTH_L1),
    "odd sizes": lambda: request(*pair(3, 7), SMOOTH_L1, NONE, ROWS),
    "large, in pieces": lambda: request(*pair(3, 700_001), SMOOTH_L1, NONE),
    "float64": lambda: request(*pair(40, 50), SMOOTH_L1, NONE, dtype="float64"),
    "float16": lambda: request(*pair(40, 50), SMOOTH_L1, NONE, dtype="float16"),
    "weight and mask": lambda: request(*pair(8, 50), SMOOTH_L1, ROWS, weight=pair(8, 50)[0] ** 2, mask=pair(8, 50)[1] > 0),
    "broadcast": lambda: request(pair(40, 50)[0], pair(1, 50)[1], SMOOTH_L1, NONE, allow_broadcast=True),
    "mixed types": lambda: request(tensor(pair(9)[0], "float16"), tensor(pair(9)[1], "float64"), SMOOTH_L1, NONE),
    "integer target": lambda: request(tensor(pair(9)[0]), tensor(np.arange(9), "int64"), SMOOTH_L1),
    "empty": lambda: request(np.zeros((0, 3)), np.zeros((0, 3)), SMOOTH_L1, NONE),
    "0-d": lambda: request(1.5, 0.25, SMOOTH_L1, NONE),
    "NaN": lambda: request([np.nan, np.inf, 1.0], [0.0, 0.0, 0.0], SMOOTH_L1, NONE),
    "named": lambda: request(*pair(9), SMOOTH_L1, idempotency_key="mine"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_the_bits_are_those_of_the_wire(name: str, stub: LossServiceStub, region: Region) -> None:
    one = REQUESTS[name]()
    expected = compute(stub, one)
    wanted = shared(one, region)
    for _ in range(2):
        answer = compute(stub, wanted)
        assert results_of(with_data(answer, wanted.outputs, region)) == results_of(expected)
    assert answer.idempotency_key == one.idempotency_key
    for operand in ("input", "target", "weight", "mask"):
        if one.HasField(operand):
            place = getattr(wanted, operand).shared_memory
            assert region.memory[place.offset : place.offset + place.byte_count] == getattr(one, operand).data


def test_some_tensors_may_be_shared_and_others_not(stub: LossServiceStub, region: Region) -> None:
    one = request(*pair(50, 60), SMOOTH_L1, weight=pair(50, 60)[0] ** 2)
    expected = results_of(compute(stub, one))
    for names in (("input",), ("target", "weight")):
        mixed = pb.ComputeLossRequest()
        mixed.CopyFrom(one)
        for index, name in enumerate(names):
            getattr(mixed, name).CopyFrom(region.tensor(index * MIB, getattr(one, name)))
        assert results_of(compute(stub, mixed)) == expected
    mixed.CopyFrom(one)
    mixed.outputs.CopyFrom(region.place(8, MIB))
    assert results_of(with_data(compute(stub, mixed), mixed.outputs, region)) == expected


@pytest.mark.parametrize("shape", [(30, 40), (3, 700_001)], ids=["small", "in pieces"])
@pytest.mark.parametrize("first", ["the input", "the target", "both in part"])
def test_the_gradient_may_be_put_over_the_operands(
    stub: LossServiceStub, region: Region, shape: tuple[int, ...], first: str
) -> None:
    x, y = pair(*shape)
    x[0, :2] = np.nan, np.inf  # such a chunk is read twice
    one = request(x, y, SMOOTH_L1, pb.LossSpec(l1=pb.L1Loss(), include_gradient=True, gradient_scale=-2.0))
    expected = compute(stub, one)
    size = len(one.input.data)
    wanted = shared(one, region)
    offset = {"the input": 0, "the target": wanted.target.shared_memory.offset, "both in part": size // 2 // 8 * 8}[
        first
    ]
    wanted.outputs.CopyFrom(region.place(offset, 2 * size + 4096))
    answer = compute(stub, wanted)
    assert results_of(with_data(answer, wanted.outputs, region)) == results_of(expected)


def test_a_stream_takes_them_too_and_one_bad_place_fails_alone(stub: LossServiceStub, region: Region) -> None:
    one = request(*pair(300, 400), SMOOTH_L1)
    good, bad = shared(one, region), shared(one, region)
    bad.target.shared_memory.region = bytes(16)
    sent = message(good, bad, one)
    answers = answers_by_tag(list(stub.StreamComputeLoss(iter([sent]), timeout=PATIENCE_SECONDS)))
    expected = results_of(answers[2].response)
    assert results_of(with_data(answers[0].response, good.outputs, region)) == expected
    assert answers[1].error.code == grpc.StatusCode.NOT_FOUND.value[0]


def change(field: str, **values: int | bytes) -> Callable[[pb.ComputeLossRequest], None]:
    def apply(one: pb.ComputeLossRequest) -> None:
        place = one.outputs if field == "outputs" else getattr(one, field).shared_memory
        for name, value in values.items():
            setattr(place, name, value)

    return apply


@pytest.mark.parametrize(
    ("apply", "code", "reason", "says"),
    [
        (change("input", region=b""), "NOT_FOUND", "UNKNOWN_REGION", "input is in a region"),
        (change("target", region=bytes(16)), "NOT_FOUND", "UNKNOWN_REGION", "target is in a region"),
        (change("outputs", region=b"x" * 16), "NOT_FOUND", "UNKNOWN_REGION", "outputs is in a region"),
        (change("input", offset=2**64 - 8), "INVALID_ARGUMENT", "BAD_REGION", "its region has 67108864 bytes"),
        (change("input", offset=2**64 - 1), "INVALID_ARGUMENT", "BAD_REGION", "its region has 67108864 bytes"),
        (change("input", offset=64 * MIB), "INVALID_ARGUMENT", "BAD_REGION", "input takes 4000 bytes from byte 67108864"),
        (change("input", offset=4), "INVALID_ARGUMENT", "BAD_REGION", "must be a multiple of 8"),
        (change("target", byte_count=2**64 - 1), "INVALID_ARGUMENT", "BAD_REGION", "target takes"),
        (change("target", byte_count=3996), "INVALID_ARGUMENT", "DATA_LENGTH_MISMATCH", "needs 4000"),
        (change("target", byte_count=0), "INVALID_ARGUMENT", "DATA_LENGTH_MISMATCH", "needs 4000"),
        (change("outputs", byte_count=3999), "INVALID_ARGUMENT", "BAD_REGION", "take 4000 bytes, outputs has 3999"),
        (change("outputs", offset=64 * MIB - 8, byte_count=4000), "INVALID_ARGUMENT", "BAD_REGION", "outputs takes 4000"),
        (change("outputs", offset=1), "INVALID_ARGUMENT", "BAD_REGION", "multiple of 8"),
        (lambda one: setattr(one.input, "data", b"1234"), "INVALID_ARGUMENT", "BAD_REGION", "and shared_memory as well"),
    ],
)  # fmt: skip
def test_a_bad_place_is_refused(
    stub: LossServiceStub,
    region: Region,
    apply: Callable[[pb.ComputeLossRequest], None],
    code: str,
    reason: str,
    says: str,
) -> None:
    one = shared(request(*pair(1000), SMOOTH_L1, idempotency_key="mine"), region)
    one.outputs.byte_count = 4000
    apply(one)
    error = failure(stub.ComputeLoss, one)
    assert grpc.StatusCode[code].value[0] == error.code
    assert error.info.reason == reason
    assert says in error.message
    assert error.info.metadata["request_id"] == "mine"
    assert region.token.hex() not in str(error.status)
    assert region.token not in error.status.SerializeToString()


def test_a_region_that_was_given_back_is_unknown(stub: LossServiceStub, caller: Caller) -> None:
    region = caller.region(MIB)
    one = shared(request(*pair(10), SMOOTH_L1), region)
    compute(stub, one)
    caller.ask(2, token=region.token)
    caller.region(8)  # answered once the release was read
    assert failure(stub.ComputeLoss, one).info.reason == "UNKNOWN_REGION"


def test_a_region_of_a_caller_that_is_gone_is_unknown(stub: LossServiceStub) -> None:
    with Caller(offer_of(stub).socket) as caller:
        one = shared(request(*pair(10), SMOOTH_L1), caller.region(MIB))
        compute(stub, one)
    eventually(lambda: failure_reason(stub, one) == "UNKNOWN_REGION")


def failure_reason(stub: LossServiceStub, one: pb.ComputeLossRequest) -> str:
    try:
        compute(stub, one)
    except grpc.RpcError:
        return failure(stub.ComputeLoss, one).info.reason
    return ""


def test_what_is_given_back_under_a_running_request_hurts_nobody(start_server: StartServer, connect: Connect) -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    worker = HeldWorker()
    running = start_server(worker=worker, allow_shared_memory=True)
    stub = stub_on(connect(running.address))
    with Caller(offer_of(stub).socket) as caller:
        region = caller.region(MIB)
        one = shared(request(*pair(1000), SMOOTH_L1), region)
        worker.hold()
        under_way = stub.ComputeLoss.future(one, timeout=PATIENCE_SECONDS)
        worker.wait_for_batch()
        caller.ask(2, token=region.token)
        caller.region(8)
        eventually(lambda: region.memory[0:8] == bytes(8))  # its pages are gone, and come back as zeros when touched
        worker.release()
        answer = under_way.result()
    assert answer.results[0].scalar == 0.0  # zeros against zeros
    assert answer.results[0].element_count == 1000


def test_results_are_copied_where_the_worker_left_them_elsewhere(start_server: StartServer, connect: Connect) -> None:
    """A large one by another thread, while the event loop serves others."""
    if reason := why_impossible():
        pytest.skip(reason)

    class Elsewhere(HeldWorker):
        def run(self, items: Sequence[WorkItem]) -> BatchResult:
            return super().run([WorkItem(item.header, item.operands) for item in items])

    running = start_server(worker=Elsewhere(), allow_shared_memory=True)
    stub = stub_on(connect(running.address))
    with Caller(offer_of(stub).socket) as caller:
        region = caller.region(64 * MIB)
        for shape in ((10, 10), (3, 700_001)):
            one = request(*pair(*shape), SMOOTH_L1, NONE)
            expected = results_of(compute(stub, one))
            wanted = shared(one, region)
            assert results_of(with_data(compute(stub, wanted), wanted.outputs, region)) == expected


def test_tensors_in_shared_memory_may_be_larger_than_a_message(start_server: StartServer, connect: Connect) -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    running = start_server(allow_shared_memory=True, max_message_bytes=65536)
    stub = stub_on(connect(running.address))
    with Caller(offer_of(stub).socket) as caller:
        region = caller.region(MIB)
        one = shared(request(*pair(50_000), SMOOTH_L1), region)
        assert compute(stub, one).results[0].element_count == 50_000
        one.ClearField("outputs")
        assert failure(stub.ComputeLoss, one).info.reason == "RESULT_TOO_LARGE"
        huge = request(np.zeros((1, 60_000)), np.zeros((60_000, 1)), L1, allow_broadcast=True)
        huge = shared(huge, region)
        assert failure(stub.ComputeLoss, huge).info.reason == "RESULT_TOO_LARGE"


def test_a_server_that_was_not_told_to_shares_nothing(server: RunningServer, connect: Connect) -> None:
    stub = stub_on(connect(server.address))
    assert offer_of(stub) == pb.SharedMemoryInfo()
    one = request(*pair(10), SMOOTH_L1)
    one.outputs.byte_count = 100
    for bad in (one, pb.ComputeLossRequest(input=Tensor(shared_memory=SharedMemory()), specs=[L1])):
        error = failure(stub.ComputeLoss, bad)
        assert (error.code, error.info.reason) == (grpc.StatusCode.UNIMPLEMENTED.value[0], "SHARED_MEMORY_OFF")
        assert "--allow-shared-memory" in error.message


def test_the_metrics_tell_what_is_shared(sharing: RunningServer, caller: Caller) -> None:
    registry = sharing.metrics.registry

    def shown(name: str) -> float | None:
        return registry.get_sample_value(name, {"kind": "segment"})

    eventually(lambda: shown("lossgrad_shm_regions") == 0)
    caller.region(3 * MIB)
    assert shown("lossgrad_shm_regions") == 1
    assert shown("lossgrad_shm_bytes") == 3 * MIB
    assert registry.get_sample_value("lossgrad_shm_regions", {"kind": "system"}) == 0


def test_a_stopped_server_holds_no_memory(start_server: StartServer, connect: Connect) -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    running = start_server(allow_shared_memory=True)
    stub = stub_on(connect(running.address))
    with Caller(offer_of(stub).socket) as caller:
        region = caller.region(MIB)
        compute(stub, shared(request(*pair(10), SMOOTH_L1), region))
        before = MAPS.read_text().count("memfd:lossgrad")
        running.stop()
        assert MAPS.read_text().count("memfd:lossgrad") == before - 1  # the caller's own is left
        assert caller.is_closed_by_the_server()
        assert os.fstat(region.descriptor).st_size == MIB
