"""The names of the server's metrics by type, and every value that a label may have."""

from __future__ import annotations

import grpc

from lossgrad_api import inference
from lossgrad_api.codec import SERVICE
from lossgrad_server.jobs import DataType
from lossgrad_server.metrics import SliceOutcome
from lossgrad_server.work import Retry

COUNTERS = [
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_msg_received",
    "grpc_server_msg_sent",
    "lossgrad_requests",
    "lossgrad_elements",
    "lossgrad_batches",
    "lossgrad_batch_retries",
    "lossgrad_rejected",
    "lossgrad_nonfinite_results",
    "lossgrad_accumulation_slices",
    "lossgrad_worker_lost",
    "lossgrad_worker_restarts",
    "lossgrad_worker_crashing_requests",
    "process_cpu_seconds",
]
HISTOGRAMS = [
    "grpc_server_handling_seconds",
    "lossgrad_request_duration_seconds",
    "lossgrad_stage_duration_seconds",
    "lossgrad_request_bytes",
    "lossgrad_response_bytes",
    "lossgrad_batch_requests",
    "lossgrad_batch_elements",
    "lossgrad_batch_fill_ratio",
]
GAUGES = [
    "lossgrad_accumulations",
    "lossgrad_ready",
    "lossgrad_worker_up",
    "lossgrad_build_info",
    "lossgrad_queue_requests",
    "lossgrad_queue_bytes",
    "lossgrad_inflight_bytes",
    "lossgrad_device_utilization_ratio",
    "lossgrad_queue_oldest_seconds",
    "lossgrad_queue_limit_bytes",
    "lossgrad_batch_cap_requests",
    "lossgrad_batch_cap_elements",
    "lossgrad_batch_cap_bytes",
    "lossgrad_queue_limit_requests",
    "lossgrad_inflight_requests",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
]

CLOSED = {
    "loss": {"smooth_l1", "huber", "l1", "mse", "mixed", "unknown"},
    "mode": {"loss", "loss_grad", "unknown"},
    "api": {"native", "stream", "accumulate", "open_inference", "open_inference_stream", "other"},
    "dtype": {data_type.name.lower() for data_type in DataType},
    "outcome": {
        "ok", "invalid", "overloaded", "too_large", "deadline", "cancelled", "oom", "device", "shm", "internal",
        "unauthenticated",
        *SliceOutcome,
    },
    "stage": {"decode", "queue", "pack", "compute", "unpack", "encode"},
    "device": {"cpu"},
    "priority": {"normal", "bulk"},
    "kind": {"nan", "inf"},
    "closed_by": {"idle", "inline", "max_requests", "max_elements", "max_bytes", "alone", "deadline"},
    "reason": {
        "queue_full", "bytes_full", "predicted_late", "draining", "warming_up", "too_large", "deadline", "restarting",
        *Retry,
    },
    "cause": {"killed", "exited", "hung", "device"},
    "grpc_type": {"unary", "bidi_stream"},
    "grpc_service": {SERVICE, inference.SERVICE},
    "grpc_method": {"ComputeLoss", "StreamComputeLoss", "AccumulateLoss", "GetServerInfo", *inference.methods()},
    "grpc_code": {code.name for code in grpc.StatusCode},
}  # fmt: skip
