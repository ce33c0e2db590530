"""The dashboard for whoever is on call: is it up, is it slow, does it fail, and where does the time go?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import add_row, graph, labels_table, mean, new, number, percentiles, rate, spread

UID = "lossgrad"


def build() -> Dashboard:
    """Return the dashboard."""
    result = new(
        UID, "lossgrad", "For whoever is on call: latency by stage, traffic, failures, batching and saturation."
    )
    requests = rate("lossgrad_requests_total")
    not_ok = rate("lossgrad_requests_total", more='outcome!="ok"')
    duration = "lossgrad_request_duration_seconds"
    add_row(
        result,
        "Now",
        [
            number(
                "Servers ready",
                "Servers that are warmed up, not draining, and reached by the last scrape.",
                "none",
                "sum(lossgrad_ready{$servers})",
                red_below=1,
            ),
            number("Requests", "Requests answered per second, all outcomes.", "reqps", requests),
            number(
                "Not ok",
                "Share of requests whose outcome is not ok.",
                "percentunit",
                f"({not_ok} or vector(0)) / {requests}",
                red_from=0.01,
            ),
            number(
                "Latency, median",
                "Half of the requests took no longer, from their bytes being there to their answer's bytes "
                "being ready.",
                "s",
                percentiles(duration, shares=[0.5])["median"],
            ),
            number(
                "Latency, 99th percentile",
                "99 in 100 requests took no longer.",
                "s",
                percentiles(duration, shares=[0.99])["99 %"],
                red_from=0.1,
            ),
            number(
                "Device busy",
                "Share of the last seconds in which the busiest device's worker was computing.",
                "percentunit",
                "max(lossgrad_device_utilization_ratio{$servers})",
                red_from=0.9,
            ),
            number(
                "Oldest waiting",
                "How long the request that has waited longest has waited for a device. Bulk, which may wait, is left out.",
                "s",
                'max(lossgrad_queue_oldest_seconds{$servers, priority!="bulk"})',
                red_from=1,
            ),
            labels_table(
                "Build",
                "What runs: version of lossgrad and torch, and the device.",
                "lossgrad_build_info{$servers}",
                hidden=["job", "determinism", "grpc", "python", "cuda"],
                width=3,
            ),
        ],
    )
    add_row(
        result,
        "Latency",
        [
            graph(
                "Request duration",
                "Percentiles over all requests. A gap means that there were none.",
                "s",
                percentiles(duration, shares=[0.5, 0.9, 0.99, 0.999]),
                width=12,
                exemplars=True,
            ),
            graph(
                "Where a request's time goes",
                "Mean time in each stage, stacked: queue is waiting for the device, compute is the device's own work.",
                "s",
                {"{{stage}}": mean("lossgrad_stage_duration_seconds", "stage")},
                width=12,
                is_stacked=True,
            ),
            graph(
                "Stages, 99th percentile",
                "The slowest 1 in 100 of each stage. They do not add up: a request is rarely slow in every stage.",
                "s",
                percentiles("lossgrad_stage_duration_seconds", "stage", shares=[0.99]),
            ),
            graph(
                "Calls by method, 99th percentile",
                "As gRPC sees them: a stream is one call however many requests it carries, "
                "so its duration is its lifetime.",
                "s",
                percentiles("grpc_server_handling_seconds", "grpc_method", shares=[0.99]),
            ),
            spread(
                "Request duration, all",
                "How many requests took how long. Two bands mean two kinds of request; a band that "
                "climbs means a queue.",
                "s",
                f"sum by (le) (increase({duration}_bucket{{$servers}}[$__rate_interval]))",
            ),
        ],
    )
    add_row(
        result,
        "Traffic and failures",
        [
            graph(
                "Requests by loss",
                "Requests per second. One with several different losses counts once, as mixed.",
                "reqps",
                {"{{loss}} {{mode}}": rate("lossgrad_requests_total", "loss, mode")},
            ),
            graph(
                "Calls by method",
                "Calls started per second.",
                "reqps",
                {"{{grpc_method}} ({{grpc_type}})": rate("grpc_server_started_total", "grpc_type, grpc_method")},
            ),
            graph(
                "Calls by status",
                "Calls ended per second, by status code. docs/protocol.md says what each means.",
                "reqps",
                {"{{grpc_code}}": rate("grpc_server_handled_total", "grpc_code")},
            ),
            graph(
                "Requests that failed",
                "Requests per second whose outcome is not ok.",
                "reqps",
                {"{{outcome}}": rate("lossgrad_requests_total", "outcome", more='outcome!="ok"')},
            ),
            graph(
                "Requests refused",
                "Requests per second refused for what the server was at, not for what they were. bytes_full "
                "and queue_full: add servers.",
                "reqps",
                {"{{reason}}": rate("lossgrad_rejected_total", "reason")},
            ),
            graph(
                "Results that are not finite",
                "Requests per second with a NaN or an infinity among their elements' losses: "
                "almost always the caller's data.",
                "reqps",
                {"{{loss}} {{kind}}": rate("lossgrad_nonfinite_results_total", "loss, kind")},
            ),
        ],
    )
    add_row(
        result,
        "Batching and saturation",
        [
            graph(
                "Requests in a batch",
                "Batches grow by themselves under load; at rest a batch is one request.",
                "none",
                {"mean": mean("lossgrad_batch_requests"), **percentiles("lossgrad_batch_requests", shares=[0.5, 0.99])},
            ),
            graph(
                "Batches by what closed them",
                "Batches per second. Anything but idle, inline or alone means that a cap ended "
                "the batch while requests waited.",
                "ops",
                {"{{device}} {{closed_by}}": rate("lossgrad_batches_total", "device, closed_by")},
            ),
            graph(
                "Device busy",
                "Share of time in which each device's worker was computing. Near 100 % the queue grows.",
                "percentunit",
                {"{{instance}} {{device}}": "lossgrad_device_utilization_ratio{$servers}"},
                most=1,
                limit=0.9,
            ),
            graph(
                "Queue",
                "Requests that wait for a device. Bulk goes after the others.",
                "none",
                {"{{instance}} {{device}} {{priority}}": "lossgrad_queue_requests{$servers}"},
            ),
            graph(
                "Oldest waiting",
                "How long the request that has waited longest has waited. Bulk may wait for long under load.",
                "s",
                {"{{instance}} {{device}} {{priority}}": "lossgrad_queue_oldest_seconds{$servers}"},
                limit=1,
            ),
            graph(
                "Bytes held",
                "Bytes of the requests that wait, and of all requests in the server; their answers included.",
                "bytes",
                {
                    "queued": "sum(lossgrad_queue_bytes{$servers})",
                    "in flight": "sum(lossgrad_inflight_bytes{$servers})",
                },
            ),
            graph(
                "Computed once more",
                "Batches, or parts of them, per second that were computed once more: in halves for want of memory or after "
                "an error, or alone in the next process. Callers notice the time only.",
                "ops",
                {"{{reason}}": rate("lossgrad_batch_retries_total", "reason")},
            ),
            graph(
                "Worker processes lost",
                "Per hour, by what ended them. With --isolation process they are replaced; each costs a moment of service.",
                "none",
                {"{{instance}} {{cause}}": f"3600 * {rate('lossgrad_worker_lost_total', 'instance, cause')}"},
            ),
        ],
    )
    return result
