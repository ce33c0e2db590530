"""The metrics over HTTP, in a thread of their own: Prometheus' text format, or OpenMetrics for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client

from lossgrad_server.config import ConfigError
from lossgrad_server.gpu_metrics import with_plain_decimals


def serve_metrics(
    registry: prometheus_client.CollectorRegistry, host: str, port: int, *, are_plain: bool = False
) -> tuple[int, Callable[[], None]]:
    """Serve a registry; return the port that was bound and what stops it. Raises ConfigError where it cannot be had.

    `are_plain`: nv_gpu_* are written as perf_analyzer reads them.
    """
    try:
        httpd, thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another --metrics-port, 0 for a free "
            "one, -1 for none"
        ) from None
    if are_plain:
        httpd.set_app(with_plain_decimals(httpd.get_app()))

    def stop() -> None:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

    return httpd.server_port, stop
