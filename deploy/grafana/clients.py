"""The dashboard of the callers: what the SDK measures in their processes, where it is given a registry.

The difference between a request's time here and the server's own is the network, the transport and waiting for a turn.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import add_row, graph, new, number, percentiles, rate, spread

UID = "lossgrad-clients"


def build() -> Dashboard:
    """Return the dashboard."""
    result = new(
        UID,
        "lossgrad clients",
        "What callers see, from the metrics that the SDK exports in their processes: LossClient(metrics=registry).",
        info="lossgrad_client_inflight_requests",
    )
    requests = rate("lossgrad_client_requests_total")
    failed = rate("lossgrad_client_requests_total", more='outcome!="ok"')
    retries = rate("lossgrad_client_retries_total")
    duration = "lossgrad_client_request_duration_seconds"
    add_row(
        result,
        "Now",
        [
            number("Requests", "Requests that came back per second, all outcomes.", "reqps", requests, width=4),
            number(
                "Not ok",
                "Share of requests that raised an error, after all retries.",
                "percentunit",
                f"({failed} or vector(0)) / {requests}",
                width=4,
                red_from=0.01,
            ),
            number(
                "Latency, median",
                "From the call to its result, retries included.",
                "s",
                percentiles(duration, shares=[0.5])["median"],
                width=4,
            ),
            number(
                "Latency, 99th percentile",
                "99 in 100 took no longer.",
                "s",
                percentiles(duration, shares=[0.99])["99 %"],
                width=4,
                red_from=0.25,
            ),
            number(
                "Sent again",
                "Requests that were sent again, as a share of all. gRPC's own retries of unary calls are not seen.",
                "percentunit",
                f"({retries} or vector(0)) / {requests}",
                width=4,
                red_from=0.05,
            ),
            number(
                "In flight",
                "Requests that wait for their answer.",
                "none",
                "sum(lossgrad_client_inflight_requests{$servers})",
                width=4,
            ),
        ],
    )
    add_row(
        result,
        "Latency",
        [
            graph(
                "Request duration",
                "From the call to its result, retries included.",
                "s",
                percentiles(duration, shares=[0.5, 0.9, 0.99, 0.999]),
            ),
            graph(
                "By method",
                "compute: one call. stream: a pair, from being added until answered. evaluate: a slice of a batch.",
                "s",
                percentiles(duration, "method", shares=[0.99]),
            ),
            spread(
                "Request duration, all",
                "How many requests took how long.",
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
                "Requests",
                "Requests per second.",
                "reqps",
                {"{{method}}": rate("lossgrad_client_requests_total", "method")},
            ),
            graph(
                "Errors",
                "Requests per second that raised, by the kind of error.",
                "reqps",
                {"{{outcome}}": rate("lossgrad_client_requests_total", "outcome", more='outcome!="ok"')},
            ),
            graph(
                "Sent again",
                "Requests sent again per second, by why the time before failed.",
                "reqps",
                {"{{reason}}": rate("lossgrad_client_retries_total", "reason")},
            ),
            graph(
                "Streams opened again",
                "Streams per second that replaced one that broke, or whose server went down.",
                "ops",
                {"{{reason}}": rate("lossgrad_client_reconnects_total", "reason")},
            ),
            graph(
                "RPCs by code",
                "What gRPC calls ended with, per second. Streams that their caller ended are CANCELLED.",
                "reqps",
                {"{{grpc_method}} {{grpc_code}}": rate("grpc_client_handled_total", "grpc_method, grpc_code")},
            ),
            graph(
                "Requests in a message",
                "How many pairs of streams travel in a message, on average.",
                "none",
                {
                    "pairs": rate("lossgrad_client_requests_total", more='method="stream"')
                    + " / "
                    + rate("grpc_client_msg_sent_total", more='grpc_method="StreamComputeLoss"')
                },
            ),
        ],
    )
    add_row(
        result,
        "Streams and bytes",
        [
            graph(
                "In flight",
                "Requests that wait for their answer.",
                "none",
                {"{{instance}} {{method}}": "lossgrad_client_inflight_requests{$servers}"},
            ),
            graph(
                "Bytes in windows",
                "Bytes of the requests that streams hold.",
                "bytes",
                {"{{instance}} {{method}}": "lossgrad_client_window_bytes{$servers}"},
            ),
            graph(
                "Waiting for the server",
                "Share of time in which streams and evaluations had nothing to do but wait for answers. Near 1 the "
                "servers, or the network, set the pace; near 0 the caller's own data loading does.",
                "percentunit",
                {"{{instance}} {{method}}": rate("lossgrad_client_waiting_seconds_total", "instance, method")},
            ),
            graph(
                "Bytes sent",
                "Bytes of messages sent per second.",
                "Bps",
                {"{{grpc_method}}": rate("lossgrad_client_sent_bytes_total", "grpc_method")},
            ),
            graph(
                "Bytes received",
                "Bytes of messages received per second.",
                "Bps",
                {"{{grpc_method}}": rate("lossgrad_client_received_bytes_total", "grpc_method")},
            ),
        ],
    )
    return result
