"""The dashboard for whoever plans: how full are the servers, what fills them, and when are more needed?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import add_row, graph, mean, new, number, percentiles, rate

UID = "lossgrad-capacity"


def build() -> Dashboard:
    """Return the dashboard."""
    result = new(
        UID, "lossgrad capacity", "For whoever plans: how full the servers are, with what, and how far they go."
    )
    result.time("now-24h", "now").refresh("1m")
    busy = "lossgrad_device_utilization_ratio{$servers}"
    elements = rate("lossgrad_elements_total")
    answered = rate("lossgrad_requests_total", more='outcome="ok"')
    refused = rate("lossgrad_rejected_total", more='reason=~"queue_full|bytes_full"')
    add_row(
        result,
        "How full",
        [
            number(
                "Servers", "Servers that Prometheus reached.", "none", "count(lossgrad_build_info{$servers})", width=4
            ),
            number("Device busy", "Mean over the servers.", "percentunit", f"avg({busy})", width=4, red_from=0.8),
            number("Elements", "Elements computed per second, all servers together.", "short", elements, width=4),
            number(
                "Elements at full use",
                "What the same servers would compute if their devices were never idle, as far as the "
                "present mix of requests goes.",
                "short",
                f"{elements} / clamp_min(avg({busy}), 0.01)",
                width=4,
            ),
            number(
                "Servers needed",
                "Servers that keep the devices at 70 % with the present load.",
                "none",
                f"ceil(sum({busy}) / 0.7)",
                width=4,
            ),
            number(
                "Refused",
                "Share of requests refused because the servers were full.",
                "percentunit",
                f"{refused} / {rate('lossgrad_requests_total')}",
                width=4,
                red_from=0.001,
            ),
        ],
    )
    add_row(
        result,
        "Servers",
        [
            graph(
                "Device busy",
                "Share of time in which each device's worker was computing.",
                "percentunit",
                {"{{instance}} {{device}}": busy},
                most=1,
                limit=0.7,
            ),
            graph(
                "Requests by server",
                "Requests per second. Uneven: clients that do not balance, or connections that never end.",
                "reqps",
                {"{{instance}}": rate("lossgrad_requests_total", "instance")},
            ),
            graph(
                "CPU",
                "Cores that each server's process uses: gRPC, and the losses where they are computed on the CPU.",
                "none",
                {"{{instance}}": "rate(process_cpu_seconds_total{$servers}[$__rate_interval])"},
            ),
            graph(
                "Memory",
                "Resident memory of each server's process.",
                "bytes",
                {"{{instance}}": "process_resident_memory_bytes{$servers}"},
            ),
            graph(
                "Bytes held",
                "Bytes of all requests inside, their answers included: what --max-queued-bytes bounds.",
                "bytes",
                {
                    "{{instance}}": "lossgrad_inflight_bytes{$servers}",
                    "the most": "min(lossgrad_queue_limit_bytes{$servers})",
                },
            ),
            graph("Open files", "Each connection is one.", "none", {"{{instance}}": "process_open_fds{$servers}"}),
        ],
    )
    add_row(
        result,
        "What fills them",
        [
            graph(
                "Elements by loss",
                "Elements computed per second. loss_grad with nobody to read the gradient is the commonest waste.",
                "short",
                {"{{loss}} {{mode}}": rate("lossgrad_elements_total", "loss, mode")},
            ),
            graph("Elements in a request", "Mean over all requests.", "short", {"mean": f"{elements} / {answered}"}),
            graph(
                "Elements in a batch",
                "Elements computed by one batch.",
                "short",
                {"mean": mean("lossgrad_batch_elements"), **percentiles("lossgrad_batch_elements", shares=[0.99])},
            ),
            graph(
                "Batches, how full",
                "By the cap that a batch came nearest to: --max-batch-requests, -elements or -bytes. Near 1 the caps "
                "end batches; far below it batches hold all that waits.",
                "percentunit",
                {"mean": mean("lossgrad_batch_fill_ratio"), **percentiles("lossgrad_batch_fill_ratio", shares=[0.99])},
                most=1,
            ),
            graph(
                "Elements by data type",
                "Elements computed per second, by the input's data type.",
                "short",
                {"{{dtype}}": rate("lossgrad_elements_total", "dtype")},
            ),
            graph(
                "Bytes received",
                "Bytes of request messages per second.",
                "Bps",
                {"{{api}}": rate("lossgrad_request_bytes_sum", "api")},
            ),
            graph(
                "Bytes sent",
                "Bytes of response messages per second.",
                "Bps",
                {"{{api}}": rate("lossgrad_response_bytes_sum", "api")},
            ),
            graph(
                "Time in the queue",
                "What the next server would shorten.",
                "s",
                percentiles("lossgrad_stage_duration_seconds", only='$servers, stage="queue"'),
            ),
        ],
    )
    return result
