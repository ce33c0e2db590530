"""Server reflection, for tools such as grpcurl: tells of the native service, of health, and of Open Inference.

Its descriptors come from a pool made for it: those of Open Inference are not in the process's own, and must not be
(lossgrad_api/inference.py).
"""

from __future__ import annotations

from typing import Any

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from lossgrad_api import inference
from lossgrad_api.codec import SERVICE


def add_reflection(server: grpc.aio.Server, *, open_inference: bool) -> None:
    """Serve reflection on a server that is not yet started."""
    names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
    pool = descriptor_pool.DescriptorPool()
    for name in names:
        _add(pool, descriptor_pool.Default().FindFileContainingSymbol(name))
    if open_inference:
        names.append(inference.SERVICE)
        for file in inference.descriptor_files().file:
            pool.Add(file)
    reflection.enable_server_reflection(names, server, pool)  # type: ignore[no-untyped-call]


def _add(pool: descriptor_pool.DescriptorPool, file: Any) -> None:
    """Add a file after those that it imports; adding one again changes nothing."""
    for dependency in file.dependencies:
        _add(pool, dependency)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    pool.Add(proto)
