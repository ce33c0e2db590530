"""Slices whose tensors are in shared memory: the same bytes as over the wire, and a clear refusal where none is shared."""

from __future__ import annotations

import pytest

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.shared_memory.segments import why_impossible
from tests.server.accumulate_calls import MSE, SMOOTH_L1, accumulate, config, numbers, slice_of
from tests.server.calling import Connect, stub_on
from tests.server.serving import RunningServer, StartServer
from tests.server.sharing import Caller, Region, offer_of

X, Y = numbers(20_000, 1).reshape(4, 5000), numbers(20_000, 2).reshape(4, 5000)
SLICES = [
    slice_of(number, x, y, group="ab"[number % 2], weight=abs(x), mask=y > 0)
    for number, (x, y) in enumerate(zip(X, Y, strict=True), 1)
]


def shared(message: pb.AccumulateLossRequest, region: Region) -> pb.AccumulateLossRequest:
    """Return a slice whose tensors are in a region."""
    result = pb.AccumulateLossRequest()
    result.CopyFrom(message)
    end = (message.slice.sequence - 1) * (1 << 17)
    for name in ("input", "target", "weight", "mask"):
        data = getattr(message.slice, name)
        getattr(result.slice, name).CopyFrom(region.tensor(end, data))
        end += -(-len(data.data) // 64) * 64
    return result


def test_slices_in_shared_memory_have_the_same_totals(start_server: StartServer, connect: Connect) -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    stub = stub_on(connect(start_server(allow_shared_memory=True).address))
    expected = accumulate(stub, config(SMOOTH_L1, MSE), SLICES).state
    with Caller(offer_of(stub).socket) as caller:
        region = caller.region(1 << 20)
        answers = accumulate(stub, config(SMOOTH_L1, MSE), [shared(one, region) for one in SLICES])
        assert answers.state.to_bytes() == expected.to_bytes()
        gone = shared(SLICES[0], region)
        gone.slice.input.shared_memory.region = bytes(16)
        refused = accumulate(stub, config(MSE), gone)
        assert refused.failure is not None
        assert refused.failure.info.reason == "UNKNOWN_REGION"
        assert refused.failure.message.startswith("slice 1: ")


def test_where_no_memory_is_shared_the_refusal_says_so(server: RunningServer, connect: Connect) -> None:
    message = slice_of(1, [1.0], [2.0])
    message.slice.input.ClearField("data")
    message.slice.input.shared_memory.byte_count = 4
    refused = accumulate(stub_on(connect(server.address)), config(MSE), message)
    assert refused.failure is not None
    assert refused.failure.info.reason == "SHARED_MEMORY_OFF"
    assert [field for field, _, _ in refused.failure.violations] == ["slice.input.shared_memory"]
