"""The standard health service (grpc.health.v1). Names: "" and the loss service follow readiness, "liveness" the event loop.

"liveness" is never tied to the device or the queue: overload must not get a server killed.
"""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lossgrad_api.codec import SERVICE
from lossgrad_server.transport.call import Call, Method

READINESS_NAMES = ("", SERVICE)
LIVENESS_NAME = "liveness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Says whether the server serves."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]

    async def set_alive(self) -> None:
        """Say that the event loop runs, and that requests are not served yet."""
        await self._servicer.set(LIVENESS_NAME, _SERVING)
        await self.set_ready(False)

    async def set_ready(self, is_ready: bool) -> None:
        """Say whether requests are served."""
        for name in READINESS_NAMES:
            await self._servicer.set(name, _SERVING if is_ready else _NOT_SERVING)


def health_method() -> Method:
    """Return a Check method for a transport without grpcio, whose server serves as long as it can be called."""

    async def check(request: bytes, call: Call) -> bytes:
        return health_pb2.HealthCheckResponse(status=_SERVING).SerializeToString()

    return Method("/grpc.health.v1.Health/Check", unary=check)
