"""Metrics: after known traffic every series has exactly the values that it should have, and no others exist."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch

import lossgrad_server
from lossgrad_api.codec import SERVICE
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.calling import Connect, failure, stub_on
from tests.server.metric_names import CLOSED, COUNTERS, GAUGES, HISTOGRAMS
from tests.server.requests import L1, SMOOTH_L1, request
from tests.server.scraping import Scrape, labelled
from tests.server.serving import PATIENCE_SECONDS, HeldWorker, RunningServer, StartServer, eventually

MSE_SUM = pb.LossSpec(mse=pb.MseLoss(), reduction=pb.REDUCTION_SUM)
BAD = request([1.0], [2.0], pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=-1.0)))


@pytest.fixture
def running(start_server: StartServer) -> RunningServer:
    return start_server(metrics_port=0, max_queued_requests=4, worker=HeldWorker())


def scrape(running: RunningServer) -> Scrape:
    return Scrape(running.scrape())


def stream(stub: Any, *requests: pb.ComputeLossRequest) -> int:
    """Send requests in one message; return how many messages the answers came in."""
    tagged = [pb.TaggedRequest(tag=tag, request=one) for tag, one in enumerate(requests)]
    messages = list(stub.StreamComputeLoss(iter([pb.StreamComputeLossRequest(requests=tagged)])))
    assert sum(len(message.responses) for message in messages) == len(requests)
    return len(messages)


# ---- Known traffic ----


def test_after_known_traffic_the_series_have_exactly_the_expected_values(
    running: RunningServer, connect: Connect
) -> None:
    stub = stub_on(connect(running.address))
    unary = [
        request([1.0] * 10, [0.0] * 10, SMOOTH_L1),
        request([1.0] * 20, [0.0] * 20, SMOOTH_L1),
        request([1.0] * 5, [0.0] * 5, L1),
        request([1.0, math.nan, math.inf], [0.0] * 3, L1, MSE_SUM),
    ]
    answers = [stub.ComputeLoss(one) for one in unary]
    failure(stub.ComputeLoss, BAD)
    answer_messages = stream(stub, request([2.0] * 7, [0.0] * 7, MSE_SUM), BAD, request([2.0] * 9, [0.0] * 9, MSE_SUM))
    stub.GetServerInfo(pb.GetServerInfoRequest())
    found = scrape(running)

    assert found.of("lossgrad_requests_total") == {
        labelled(loss="smooth_l1", mode="loss_grad", api="native", outcome="ok"): 2,
        labelled(loss="l1", mode="loss", api="native", outcome="ok"): 1,
        labelled(loss="mixed", mode="loss", api="native", outcome="ok"): 1,
        labelled(loss="unknown", mode="unknown", api="native", outcome="invalid"): 1,
        labelled(loss="mse", mode="loss", api="stream", outcome="ok"): 2,
        labelled(loss="unknown", mode="unknown", api="stream", outcome="invalid"): 1,
    }
    assert found.of("lossgrad_elements_total") == {
        labelled(loss="smooth_l1", mode="loss_grad", dtype="float32", device="cpu"): 30,
        labelled(loss="l1", mode="loss", dtype="float32", device="cpu"): 5,
        labelled(loss="mixed", mode="loss", dtype="float32", device="cpu"): 3,
        labelled(loss="mse", mode="loss", dtype="float32", device="cpu"): 16,
    }
    assert found.of("lossgrad_nonfinite_results_total") == {labelled(loss="mixed", kind="nan"): 1}
    assert found.of("lossgrad_rejected_total") == {}
    assert found.of("lossgrad_request_duration_seconds_count") == {
        labelled(loss="smooth_l1", mode="loss_grad", api="native"): 2,
        labelled(loss="l1", mode="loss", api="native"): 1,
        labelled(loss="mixed", mode="loss", api="native"): 1,
        labelled(loss="mse", mode="loss", api="stream"): 2,
    }
    for stage in ("decode", "queue", "pack", "compute", "unpack", "encode"):
        assert found("lossgrad_stage_duration_seconds_count", stage=stage, device="cpu") == 6, stage
    stages = found.of("lossgrad_stage_duration_seconds_sum")
    durations = found.of("lossgrad_request_duration_seconds_sum")
    assert math.isclose(sum(stages.values()), sum(durations.values()), rel_tol=1e-9)
    assert min(stages.values()) >= 0
    assert found("lossgrad_request_bytes_count", api="native") == 5
    assert found("lossgrad_request_bytes_sum", api="native") == sum(one.ByteSize() for one in [*unary, BAD])
    assert found("lossgrad_request_bytes_count", api="stream") == 1
    assert found("lossgrad_response_bytes_count", api="native") == 4
    assert found("lossgrad_response_bytes_sum", api="native") == sum(answer.ByteSize() for answer in answers)
    assert found("lossgrad_response_bytes_count", api="stream") == answer_messages

    batches = found("lossgrad_batch_requests_count", device="cpu")
    assert batches in (5, 6)  # the stream's two good requests: in one batch, or the first alone
    assert found("lossgrad_batch_requests_sum", device="cpu") == 6
    assert found("lossgrad_batch_elements_sum", device="cpu") == 54
    assert found.of("lossgrad_batches_total") == {labelled(device="cpu", closed_by="idle"): batches}

    for method, kind, received, sent in (
        ("ComputeLoss", "unary", 5, 4),
        ("StreamComputeLoss", "bidi_stream", 1, answer_messages),
        ("GetServerInfo", "unary", 1, 1),
    ):
        rpc = {"grpc_type": kind, "grpc_service": SERVICE, "grpc_method": method}
        calls = 5 if method == "ComputeLoss" else 1
        assert found("grpc_server_started_total", **rpc) == calls
        assert found("grpc_server_handling_seconds_count", **rpc) == calls
        assert found("grpc_server_msg_received_total", **rpc) == received
        assert found("grpc_server_msg_sent_total", **rpc) == sent
        assert found("grpc_server_handled_total", **rpc, grpc_code="OK") == (4 if method == "ComputeLoss" else 1)
    rpc = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": "ComputeLoss"}
    assert found("grpc_server_handled_total", **rpc, grpc_code="INVALID_ARGUMENT") == 1

    assert found("lossgrad_ready") == 1
    for gauge in ("lossgrad_queue_requests", "lossgrad_queue_oldest_seconds", "lossgrad_queue_bytes"):
        for priority in ("normal", "bulk"):
            assert found(gauge, device="cpu", priority=priority) == 0
    assert found("lossgrad_inflight_bytes", device="cpu") == 0
    utilization = found("lossgrad_device_utilization_ratio", device="cpu")
    assert utilization is not None
    assert 0 < utilization <= 1


def test_the_queue_is_what_it_is_at_the_scrape_and_refusals_are_counted(
    running: RunningServer, connect: Connect
) -> None:
    worker = running.worker
    assert worker is not None
    stub = stub_on(connect(running.address))
    worker.hold()
    calls = [stub.ComputeLoss.future(request([1.0] * 4, [0.0] * 4, L1))]
    worker.wait_for_batch()
    calls += [stub.ComputeLoss.future(request([1.0] * size, [0.0] * size, SMOOTH_L1)) for size in (1, 2)]
    as_bulk = (("lossgrad-priority", "bulk"),)
    calls.append(stub.ComputeLoss.future(request([1.0] * 3, [0.0] * 3, SMOOTH_L1), metadata=as_bulk))
    eventually(lambda: running.batcher.waiting_requests == 3)
    for _ in range(2):
        failure(stub.ComputeLoss, request([1.0], [0.0], L1))
    found = scrape(running)
    for priority, sizes in (("normal", (1, 2)), ("bulk", (3,))):
        assert found("lossgrad_queue_requests", device="cpu", priority=priority) == len(sizes)
        oldest = found("lossgrad_queue_oldest_seconds", device="cpu", priority=priority)
        assert oldest is not None
        assert 0 < oldest < PATIENCE_SECONDS
        # Two tensors and a gradient.
        assert found("lossgrad_queue_bytes", device="cpu", priority=priority) == sum(sizes) * 3 * 4
    assert found("lossgrad_inflight_bytes", device="cpu") == (1 + 2 + 3) * 3 * 4 + 4 * 2 * 4
    assert found("lossgrad_inflight_requests", device="cpu") == 4
    assert found("lossgrad_queue_limit_requests", device="cpu") == 4
    assert found("lossgrad_queue_limit_bytes", device="cpu") == running.config.max_queued_bytes
    assert found("lossgrad_batch_cap_requests", device="cpu") == running.config.max_batch_requests
    assert found("lossgrad_batch_cap_elements", device="cpu") == running.config.max_batch_elements
    assert found("lossgrad_batch_cap_bytes", device="cpu") == running.config.max_batch_bytes
    assert found.of("lossgrad_rejected_total") == {labelled(reason="queue_full"): 2}
    assert found("lossgrad_requests_total", loss="l1", mode="loss", api="native", outcome="overloaded") == 2
    worker.release()
    for call in calls:
        call.result(timeout=PATIENCE_SECONDS)
    assert scrape(running)("lossgrad_batch_requests_sum", device="cpu") == 4


# ---- Names, types and buckets ----


def test_the_names_and_types_are_those_that_are_promised(server: RunningServer) -> None:
    expected = (
        dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(HISTOGRAMS, "histogram") | dict.fromkeys(GAUGES, "gauge")
    )
    types = {name: kind for name, kind in Scrape(server.scrape()).types.items() if not name.endswith("_created")}
    assert types == expected


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("lossgrad_request_duration_seconds", "1e-05", "60.0", 25),
        ("lossgrad_stage_duration_seconds", "1e-05", "60.0", 25),
        ("grpc_server_handling_seconds", "1e-05", "60.0", 25),
        ("lossgrad_request_bytes", "0.0", "4.294967296e+09", 14),
        ("lossgrad_batch_requests", "1.0", "1024.0", 11),
        ("lossgrad_batch_elements", "1.0", "1.073741824e+09", 16),
    ],
)
def test_buckets_begin_where_requests_are(
    server: RunningServer, stub: LossServiceStub, name: str, first: str, last: str, count: int
) -> None:
    """At 10 microseconds: in the customary buckets every request of ours would be in the first."""
    stub.ComputeLoss(request([1.0], [2.0]))
    found = scrape(server)
    bounds = [dict(labels)["le"] for own, labels in found.samples if own == f"{name}_bucket"]
    assert bounds[0] == first
    assert bounds[count - 1] == last
    assert bounds[count] == "+Inf"


def test_build_info_tells_what_runs(server: RunningServer) -> None:
    ((labels, value),) = Scrape(server.scrape()).of("lossgrad_build_info").items()
    assert value == 1
    told = dict(labels)
    assert told["version"] == lossgrad_server.__version__
    assert told["device"] == "cpu"
    assert told["device_name"]
    assert (told["torch"], told["cuda"]) == (torch.__version__, torch.version.cuda or "")
    assert told.keys() == {"version", "torch", "cuda", "python", "grpc", "device", "device_name", "determinism"}


# ---- Closed sets ----


def test_what_callers_name_adds_no_series(running: RunningServer, connect: Connect) -> None:
    channel = connect(running.address)
    stub = stub_on(channel)
    stub.ComputeLoss(request([1.0], [2.0]))
    failure(stub.ComputeLoss, BAD)
    before = scrape(running).series()
    for method in ("/evil.Service/Method", f"/{SERVICE}/NoSuchMethod", "/x/y" * 50):
        call: Callable[..., Any] = channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=PATIENCE_SECONDS)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    for number in range(5):
        hostile = request([1.0] * (number + 1), [2.0] * (number + 1), idempotency_key=f'"}}{number}\n\\')
        stub.ComputeLoss(hostile, metadata=((f"x-{number}", f"value {number}"),))
        beta = request([1.0], [2.0], pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=-1.0 - number)))
        failure(stub.ComputeLoss, beta)
    assert scrape(running).series() == before


def test_label_values_come_from_closed_sets(server: RunningServer) -> None:
    for name, labels in Scrape(server.scrape()).series():
        if name == "lossgrad_build_info":
            continue
        for label, value in labels:
            assert label == "le" or value in CLOSED[label], (name, label, value)


def test_the_stages_of_packed_requests_add_up_to_their_durations(running: RunningServer, connect: Connect) -> None:
    """A request of a message waits while its neighbours are read and answered, and that is in its stages."""
    stub = stub_on(connect(running.address))
    stream(stub, *[request([1.0] * size, [0.0] * size, L1) for size in (1, 1, 1, 2)])
    found = scrape(running)
    assert found("lossgrad_request_duration_seconds_count", loss="l1", mode="loss", api="stream") == 4
    total = sum(found.of("lossgrad_stage_duration_seconds_sum").values())
    assert math.isclose(total, sum(found.of("lossgrad_request_duration_seconds_sum").values()), rel_tol=1e-9)


def test_a_message_that_is_too_large_counts_though_its_handler_never_sees_it(
    start_server: StartServer, connect: Connect
) -> None:
    running = start_server(metrics_port=0, max_message_bytes=65536)
    channel = connect(running.address)
    stub = stub_on(channel)
    large = request([1.0] * 10_000, [0.0] * 10_000)
    failure(stub.ComputeLoss, large)
    with pytest.raises(grpc.RpcError):
        stream(stub, large)
    found = scrape(running)
    for api in ("native", "stream"):
        assert found("lossgrad_requests_total", loss="unknown", mode="unknown", api=api, outcome="too_large") == 1
    assert found.of("lossgrad_rejected_total") == {labelled(reason="too_large"): 2}


@pytest.mark.parametrize("reduction", [pb.REDUCTION_NONE, pb.REDUCTION_MEAN, pb.REDUCTION_SAMPLE_SUM])
def test_what_is_not_finite_is_nan_or_infinity(
    running: RunningServer, connect: Connect, reduction: pb.Reduction
) -> None:
    stub = stub_on(connect(running.address))
    infinite, nan = [[1.0, math.inf], [0.0, -math.inf]], [[1.0, math.inf], [0.0, math.nan]]
    zeros = [[0.0, 0.0]] * 2
    huber = pb.LossSpec(huber=pb.HuberLoss(delta=1.0), reduction=reduction)
    mse = pb.LossSpec(mse=pb.MseLoss(), reduction=reduction)
    for input, *specs in ((infinite, mse), (infinite, mse), (nan, mse), (zeros, mse), (infinite, huber, mse)):
        stub.ComputeLoss(request(input, zeros, *specs))
    assert scrape(running).of("lossgrad_nonfinite_results_total") == {
        labelled(loss="mse", kind="inf"): 2,
        labelled(loss="mse", kind="nan"): 1,
        labelled(loss="mixed", kind="inf"): 1,
    }
